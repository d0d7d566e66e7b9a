"""Methods whose scores come from a fitted score model."""

from pathlib import Path

import numpy as np

from bilect.data.tokens import TokenStore
from bilect.methods.contract import C, DocumentMethod, Sizes
from bilect.models.flops import forward_flops
from bilect.models.loading import load_score_model
from bilect.models.score_model import ScoreModel
from bilect.selection.scoring import score_rows

__all__ = ["ScoreModelMethod"]


class ScoreModelMethod(DocumentMethod[C]):
    """``_fit`` sets ``score_model``; saved, it loads with ``transformers.AutoModel`` like any model."""

    score_model: ScoreModel

    def score(self, store: TokenStore, rows: np.ndarray) -> np.ndarray:
        """The score model's."""
        inputs = self.inputs
        scores = score_rows(
            self.score_model, store, rows, inputs.pad_id, batch_tokens=inputs.batch_tokens, bf16=inputs.bf16
        )
        return scores.astype(np.float64)

    def score_flops(self, store: TokenStore, rows: np.ndarray) -> float:
        """A forward pass of the score model."""
        tokens = float(store.length_R[rows].sum())
        return forward_flops(self.score_model, tokens, tokens / len(rows))

    def _foreseen_scoring(self, sizes: Sizes, layers: int | None = None) -> float:
        return forward_flops(sizes.score_model(layers), sizes.tokens, sizes.length)

    def _write(self, folder: Path) -> None:
        self.score_model.save_pretrained(folder / "score_model")

    def _read(self, folder: Path) -> None:
        self.score_model = load_score_model(folder / "score_model").to(self.inputs.device)
