"""What leaves a run: a selection in the format of a trainer, the score model to the Hub; each with its card."""

import shutil
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from bilect.data.store import TokenStore
from bilect.data.tables import kept_file
from bilect.errors import BilectError, reason
from bilect.integrations import exporters
from bilect.integrations.exporters._card import card
from bilect.integrations.exporters._kept import Kept
from bilect.pipeline.context import open_pool
from bilect.runtime.files import flush, write_text

__all__ = ["export", "model_card", "push_to_hub"]

_OPEN = "Lines that say *fill in* are for the people who publish this: bilect knows no licences."


def export(selection: Path, to: str, out: Path, *, tokens: Path | None = None) -> dict[str, Any]:
    """Write the kept documents of a selection in another format; the folder appears when it is complete.

    Args:
        selection: folder with ``kept.parquet`` or ``kept.jsonl.zst``, or a run, of which the newest round is meant.
        to: name of the format (``bilect.integrations.exporters.names``).
        out: folder to write; must not be there, or be empty.
        tokens: folder with ``pool.json``, for formats of tokens; by default that of the run the selection lies in.

    Returns:
        ``documents`` and ``tokens`` written.

    Raises:
        BilectError: no such format or selection, a library that is missing, no text or tokens where they are needed, or
            ``out`` holds something.
    """
    write = exporters.get(to)
    kept, run = _kept(selection, tokens)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BilectError(f"export: {out} is there already; name another folder, or remove it")
    out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        folder = scratch / out.name
        folder.mkdir()
        write(kept, folder)
        sources = kept.by_source()
        figures = {"documents": sum(n for _, n, _ in sources), "tokens": sum(n for _, _, n in sources)}
        if not (folder / "README.md").exists():
            write_text(folder / "README.md", _data_card(out.name, to, run, sources, figures))
        flush(folder)
        if out.exists():
            out.rmdir()
        folder.rename(out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return figures


def model_card(run: Path) -> str:
    """README.md for the score model of a run."""
    config = _config(run)
    facts = {
        "seed": config.get("seed"),
        "upper data": _inputs(config, "upper_data"),
        "pool": _inputs(config, "lower_data"),
    }
    facts |= {"rounds": config.get("rounds"), "made by": _version()}
    return card(
        f"Score model of {run.resolve().name}",
        "Scores documents for pretraining: a higher score means that training on the document is expected to lower the "
        "loss on the upper data more. Fitted by bilevel optimisation (BLISS) with bilect.",
        facts,
        settings=yaml.safe_dump(config, sort_keys=False, allow_unicode=True),
        close=f"Scores compare documents of one pool; their scale means nothing by itself. {_OPEN}",
    )


def push_to_hub(run: Path, repo_id: str, *, private: bool = True, token: str | None = None) -> str:
    """Put the score model of a run, its tokenizer and its card on the Hugging Face Hub; returns the address.

    Args:
        run: directory of a run whose fit is done.
        repo_id: ``NAME`` or ``OWNER/NAME``; made if missing.
        private: a repository that is made is.
        token: of the Hub; by default that of ``hf auth login``.

    Raises:
        BilectError: no score model there, or the Hub refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    model, tokenizer = run / "score_model", run / "tokenizer"
    if not model.is_dir():
        raise BilectError(f"push: {run} has no score model yet; finish the run first")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        for part in (tokenizer, model):
            if part.is_dir():
                shutil.copytree(part.resolve(), folder, dirs_exist_ok=True)
        write_text(folder / "README.md", model_card(run))
        try:
            api = HfApi(token=token)
            repo = api.create_repo(repo_id, private=private, exist_ok=True, repo_type="model")
            api.upload_folder(repo_id=repo.repo_id, folder_path=folder, commit_message="Score model, by bilect")
        except (HfHubHTTPError, OSError, ValueError) as error:
            raise BilectError(f"push: the Hub refuses {repo_id!r} ({reason(error)})") from error
    return str(repo)


def _kept(selection: Path, tokens: Path | None) -> tuple[Kept, Path | None]:
    """The kept documents, and the folder of the run they are of."""
    rounds = sorted(
        selection.glob("round-*/selected"), key=lambda folder: (len(folder.parent.name), folder), reverse=True
    )
    found = next((file for folder in (selection, *rounds) if (file := kept_file(folder)) is not None), None)
    if found is None:
        raise BilectError(f"export: {selection} holds no selection (kept.parquet or kept.jsonl.zst)")
    if found.suffix == ".parquet":
        try:
            pq.read_schema(found)
        except (pa.ArrowException, OSError) as error:
            raise BilectError(f"export: {found} is not a readable Parquet file: {reason(error)}") from error
    if tokens is None:
        near = (parent / "tokens" for parent in found.resolve().parents)
        tokens = next((folder for folder in near if (folder / "pool.json").is_file()), None)
    elif not (tokens / "pool.json").is_file():
        raise BilectError(f"export: {tokens} holds no token files (pool.json)")
    if tokens is None:
        return Kept(found), None
    run = tokens.resolve().parent
    store: TokenStore = open_pool(tokens)
    return Kept(found, store, run / "tokenizer" if (run / "tokenizer" / "tokenizer.json").is_file() else None), run


def _data_card(
    name: str, to: str, run: Path | None, sources: list[tuple[str, int, int]], figures: dict[str, int]
) -> str:
    config = {} if run is None else _config(run)
    facts: dict[str, Any] = {"documents": f"{figures['documents']:,}", "tokens": f"{figures['tokens']:,}", "format": to}
    if config:
        facts |= {"run": run.name if run else "", "seed": config.get("seed"), "rounds": config.get("rounds")}
        facts |= {"chosen for": _inputs(config, "upper_data"), "chosen from": _inputs(config, "lower_data")}
    facts["made by"] = _version()
    return card(
        name,
        "Documents for pretraining, chosen by bilect: those that scored best, in order of rank.",
        facts,
        sources=sources,
        settings=yaml.safe_dump(config, sort_keys=False, allow_unicode=True) if config else "",
        close=f"The documents have the licences of where they are from. {_OPEN}",
    )


def _config(run: Path) -> dict[str, Any]:
    file = run / "config.yaml"
    return dict(yaml.safe_load(file.read_text(encoding="utf-8")) or {}) if file.is_file() else {}


def _inputs(config: dict[str, Any], role: str) -> str:
    sources = (config.get("data") or {}).get(role) or []
    sources = sources if isinstance(sources, list) else [sources]
    named = (s.get("path") or s.get("dataset") if isinstance(s, dict) else s for s in sources)
    return ", ".join(Path(str(s)).name for s in named)  # of local files, the folder is nobody's business


def _version() -> str:
    from bilect import __version__

    return f"bilect {__version__}"
