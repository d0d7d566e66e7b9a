"""The bilevel fit of a score model."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, model_validator

from bilect.config.base import Fraction, NonNegative, Positive, PositiveFloat, Settings

__all__ = ["FitConfig"]


class FitConfig(Settings):
    """The bilevel fit of the score model."""

    steps: Positive = Field(3000, description="score-model steps per round (paper: 3000)")
    sample_fraction: Fraction = Field(
        1.0, description="share of the shard that the fit draws its lower batches from (paper: 0.001 of C4)"
    )
    lower_batch_size: Annotated[int, Field(ge=2)] = Field(16, description="documents, over all ranks")
    upper_batch_size: Positive = Field(16, description="documents, over all ranks")
    reset_proxy: bool = Field(True, description="every round starts from the warmed-up proxy (paper: yes)")
    carry_score_model: bool = Field(True, description="the score model carries over between rounds (paper: yes)")
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
    learn: Literal["policy", "regression"] = Field(
        "policy", description="scores follow the policy gradient (paper), or predict d; regression wants a linear head"
    )
    replays: NonNegativeInt = Field(4, description="earlier batches that each step of the regression sees again")
    hypergradient: Literal["implicit", "penalty"] = Field(
        "implicit", description="through a linear solve (paper), or from two first-order models (BLADE)"
    )
    solver: str = Field("adam", description="of the implicit hypergradient: identity, adam, neumann, cg, sgd (paper)")
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
