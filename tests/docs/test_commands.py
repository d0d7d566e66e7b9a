"""The commands of the pages are carried out: page by page, in order, in a reader's folder, with small models.

Left to other tests: what needs several processes or all of the machine (torchrun, make, pip, verify, demo, watch), the
scripts of examples/, and comparisons, which are planned here and carried out in tests/compare.
"""

from __future__ import annotations

import random
import shutil
import sys
from pathlib import Path

import pytest
import yaml

from bilect.cli.commands import main
from tests.corpus import WEATHER, tiny_settings, write_corpus, write_jsonl
from tests.docs.conftest import SIZES
from tests.docs.pages import ROOT, blocks, pages
from tests.docs.test_code_blocks import commands

ELSEWHERE = {("bilect", "verify"), ("bilect", "watch"), ("bilect", "demo"), ("bilect", "compare", "demo"),
             ("bilect", "compare", "examples/compare.yaml"), ("bilect", "warmup", "RUN.yaml")}  # fmt: skip
CHOICE = ["bilect", "choose", "pool/", "--target", "target.jsonl", "--out", "kept/"]
SOURCES = ("web", "books", "wiki", "forum", "code", "maths")


def lines(page: Path) -> list[list[str]]:
    found = [words for block in blocks(page, "sh") if block.not_run is None for words in commands(block)]
    return [words for words in found if words[0] == "bilect" and not {tuple(words[:2]), tuple(words[:3])} & ELSEWHERE]


PAGES = [page for page in pages() if lines(page) and page.name != "tutorial.md"]  # that has a test of its own


def write_folder(folder: Path, page: Path) -> None:
    """What the pages take for granted: pools, targets, a config, and a finished choice."""
    write_corpus(folder, 20)
    (folder / "pool.jsonl").unlink()
    (folder / "upper.jsonl").rename(folder / "target.jsonl")
    for name in ("maths", "code"):
        shutil.copy(folder / "target.jsonl", folder / f"{name}.jsonl")
    rng = random.Random(0)
    texts = [" ".join(rng.choices([*WEATHER, "sum", "root", "prime"], k=rng.randint(20, 60))) for _ in range(120)]
    pool = [{"id": f"d{i}", "text": t, "content": t, "source": SOURCES[i % 6]} for i, t in enumerate(texts)]
    for place in ("pool", "my_pool", "more"):
        (folder / place).mkdir()
        write_jsonl(folder / place / "part.jsonl", pool)
    code = [{**document, "text": f"{document['text']} end"} for document in pool[:20]]
    write_jsonl(folder / "code.jsonl", code)
    if not any(words[1:3] == ["init", "my.yaml"] for words in lines(page)):
        training = {"batch_size": 2, "steps": 4, "decay_steps": 2, "learning_rate": 5e-3}
        settings = tiny_settings(folder, warmup={"proxy": training, "target": training}, training=training)
        settings["data"] |= {"lower_data": [{"path": "pool/"}], "upper_data": [{"path": "target.jsonl"}]}
        settings["data"]["heldout_data"] = [{"path": "heldout.jsonl"}]
        (folder / "my.yaml").write_text(yaml.safe_dump({**settings, "fit": SIZES["fit"]}))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_are_carried_out(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: None, small_init: None
) -> None:
    write_folder(tmp_path, page)
    monkeypatch.chdir(tmp_path)
    before = [CHOICE] if page.name in ("run.md", "export.md") else []  # which speak of a choice that is there
    for words in (*before, *lines(page)):
        planned = ["--dry-run"] if words[1] == "compare" and "--dry-run" not in words else []
        monkeypatch.setattr(sys, "argv", [*words, *planned])
        assert ended(), " ".join(words)
        if "--out" in words and not planned and "--dry-run" not in words:
            assert any(Path(words[words.index("--out") + 1]).iterdir()), " ".join(words)


def ended() -> bool:
    """Carry out the command; whether it ended well."""
    try:
        main()
    except SystemExit as end:
        return not end.code
    return True
