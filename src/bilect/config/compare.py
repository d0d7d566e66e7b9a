"""Settings of learning curves and of comparisons, see ``bilect.compare``."""

from typing import Annotated, Any

from pydantic import Field, field_validator

from bilect.config.base import Positive, Settings

__all__ = ["CompareConfig", "CurveConfig"]

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"


class CurveConfig(Settings):
    """Held-out losses while the arms train; nothing is chosen by them."""

    every: Positive | None = Field(None, description="optimiser steps between two points; None: no curve")
    documents: Positive = Field(256, description="of each held-out set, a fixed sample")


class CompareConfig(Settings):
    """``bilect compare``: the same run with several seeds, and variants of it."""

    seeds: Annotated[int, Field(ge=2)] = Field(3, description="the config's own seed and those that follow it")
    workers: Positive | None = Field(None, description="runs at a time; None: one per GPU, or per core without GPUs")
    loss_on: str | None = Field(None, description="held-out set that decides; None: the mean over all of them")
    variants: dict[Annotated[str, Field(pattern=NAME)], dict[str, Any]] = Field(
        {},
        description="name: the settings that differ, such as {no-kl: {fit.kl_coef: 0, controls: [random, full]}}; a "
        "variant repeats only what depends on them",
    )

    @field_validator("variants")
    @classmethod
    def _names(cls, variants: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        if "base" in variants:
            raise ValueError("'base' is the config without variants; choose another name")
        return variants
