"""RHO-1: tokens with the largest excess loss over a reference trained once on upper data, then fixed."""

from typing import Literal

from pydantic import Field

from bilect.config.online import BladeConfig
from bilect.methods._online import SelectorMethod

__all__ = ["Rho1", "Rho1Config"]


class Rho1Config(BladeConfig):
    """See ``BladeConfig``."""

    method: Literal["rho1"] = Field("rho1", description="this one")


class Rho1(SelectorMethod[Rho1Config]):
    """One synchronisation, with lambda 0; or a given reference."""

    name = "rho1"
    summary = "tokens by excess loss over a fixed reference (arXiv 2404.07965)"
    Config = Rho1Config
