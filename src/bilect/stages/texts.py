"""Text to tokens: the pool, the upper data and the held-out sets."""

from itertools import islice
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from bilect.data.documents import file_identity, input_files, read_documents
from bilect.data.tokens import TokenStore, write_tokens
from bilect.errors import BilectError
from bilect.models.loading import load_tokenizer, train_tokenizer
from bilect.models.presets import PRESETS
from bilect.runtime import distributed
from bilect.stages.context import Figures, RunContext

__all__ = ["input_hashes", "tokenise_pool", "tokenise_targets"]


def input_hashes(run: RunContext) -> dict[str, dict[str, str]]:
    """Identity of every input file, by role: its content's hash where it is local, its size elsewhere."""
    data = run.config.data
    roles = {"lower_data": data.lower_data, "upper_data": data.upper_data, "heldout_data": data.heldout_data}
    return {role: {f: file_identity(f) for s in part for f in input_files(s)} for role, part in roles.items()}


def tokenise_pool(run: RunContext, scratch: Path) -> Figures:
    """Tokenizer and token file of the pool."""
    if not distributed.is_main():
        return {}
    data = run.config.data
    with run.progress.task("tokenise the pool") as task:
        tokenizer = _make_tokenizer(run)
        tokenizer.save_pretrained(scratch / "tokenizer")
        file = scratch / "tokens" / "pool.arrow"
        file.parent.mkdir(exist_ok=True)
        rows = write_tokens(
            read_documents(data.lower_data),
            tokenizer,
            file,
            context=data.context,
            chunk=data.long_documents == "chunk",
            on_rows=task.advance,
        )
    batches, size = run.config.rounds + 1, run.config.fit.lower_batch_size
    if rows < batches * size:
        raise BilectError(f"data: the pool has {rows} documents, fewer than {batches} batches of {size}; add documents "
                          "or lower fit.lower_batch_size")  # fmt: skip
    return {"tokens": int(TokenStore(file).length_R.sum()), "documents": rows, "flops": 0.0}


def tokenise_targets(run: RunContext, scratch: Path) -> Figures:
    """Token files of the upper data and of each held-out set, which must not share a document."""
    if not distributed.is_main():
        return {}
    data, tokenizer, folder = run.config.data, run.tokenizer, scratch / "tokens"
    (folder / "heldout").mkdir(parents=True, exist_ok=True)
    with run.progress.task("tokenise the target sets") as task:
        upper = list(read_documents(data.upper_data))
        write_tokens(upper, tokenizer, folder / "upper.arrow", context=data.context, on_rows=task.advance)
        upper_texts = {d.text for d in upper}
        for source in data.heldout_data:
            documents = list(read_documents((source,)))
            shared = [d.doc_id for d in documents if d.text in upper_texts]
            if shared:
                raise BilectError(f"data: held-out document {shared[0]} is in upper_data too ({len(shared)} in all)")
            name = source.source or Path(source.path).name.split(".")[0]
            file = folder / "heldout" / f"{name}.arrow"
            write_tokens(documents, tokenizer, file, context=data.context, on_rows=task.advance)
    return {"tokens": int(TokenStore(folder / "upper.arrow").length_R.sum()), "flops": 0.0}


def _make_tokenizer(run: RunContext) -> PreTrainedTokenizerBase:
    data, models = run.config.data, run.config.models
    if data.tokenizer is not None:
        return load_tokenizer(data.tokenizer)
    for spec in (models.target, models.proxy):
        if isinstance(spec, str) and spec not in PRESETS:
            return load_tokenizer(spec)
    texts = (d.text for d in islice(read_documents(data.lower_data), 100_000))
    return train_tokenizer(texts, data.vocab_size)
