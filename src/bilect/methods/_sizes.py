"""What is known of a round before it begins, and what a method foresees from it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

__all__ = ["Foresight", "Sizes"]


@dataclass(frozen=True)
class Sizes:
    """What is known of a round before it begins.

    Attributes:
        proxy: its shape; no weights are needed.
        target: the same.
        score_model: the shape of a score model on the proxy's trunk, or on its first blocks where a number is given.
        documents: candidates.
        length: mean tokens of a candidate.
        upper: documents and their mean tokens, of each upper set.
        upper_length: mean tokens of an upper document, weighted as the sets are.
        sources: of the candidates.
    """

    proxy: PreTrainedModel
    target: PreTrainedModel
    score_model: Callable[[int | None], PreTrainedModel]
    documents: float
    length: float
    upper: Sequence[tuple[float, float]]
    upper_length: float
    sources: int = 1

    @property
    def tokens(self) -> float:
        """Of the candidates."""
        return self.documents * self.length

    @property
    def upper_tokens(self) -> float:
        """Of all upper sets."""
        return sum(documents * length for documents, length in self.upper)


@dataclass(frozen=True)
class Foresight:
    """What choosing in a round will cost, where data may end it sooner at most.

    Attributes:
        fit_tokens: that pass through a model in the fit.
        fit_flops: of the fit.
        score_flops: of scoring all candidates.
    """

    fit_tokens: float = 0.0
    fit_flops: float = 0.0
    score_flops: float = 0.0
