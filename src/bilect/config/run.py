"""A whole run: every group of settings in one tree."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, ValidationError, model_validator

from bilect.config.base import Positive, Settings, explain_wrong
from bilect.config.compare import CompareConfig, CurveConfig
from bilect.config.data import DataConfig
from bilect.config.fit import FitConfig
from bilect.config.models import ModelsConfig
from bilect.config.online import BladeConfig
from bilect.config.selection import SelectionConfig
from bilect.config.tasks import TasksConfig
from bilect.config.training import TrainConfig, WarmupConfig

__all__ = ["TOKEN_METHODS", "Config"]


TOKEN_METHODS: tuple[Literal["random-token", "rho1", "blade"], ...] = ("random-token", "rho1", "blade")


class Config(Settings):
    """A whole run."""

    moved: ClassVar[Mapping[str, str]] = {name: f"fit.{name}" for name in ("reset_proxy", "carry_score_model")}

    seed: Annotated[int, Field(ge=0)] = Field(0, description="of every random draw")
    method: str = Field("excess", description="what documents are chosen by, see docs/methods.md")
    data: DataConfig = Field(description="text")
    models: ModelsConfig = Field(ModelsConfig(), description="proxy, target and score model")
    warmup: WarmupConfig = Field(WarmupConfig(), description="round 0")
    fit: FitConfig = Field(FitConfig(), description="of the score model of method bliss")
    selection: SelectionConfig = Field(SelectionConfig(), description="what is kept")
    training: TrainConfig = Field(TrainConfig(), description="of the target in each round")
    rounds: Positive = Field(1, description="R (paper: 4)")
    online: BladeConfig = Field(
        BladeConfig(method="full"),
        description="choice of tokens inside the training on the chosen documents (method full: none), and settings of "
        "the controls that choose tokens",
    )
    controls: tuple[str, ...] = Field(
        ("random",),
        description="arms trained on the same number of tokens for comparison: random (documents), full (the pool); "
        "random-token, rho1, blade (the pool, with tokens chosen so); or any other method of docs/methods.md, as dsir",
    )
    methods: dict[str, dict[str, Any]] = Field(
        {},
        description="settings of single methods, by name, where they differ: those of docs/methods.md, or of online",
    )
    curve: CurveConfig = Field(CurveConfig(), description="held-out losses while the arms train, for learning curves")
    compare: CompareConfig = Field(CompareConfig(), description="bilect compare: seeds, and variants of this config")
    tasks: TasksConfig = Field(TasksConfig(), description="downstream tasks, after the last round")
    score_batch_tokens: Positive = Field(8192, description="tokens per scoring batch and per evaluation batch")
    checkpoint_every: Positive = Field(500, description="steps of the fit and of training between two checkpoints")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:0 ...")
    engine: str = Field("local", description="where that work runs which workers share: local, this machine; or ray")
    workers: Positive | None = Field(
        None,
        description="processes that share tokenising, scoring, records; None: this one, or all of a Ray cluster",
    )

    @model_validator(mode="after")
    def _weights(self) -> "Config":
        if self.fit.weighting == "naive" and self.models.score_head != "sigmoid":
            raise ValueError("naive weighting needs positive scores: set models.score_head=sigmoid")
        return self

    @model_validator(mode="after")
    def _token_methods(self) -> "Config":
        for arm in TOKEN_METHODS:
            if "method" in self.methods.get(arm, {}):
                raise ValueError(f"methods.{arm}: its method is its name")
            try:
                self.online_of(arm)
            except ValidationError as error:
                raise ValueError(f"methods.{arm}: {explain_wrong(error, BladeConfig)}") from error
        return self

    @property
    def arms(self) -> tuple[str, ...]:
        """What is trained and compared: the method, then the controls."""
        return (self.method, *self.controls)

    def online_of(self, arm: Any) -> BladeConfig | None:
        """How the training of an arm chooses tokens; None where it learns all of them."""
        method = self.online.method if arm == self.method else arm
        if method not in TOKEN_METHODS:
            return None
        chosen = self.online.of(method)
        own = {} if arm == self.method else self.methods.get(arm, {})
        return BladeConfig.model_validate({**chosen.model_dump(), **own, "method": method}) if own else chosen
