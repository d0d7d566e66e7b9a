"""Megatron: ``kept.bin`` and ``kept.idx``, one document each with an end-of-document mark, for ``IndexedDataset``.

By Megatron-core's own ``IndexedDatasetBuilder``. Ids are 16 bits wide where the vocabulary has fewer than 65,500
tokens, else 32, as there. Each document starts with the start token, as it was scored; none is added at its end.
"""

from pathlib import Path

import numpy as np
import torch

from bilect.integrations.exporters import extra
from bilect.integrations.exporters._kept import Kept


def write(kept: Kept, folder: Path) -> None:
    """``--data-path FOLDER/kept`` there."""
    indexed = extra("megatron.core.datasets.indexed_dataset", "bilect[megatron]")
    dtype = indexed.DType.optimal_dtype(kept.vocabulary)
    builder = indexed.IndexedDatasetBuilder(str(folder / "kept.bin"), dtype=dtype)
    for _, ids_T in kept.tokens():
        builder.add_document(torch.from_numpy(ids_T.astype(np.int64)), [len(ids_T)])
    builder.finalize(str(folder / "kept.idx"))
