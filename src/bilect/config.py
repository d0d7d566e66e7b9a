"""One tree of settings: YAML, ``key=value`` overrides, defaults with their unit and source.

An unknown key is an error that names the nearest known one.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from bilect.blade_config import BladeConfig
from bilect.compare_config import CompareConfig, CurveConfig
from bilect.errors import BilectError
from bilect.settings import apply_overrides, explain_wrong
from bilect.tasks_config import TasksConfig

__all__ = [
    "TOKEN_METHODS",
    "Config",
    "DataConfig",
    "FitConfig",
    "ModelsConfig",
    "SelectionConfig",
    "TrainConfig",
    "WarmupConfig",
    "load_config",
    "parse_config",
    "parse_selection",
    "parse_source",
]

Positive = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(gt=0, le=1)]
TOKEN_METHODS: tuple[Literal["random-token", "rho1", "blade"], ...] = ("random-token", "rho1", "blade")


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class SourceConfig(_Settings):
    """One part of the pool, or one target set; either ``path`` or ``dataset``."""

    path: str | None = Field(
        None, description="file, directory, glob or fsspec URL: .jsonl, .jsonl.gz, .jsonl.zst, .parquet, .txt"
    )
    dataset: str | None = Field(
        None, description="Hub name, or folder, that datasets.load_dataset reads (needs bilect[hub])"
    )
    subset: str | None = Field(None, description="configuration of the dataset, where it has several")
    split: str = Field("train", description="of the dataset")
    source: str | None = Field(None, description="label of its documents that carry none; default: the file's stem")
    fields: dict[Literal["text", "prompt", "response", "id", "source"], str] = Field(
        {}, description="names of the fields where they differ, such as {prompt: question, response: answer}"
    )
    weight: PositiveFloat = Field(
        1.0,
        description="pool: how often warm-up, fit and the random control see its documents per pass; "
        "upper data: weight of its mean loss in the upper objective",
    )

    @model_validator(mode="after")
    def _one_place(self) -> "SourceConfig":
        if (self.path is None) == (self.dataset is None):
            raise ValueError("give either path or dataset")
        return self


class DataConfig(_Settings):
    """Text and its tokens."""

    lower_data: tuple[SourceConfig, ...] = Field(min_length=1, description="the pool to choose from")
    upper_data: tuple[SourceConfig, ...] = Field(min_length=1, description="small target set: what good means")
    heldout_data: tuple[SourceConfig, ...] = Field(min_length=1, description="for reporting only, never for choosing")
    context: Positive = Field(1024, description="tokens; the paper uses 1024")
    long_documents: Literal["truncate", "chunk"] = Field(
        "truncate", description="documents of the pool longer than the context: keep the start, or cut into pieces"
    )
    on_bad_record: Literal["fail", "skip"] = Field(
        "fail", description="a record that cannot be used: stop, or leave it out, count it and list it"
    )
    tokenizer: str | None = Field(
        None, description="directory, Hub name or tokenizer.json; None: trained on the pool unless a model brings one"
    )
    vocab_size: Annotated[int, Field(ge=300)] = Field(4096, description="ids of a tokenizer that is trained here")


class ModelsConfig(_Settings):
    """The three models: a preset, a directory, a Hub name, or an inline config with model_type."""

    proxy: str | dict[str, Any] = Field("pythia-31m", description="small stand-in for the target (paper: 31M)")
    target: str | dict[str, Any] = Field("pythia-410m", description="the model that is finally trained")
    score_head: Literal["sigmoid", "linear"] = Field("sigmoid", description="sigmoid in the paper")


class TrainConfig(_Settings):
    """Plain training of a language model."""

    steps: Positive = Field(10_000, description="optimiser steps per round (paper: 10k)")
    batch_size: Positive = Field(16, description="documents per step and rank, accumulation included")
    gradient_accumulation: Positive = Field(1, description="micro-batches per step")
    learning_rate: PositiveFloat = Field(1e-3, description="of AdamW")
    schedule: Literal["constant", "cosine"] = Field("constant", description="after the warm-up (paper: constant)")
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.1, description="of the steps, in the first training only"
    )
    decay_steps: Annotated[int, Field(ge=0)] = Field(
        200, description="for evaluation only, a copy is decayed to zero over so many steps (paper: 200)"
    )
    weight_decay: NonNegative = Field(0.1, description="of AdamW")
    grad_clip: PositiveFloat = Field(1.0, description="greatest gradient norm (paper: 1.0)")
    bf16: bool = Field(False, description="mixed precision")
    report_to: tuple[str, ...] = Field((), description="trackers of the transformers Trainer, such as tensorboard")

    @model_validator(mode="after")
    def _divisible(self) -> "TrainConfig":
        if self.batch_size % self.gradient_accumulation:
            raise ValueError(f"batch_size {self.batch_size} is not a multiple of {self.gradient_accumulation}"
                             " (gradient_accumulation)")  # fmt: skip
        return self


class WarmupConfig(_Settings):
    """Round 0: proxy and target train on random documents of the pool."""

    share: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.25, description="of the pool, set aside for the warm-up; the rest is divided between the rounds"
    )
    proxy: TrainConfig = Field(TrainConfig(decay_steps=0), description="of the proxy")
    target: TrainConfig = Field(TrainConfig(), description="of the target")


class FitConfig(_Settings):
    """The bilevel fit of the score model."""

    steps: Positive = Field(3000, description="score-model steps per round (paper: 3000)")
    sample_fraction: Fraction = Field(
        1.0, description="share of the shard that the fit draws its lower batches from (paper: 0.001 of C4)"
    )
    lower_batch_size: Annotated[int, Field(ge=2)] = Field(16, description="documents, over all ranks")
    upper_batch_size: Positive = Field(16, description="documents, over all ranks")
    inner_steps: Positive = Field(1, description="proxy steps per score step (paper: 1 or 5)")
    proxy_learning_rate: PositiveFloat = Field(1e-5, description="paper: 1e-5")
    score_learning_rate: PositiveFloat = Field(1e-5, description="paper: 1e-5")
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = Field(0.1, description="of the cosine schedule (paper: 0.1)")
    weight_decay: NonNegative = Field(0.01, description="of both AdamW")
    grad_clip: PositiveFloat = Field(1.0, description="of proxy and score model (paper: 1.0)")
    weighting: Literal["softmax", "naive"] = Field("softmax", description="over the global batch (paper: softmax)")
    standardise: bool = Field(True, description="bring d to deviation 1 per batch; ours, see docs/design.md")
    kl_coef: NonNegative = Field(0.1, description="divergence from the target (paper: 1e-2..5e-1); 0 is off")
    kl_direction: Literal["target_to_proxy", "proxy_to_target"] = Field(
        "target_to_proxy", description="as in the released code; the paper prints the other"
    )
    l2_coef: NonNegative = Field(1e-7, description="paper: 1e-7")
    hypergradient: Literal["implicit", "penalty"] = Field(
        "implicit", description="through a linear solve (paper), or from two first-order models (BLADE)"
    )
    solver: Literal["identity", "adam", "neumann", "cg", "sgd"] = Field(
        "adam", description="of the implicit hypergradient (paper: sgd)"
    )
    solver_steps: Positive = Field(3, description="Hessian products of neumann, cg and sgd (paper: 3)")
    solver_step_size: PositiveFloat | None = Field(
        None, description="None: 1 over the Hessian's norm, measured (neumann), 1e-2 (sgd; as in the paper)"
    )
    damping: NonNegative | None = Field(
        None, description="added to the Hessian's diagonal; None: a tenth of its norm, measured (cg), 0 (others)"
    )
    hvp: Literal["exact", "finite_difference", "forward_difference"] = Field(
        "finite_difference", description="forward_difference costs half, and is right to about 1e-2"
    )
    directional: Literal["jvp", "finite_difference", "ghost"] = Field(
        "finite_difference", description="how d is had without gradients of single documents"
    )
    baseline: Literal["matched", "model"] = Field("matched", description="m: the matched twin, or the model itself")
    penalty: PositiveFloat = Field(1.0, description="lambda")
    sync_every: Positive = Field(20, description="score steps between two synchronisations of the twins")
    reference_steps: Positive = Field(10, description="K, steps of the twins at each synchronisation")
    reference_learning_rate: PositiveFloat | None = Field(
        None, description="of the twins; None: the proxy's. A tenth of it is safer: docs/results_log.md, 4"
    )
    bf16: bool = Field(False, description="forward passes and inner steps in bfloat16; solves stay float32")
    log_every: Positive = Field(
        10, description="score steps between two measurements of the solver's residual and the Hessian's norm"
    )
    target_micro_batch: Positive = Field(16, description="documents per forward pass of the target model")

    @model_validator(mode="after")
    def _consistent(self) -> "FitConfig":
        if self.reference_steps > 10 * self.steps:
            raise ValueError("reference_steps is more than ten times the steps of the fit")
        return self


class SelectionConfig(_Settings):
    """How much of a scored shard is kept: exactly one of keep_ratio, budget_tokens and top_k; and from where."""

    keep_ratio: Fraction | None = Field(0.2, description="share of the tokens (paper: 0.2)")
    budget_tokens: Positive | None = Field(None, description="tokens per round")
    top_k: Positive | None = Field(None, description="documents per round")
    temperature: NonNegative = Field(
        0.0, description="of Gumbel noise added to the scores: a sample without replacement; 0 is the plain top"
    )
    min_share: dict[str, Fraction] = Field(
        {}, description="source: least share of the kept tokens (documents, with top_k)"
    )
    max_share: dict[str, Fraction] = Field(
        {}, description="source: greatest share; '*' stands for every source that is not named"
    )
    max_per_cluster: Positive | None = Field(
        None, description="documents kept of each cluster of near-duplicates, and seen of it by the random control"
    )
    cluster_similarity: Annotated[float, Field(ge=0.5, le=1)] = Field(
        0.8, description="Jaccard index of word 5-grams from which two documents are near-duplicates"
    )
    format: Literal["parquet", "jsonl.zst"] = Field("parquet", description="of the kept documents")

    @model_validator(mode="before")
    @classmethod
    def _one(cls, values: Any) -> Any:
        if isinstance(values, Mapping):
            given = [k for k in ("keep_ratio", "budget_tokens", "top_k") if values.get(k) is not None]
            if len(given) > 1:
                raise ValueError(f"give one of keep_ratio, budget_tokens and top_k, not {' and '.join(given)}")
            if given and given != ["keep_ratio"]:
                return {**values, "keep_ratio": None}
        return values

    @model_validator(mode="after")
    def _shares(self) -> "SelectionConfig":
        if self.keep_ratio is self.budget_tokens is self.top_k is None:
            raise ValueError("give keep_ratio, budget_tokens or top_k")
        if sum(self.min_share.values()) > 1 + 1e-9:
            raise ValueError(f"the shares in min_share add up to {sum(self.min_share.values()):g}, more than 1")
        for source, least in self.min_share.items():
            if least > self.max_share.get(source, self.max_share.get("*", 1.0)):
                raise ValueError(f"min_share of {source!r} is greater than its max_share")
        return self

    def budget(self, pool_tokens: int) -> float:
        """Tokens to keep out of ``pool_tokens``; without bound under ``top_k``."""
        if self.top_k is not None:
            return math.inf
        return float(self.budget_tokens) if self.budget_tokens is not None else (self.keep_ratio or 0.0) * pool_tokens


class Config(_Settings):
    """A whole run."""

    seed: Annotated[int, Field(ge=0)] = Field(0, description="of every random draw")
    data: DataConfig = Field(description="text")
    models: ModelsConfig = Field(ModelsConfig(), description="proxy, target and score model")
    warmup: WarmupConfig = Field(WarmupConfig(), description="round 0")
    fit: FitConfig = Field(FitConfig(), description="of the score model")
    selection: SelectionConfig = Field(SelectionConfig(), description="what is kept")
    training: TrainConfig = Field(TrainConfig(), description="of the target in each round")
    rounds: Positive = Field(1, description="R (paper: 4)")
    reset_proxy: bool = Field(True, description="every round starts from the warmed-up proxy (paper: yes)")
    carry_score_model: bool = Field(True, description="the score model carries over between rounds (paper: yes)")
    online: BladeConfig = Field(
        BladeConfig(method="full"),
        description="choice of tokens inside the training on the chosen documents (method full: none), and settings of "
        "the controls that choose tokens",
    )
    controls: tuple[str, ...] = Field(
        ("random",),
        description="arms trained on the same number of tokens for comparison: random (documents), full (the pool); "
        "random-token, rho1, blade (the pool, with tokens chosen so); or another method of docs/methods.md, as dsir",
    )
    methods: dict[str, dict[str, Any]] = Field(
        {},
        description="settings of single controls, by name, where they differ: those of docs/methods.md, or of online",
    )
    curve: CurveConfig = Field(CurveConfig(), description="held-out losses while the arms train, for learning curves")
    compare: CompareConfig = Field(CompareConfig(), description="bilect compare: seeds, and variants of this config")
    tasks: TasksConfig = Field(TasksConfig(), description="downstream tasks, after the last round")
    score_batch_tokens: Positive = Field(8192, description="tokens per scoring batch and per evaluation batch")
    checkpoint_every: Positive = Field(500, description="steps of the fit and of training between two checkpoints")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:0 ...")

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

    def online_of(self, arm: Any) -> BladeConfig | None:
        """How the training of an arm ("bliss" or a control) chooses tokens; None where it learns all of them."""
        method = self.online.method if arm == "bliss" else arm
        if method not in TOKEN_METHODS:
            return None
        chosen = self.online.of(method)
        own = {} if arm == "bliss" else self.methods.get(arm, {})
        return BladeConfig.model_validate({**chosen.model_dump(), **own, "method": method}) if own else chosen


def parse_config(values: Mapping[str, Any]) -> Config:
    """A checked config from plain values.

    Raises:
        BilectError: one line that names the first wrong setting.
    """
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise BilectError(explain_wrong(error, Config)) from error


def parse_selection(values: Mapping[str, Any]) -> SelectionConfig:
    """Checked settings of a selection alone; as ``parse_config``."""
    try:
        return SelectionConfig.model_validate(values)
    except ValidationError as error:
        raise BilectError(f"selection: {explain_wrong(error, SelectionConfig)}") from error


def parse_source(values: Mapping[str, Any]) -> SourceConfig:
    """One checked source alone; as ``parse_config``."""
    try:
        return SourceConfig.model_validate(values)
    except ValidationError as error:
        raise BilectError(f"data: {explain_wrong(error, SourceConfig)}") from error


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """A config from a YAML file and ``key.path=value`` overrides (values are YAML).

    Raises:
        BilectError: no such file, not YAML, or a wrong setting.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BilectError(f"config: cannot read {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BilectError(f"config: {path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise BilectError(f"config: {path} must hold a mapping of settings")
    return parse_config(apply_overrides(values, overrides))
