"""BLADE: tokens with the largest excess loss over a reference that follows the model, see ``bilect.bilevel.online``."""

from typing import Literal

from pydantic import Field

from bilect.config.online import BladeConfig
from bilect.methods._online import SelectorMethod

__all__ = ["Blade", "BladeMethodConfig"]


class BladeMethodConfig(BladeConfig):
    """See ``BladeConfig``."""

    method: Literal["blade"] = Field("blade", description="this one")


class Blade(SelectorMethod[BladeMethodConfig]):
    """The reference starts from the model again every ``sync_every`` steps."""

    name = "blade"
    summary = "tokens by excess loss over a reference that follows the model (arXiv 2606.18650)"
    Config = BladeMethodConfig
