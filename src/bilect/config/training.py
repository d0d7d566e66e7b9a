"""Plain training of a language model, and the warm-up."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from bilect.config.base import NonNegative, Positive, PositiveFloat, Settings

__all__ = ["TrainConfig", "WarmupConfig"]


class TrainConfig(Settings):
    """Plain training of a language model."""

    steps: Annotated[int, Field(ge=0)] = Field(
        10_000, description="optimiser steps per round (paper: 10k); 0, in the warm-up alone, takes the model as it is"
    )
    batch_size: Positive = Field(
        16, description="sequences of data.context tokens per step, over all ranks and micro-batches"
    )
    gradient_accumulation: Positive = Field(1, description="micro-batches per step and rank")
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

    @property
    def branch_steps(self) -> int:
        """Of the decay branch; none where the model is taken as it is."""
        return self.decay_steps if self.steps else 0

    @model_validator(mode="after")
    def _divisible(self) -> "TrainConfig":
        if self.batch_size % self.gradient_accumulation:
            raise ValueError(f"batch_size {self.batch_size} is not a multiple of {self.gradient_accumulation}"
                             " (gradient_accumulation)")  # fmt: skip
        return self


class WarmupConfig(Settings):
    """Round 0: proxy and target train on random documents of the pool."""

    share: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.25, description="of the pool, set aside for the warm-up; the rest is divided between the rounds"
    )
    candidates: bool = Field(False, description="whether the documents of the warm-up can be chosen later on too")
    proxy: TrainConfig = Field(TrainConfig(decay_steps=0), description="of the proxy")
    target: TrainConfig = Field(TrainConfig(), description="of the target")
