"""LitData: chunks of token ids, one stream, for ``StreamingDataset(..., item_loader=TokensLoader(block_size))``.

By LitData's own ``BinaryWriter``. Each document starts with the start token, which keeps them apart in the stream.
"""

from pathlib import Path

import numpy as np
import torch

from bilect.integrations.exporters import extra
from bilect.integrations.exporters._kept import Kept

CHUNK_BYTES = 1 << 26


def write(kept: Kept, folder: Path) -> None:
    """32-bit ids: the loader's own choice of types starts there."""
    loaders = extra("litdata.streaming.item_loader", "bilect[litdata]")
    writing = extra("litdata.streaming.writer", "bilect[litdata]")
    writer = writing.BinaryWriter(str(folder), chunk_bytes=CHUNK_BYTES, item_loader=loaders.TokensLoader())
    for index, (_, ids_T) in enumerate(kept.tokens()):
        writer[index] = torch.from_numpy(ids_T.astype(np.int32))
    writer.done()
    writer.merge()
