"""What is kept of a scored shard."""

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from bilect.config.base import Fraction, NonNegative, Positive, Settings

__all__ = ["SelectionConfig"]


class SelectionConfig(Settings):
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
    output: Literal["records", "text"] = Field(
        "records",
        description="records: the kept records as they came, whole, in the format of their files, in "
        "selected/records/, beside the table with their text as the models saw it; text: that table alone",
    )
    format: Literal["parquet", "jsonl.zst"] = Field("parquet", description="of the table of kept documents")

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
