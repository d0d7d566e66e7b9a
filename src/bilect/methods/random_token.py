"""Uniform tokens: the control of token selection."""

from typing import Literal

from pydantic import Field

from bilect.config.online import BladeConfig
from bilect.methods._online import SelectorMethod

__all__ = ["RandomToken", "RandomTokenConfig"]


class RandomTokenConfig(BladeConfig):
    """See ``BladeConfig``; keep_ratio, granularity, scope and seed matter."""

    method: Literal["random-token"] = Field("random-token", description="this one")


class RandomToken(SelectorMethod[RandomTokenConfig]):
    """No reference."""

    name = "random-token"
    summary = "uniform tokens, the control of token selection"
    uses_upper = False
    Config = RandomTokenConfig
