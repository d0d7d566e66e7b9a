"""The settings of online token selection, for files and command lines."""

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, model_validator

from bilect.config.base import Fraction, NonNegative, Positive, PositiveFloat, Settings

__all__ = ["BladeConfig", "Method"]

Method = Literal["blade", "rho1", "random-token", "full"]
Number = TypeVar("Number", int, float)
Step = Annotated[int, Field(ge=0)]


class BladeConfig(Settings):
    """What ``OnlineTokenSelector`` takes, less what cannot be written in a file."""

    method: Method = Field(
        "blade",
        description="blade; rho1: a fixed reference, given or trained once on upper data alone; the controls "
        "random-token and full",
    )
    keep_ratio: Fraction | dict[Step, Fraction] = Field(
        0.6, description="fraction of the tokens kept (paper: 0.6); {0: 1.0, 500: 0.6} holds each from its step on"
    )
    sync_every: Positive | dict[Step, Positive] = Field(
        1000, description="T, steps between synchronisations (paper: 500 to 2000 all alike); or by step, as keep_ratio"
    )
    reference_steps: Positive = Field(
        300, description="K, steps of the reference at each synchronisation (paper: 300); rho1: in all"
    )
    penalty: NonNegative = Field(1.0, description="lambda, weight of the training loss in the reference's objective")
    granularity: Literal["token", "sequence"] = Field("token", description="what is kept or left out")
    scope: Literal["global", "local"] = Field("global", description="the best over all ranks, or over each rank")
    baseline: Literal["model", "matched"] = Field(
        "model", description="what the reference is compared with: the model, or its matched twin"
    )
    warmup_steps: Annotated[int, Field(ge=0)] = Field(0, description="steps with the full loss before the first choice")
    reference: str | None = Field(None, description="rho1: directory or Hub name of the fixed reference")
    reference_learning_rate: PositiveFloat | None = Field(
        None, description="of the reference's AdamW; None: that of the training"
    )
    reference_dtype: Literal["float32", "bfloat16"] | None = Field(
        None, description="of the frozen reference; None: the model's"
    )
    offload: bool = Field(False, description="keep the reference in the CPU's memory between uses")
    diagnose_every: Positive | None = Field(100, description="steps between diagnostics; None for none")
    upper_batch_size: Positive = Field(8, description="upper examples per reference step, over all ranks")
    seed: int = Field(0, description="of the order of upper data and of random tokens")

    @model_validator(mode="after")
    def _consistent(self) -> "BladeConfig":
        if self.method == "rho1" and self.baseline == "matched":
            raise ValueError("baseline: matched needs synchronisations, which rho1 has not")
        if self.reference is not None and self.method != "rho1":
            raise ValueError("reference: only rho1 has a given reference")
        for name in ("keep_ratio", "sync_every"):
            schedule = getattr(self, name)
            if isinstance(schedule, dict) and 0 not in schedule:
                raise ValueError(f"{name}: the schedule says nothing of step 0")
        return self

    @property
    def needs_upper_data(self) -> bool:
        """Whether a reference is trained."""
        return self.method in ("blade", "rho1") and self.reference is None and self.keep_ratio != 1

    def of(self, method: Method) -> "BladeConfig":
        """The same settings under another method, less those that it has no use for."""
        unused: dict[str, Any] = {"baseline": "model"} if method == "rho1" else {"reference": None}
        return self.model_copy(update={"method": method, **unused})

    def selector_options(self, learning_rate: float) -> dict[str, Any]:
        """Keyword arguments of ``OnlineTokenSelector``, given the learning rate of the training."""
        import torch

        options = self.model_dump(exclude={"method", "upper_batch_size"})
        for name in ("keep_ratio", "sync_every"):
            if isinstance(options[name], dict):
                options[name] = _held(options[name])
        if self.reference_learning_rate is None:
            options["reference_learning_rate"] = learning_rate
        if self.reference_dtype is not None:
            options["reference_dtype"] = getattr(torch, self.reference_dtype)
        if self.method == "full":
            options["keep_ratio"] = 1.0
        elif self.method == "random-token":
            options["selection"] = "random"
        elif self.method == "rho1":
            options["sync_every"] = None
            options["penalty"] = 0.0
        return options


def _held(schedule: Mapping[int, Number]) -> Callable[[int], Number]:
    """The value of the greatest step that is not after the asked one."""
    return lambda step: schedule[max(s for s in schedule if s <= step)]
