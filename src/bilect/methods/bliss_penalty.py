"""BLISS's score model, trained by the penalty gradient of two first-order models: no Hessian at all (ours).

    d_i = lambda ( l_i(m) - l_i(w) )

with w the reference and m its matched twin, see ``bilect.bilevel.offline.twins``.
"""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from bilect.methods.bliss import BilevelMethod, BlissConfig

__all__ = ["BlissPenalty", "BlissPenaltyConfig"]


class BlissPenaltyConfig(BlissConfig):
    """As BLISS; where no learning rate of the twins is given it is a tenth of the proxy's (docs/results_log.md, 4)."""

    hypergradient: Literal["penalty"] = Field("penalty", description="from two first-order models")

    @model_validator(mode="before")
    @classmethod
    def _slow_twins(cls, values: Any) -> Any:
        if not isinstance(values, Mapping) or values.get("reference_learning_rate") is not None:
            return values
        rate = values.get("proxy_learning_rate", cls.model_fields["proxy_learning_rate"].default)
        return {**values, "reference_learning_rate": rate / 10} if isinstance(rate, int | float) else values


class BlissPenalty(BilevelMethod[BlissPenaltyConfig]):
    """Score model, penalty hypergradient with the matched twin."""

    name = "bliss-penalty"
    summary = "BLISS's score model by the penalty gradient of two first-order models (ours, after arXiv 2606.18650)"
    Config = BlissPenaltyConfig
