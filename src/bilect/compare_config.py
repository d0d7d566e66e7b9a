"""Settings of learning curves and of comparisons, see ``bilect.compare``."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

__all__ = ["CompareConfig", "CurveConfig"]

Positive = Annotated[int, Field(gt=0)]
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"


class CurveConfig(BaseModel):
    """Held-out losses while the arms train; nothing is chosen by them."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    every: Positive | None = Field(None, description="optimiser steps between two points; None: no curve")
    documents: Positive = Field(256, description="of each held-out set, a fixed sample")


class CompareConfig(BaseModel):
    """``bilect compare``: the same run with several seeds, and variants of it."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

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
