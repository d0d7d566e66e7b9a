"""LESS: documents whose Adam update points where the upper loss falls.

    score_i = sum_c rate_c sum_k w_k cos( R direction_c(grad l_i), R grad f_k )

over checkpoints c with their learning rates and upper sets k with their weights (both summing to 1); f_k is the mean
document loss of the set, R a sparse random projection (Li et al. 2006), and the gradients are those of the last
transformer blocks. ``direction``: see ``_influence``. Xia et al., arXiv 2402.04333, section 4.
"""

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from pydantic import Field, PositiveFloat, PositiveInt
from sklearn.random_projection import SparseRandomProjection
from torch import Tensor, nn

from bilect.data.tokens import TokenStore
from bilect.errors import BilectError
from bilect.functional.trees import Tree
from bilect.methods._influence import Adam, document_gradient, warm_adam
from bilect.methods.contract import DocumentMethod, Figures, Foresight, MethodConfig, Sizes
from bilect.models.causal_lm import CausalLM
from bilect.models.flops import forward_flops
from bilect.runtime import distributed
from bilect.runtime.progress import Task
from bilect.runtime.seeds import derive_seed

__all__ = ["Less", "LessCheckpoint", "LessConfig", "last_blocks"]

ROWS_AT_ONCE = 16  # gradients that are held together


class LessCheckpoint(MethodConfig):
    """One of several checkpoints of the warm-up."""

    path: str = Field(description="folder of the model, with optimizer.pt where there is one")
    learning_rate: PositiveFloat = Field(description="mean learning rate of the epoch it ends")


class LessConfig(MethodConfig):
    """Where gradients are taken, and how they are kept."""

    checkpoints: tuple[LessCheckpoint, ...] = Field((), description="of the warm-up; none: the warm proxy alone")
    blocks: PositiveInt = Field(1, description="last transformer blocks whose gradients are taken (paper: LoRA)")
    dimensions: PositiveInt = Field(8192, description="of the random projection (paper: 8192); fewer weights: none")


class Less(DocumentMethod[LessConfig]):
    """See the module."""

    name = "less"
    summary = "cosine of a document's Adam update with the upper gradient (arXiv 2402.04333)"
    Config = LessConfig
    upper_CSF = np.zeros((0, 0, 0))  # projected upper gradients, of length 1: checkpoints, sets, features

    def score(self, store: TokenStore, rows: np.ndarray) -> np.ndarray:
        """One gradient per document and checkpoint, one document at a time."""
        weight_S = np.array([weight for _, weight, _ in self.inputs.upper])
        total_R = np.zeros(len(rows))
        for (rate, lm, names, adam), upper_SF in zip(self._checkpoints(), self.upper_CSF, strict=True):
            direction_F = weight_S / weight_S.sum() @ upper_SF
            for first in range(0, len(rows), ROWS_AT_ONCE):
                documents = store.rows(rows[first : first + ROWS_AT_ONCE])
                gradients = (document_gradient(lm, d, self.inputs.pad_id, names) for d in documents)
                update_BP = torch.stack([_flat(adam.direction(g)) for g in gradients])
                total_R[first : first + ROWS_AT_ONCE] += rate * (self._project(update_BP) @ direction_F)
        return total_R

    def score_flops(self, store: TokenStore, rows: np.ndarray) -> float:
        """A forward pass, and a backward pass that is counted in full although it ends at the last blocks."""
        tokens = float(store.length_R[rows].sum())
        passes = [3 * forward_flops(lm.model, tokens, tokens / len(rows)) for _, lm, _, _ in self._checkpoints()]
        return sum(passes)

    def foresee(self, sizes: Sizes) -> Foresight:
        """All upper documents and all candidates, at each checkpoint."""
        proxy, times = sizes.proxy, 3 * max(len(self.config.checkpoints), 1)
        fit = sum(forward_flops(proxy, documents * length, length) for documents, length in sizes.upper)
        scoring = times * forward_flops(proxy, sizes.tokens, sizes.length)
        return Foresight(sizes.upper_tokens, times * fit, scoring)

    def _fit(self, task: Task) -> Figures:
        features = []
        for _, lm, names, _ in self._checkpoints():
            gradients = [self._upper_gradient(lm, names, store) for _, _, store in self.inputs.upper]
            features.append(self._project(torch.stack(gradients)))
            task.advance(1)
        self.upper_CSF = np.stack(features)
        return {"flops": sum(self.score_flops(store, np.arange(len(store))) for _, _, store in self.inputs.upper)}

    def _checkpoints(self) -> Iterator[tuple[float, CausalLM, list[str], Adam]]:
        """Learning rate (of sum 1), model, names of the parameters and optimiser of each; one in memory at a time."""
        given = [(Path(c.path), c.learning_rate) for c in self.config.checkpoints] or [(self.inputs.proxy, 1.0)]
        total = sum(rate for _, rate in given)
        for folder, rate in given:
            model = self.inputs.warm_proxy if folder == self.inputs.proxy else self.inputs.load(folder)
            lm = CausalLM(model)
            yield rate / total, lm, last_blocks(lm, self.config.blocks), warm_adam(folder, model)

    def _upper_gradient(self, lm: CausalLM, names: list[str], store: TokenStore) -> Tensor:
        params = lm.params()
        total_P = torch.zeros(sum(params[name].numel() for name in names), device=lm.device)
        for i in distributed.own_part(range(len(store))):
            total_P += _flat(document_gradient(lm, store.row(i), self.inputs.pad_id, names))
        return distributed.sum_tree({"": total_P})[""] / len(store)

    def _project(self, x_BP: Tensor) -> np.ndarray:
        """Features of length 1, float64."""
        array_BP = x_BP.double().cpu().numpy()
        if array_BP.shape[1] > self.config.dimensions:
            seed = derive_seed(self.inputs.seed, "less")
            array_BP = _projection(array_BP.shape[1], self.config.dimensions, seed).transform(array_BP)
        return array_BP / np.maximum(np.linalg.norm(array_BP, axis=1, keepdims=True), 1e-300)

    def _write(self, folder: Path) -> None:
        np.save(folder / "upper.npy", self.upper_CSF)

    def _read(self, folder: Path) -> None:
        self.upper_CSF = np.load(folder / "upper.npy")


def last_blocks(lm: CausalLM, blocks: int) -> list[str]:
    """Names of the parameters of the last transformer blocks.

    Raises:
        BilectError: the model has no list of blocks.
    """
    depth = lm.model.config.get_text_config().num_hidden_layers
    for module in lm.trunk.modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            own = {id(p) for block in module[-blocks:] for p in block.parameters()}
            return [name for name, p in lm.params().items() if id(p) in own]
    raise BilectError(f"less: {type(lm.model).__name__} has no list of {depth} blocks; use another model")


@lru_cache(maxsize=1)
def _projection(width: int, dimensions: int, seed: int) -> SparseRandomProjection:
    return SparseRandomProjection(dimensions, random_state=seed).fit(np.zeros((1, width)))


def _flat(tree: Tree) -> Tensor:
    return torch.cat([v.reshape(-1) for v in tree.values()])
