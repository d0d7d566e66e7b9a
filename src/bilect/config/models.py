"""Which models take part."""

from typing import Any, Literal

from pydantic import Field

from bilect.config.base import Settings

__all__ = ["ModelsConfig"]


class ModelsConfig(Settings):
    """The three models: a preset, a directory, a Hub name, a .gguf file, or an inline config with model_type."""

    proxy: str | dict[str, Any] = Field("pythia-31m", description="small stand-in for the target (paper: 31M)")
    target: str | dict[str, Any] = Field("pythia-410m", description="the model that is finally trained")
    shard: bool = Field(
        False, description="spread what is trained or evaluated over the ranks (FSDP2): where one GPU is too small"
    )
    score_head: Literal["sigmoid", "linear"] = Field("sigmoid", description="sigmoid in the paper")
