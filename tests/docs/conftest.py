"""A folder in which the documentation's blocks run as they stand: a small pool, a target, a config, tiny models."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import bilect
from tests.corpus import TINY, tiny_settings, write_corpus
from tests.docs.pages import ROOT

MODEL = {**TINY, "max_position_embeddings": 64}


SIZES: dict[str, Any] = {
    "data": {"context": 48, "vocab_size": 320},
    "models": {"proxy": MODEL, "target": MODEL},
    "warmup": {"proxy": {"steps": 4, "batch_size": 2}},
    "fit": {"steps": 4, "lower_batch_size": 4, "upper_batch_size": 2, "reference_steps": 1},
    "device": "cpu",
}


@pytest.fixture(scope="module")
def small() -> Iterator[None]:
    """`bilect.choose` is sized for seconds."""
    from bilect.pipeline import choose

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choose, "_CPU", SIZES)
        patch.setattr(choose, "_GPU", SIZES)
        yield


@pytest.fixture
def small_init(monkeypatch: pytest.MonkeyPatch) -> None:
    """`bilect init` starts from settings sized for seconds."""
    from bilect.config import template

    starting_values = template.starting_values

    def tiny(*roles: Any) -> dict[str, Any]:
        training = {"steps": 4, "batch_size": 2, "decay_steps": 2}
        changes = {"models": SIZES["models"], "training": training, "warmup": {"proxy": training, "target": training}}
        values = starting_values(*roles)
        return {**values, **changes, "data": {**values["data"], "context": 48, "vocab_size": 320}}

    monkeypatch.setattr(template, "starting_values", tiny)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory, small: None) -> Path:
    """With a finished choice, `kept/`, and a finished run, `runs/mine`."""
    folder = tmp_path_factory.mktemp("docs")
    write_corpus(folder / "corpus", pool=90)
    for name, place in (("pool", "pool"), ("pool", "more"), ("upper", "."), ("heldout", ".")):
        target = folder / place / ("target.jsonl" if name == "upper" else f"{name}.jsonl")
        target.parent.mkdir(exist_ok=True)
        shutil.copy(folder / "corpus" / f"{name}.jsonl", target)
    training = {"batch_size": 2, "steps": 4, "decay_steps": 2, "learning_rate": 5e-3}
    changes = {"warmup": {"proxy": training, "target": training}, "training": training, "fit": SIZES["fit"]}
    settings = tiny_settings(folder, **changes)
    data = {**settings["data"], "lower_data": [{"path": "pool/"}], "upper_data": [{"path": "target.jsonl"}]}
    data["heldout_data"] = [{"path": "heldout.jsonl"}]
    (folder / "my.yaml").write_text(yaml.safe_dump({**settings, "data": data}))
    (folder / "examples").symlink_to(ROOT / "examples")
    with pytest.MonkeyPatch.context() as patch:  # as the pages have it, so that theirs find it done
        patch.chdir(folder)
        bilect.choose("pool/", target="target.jsonl", keep=0.2, out="kept/")
        bilect.run(bilect.load_config(Path("my.yaml")), Path("runs/mine"))
    return folder


@pytest.fixture
def reader(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The reader's terminal is in that folder."""
    monkeypatch.chdir(workspace)
    return workspace


def names() -> dict[str, Any]:
    """What the pages take for granted in a reader's own training script."""
    from bilect.models.loading import load_causal_lm

    model = load_causal_lm(MODEL, vocab_size=64)
    rows = torch.randint(1, 64, (12, 2, 16), generator=torch.Generator().manual_seed(0))
    batches = [{"input_ids": ids, "labels": ids} for ids in rows]
    return {
        "model": model, "pool": batches[:6], "batch": batches[0], "upper_loader": batches[6:], "learning_rate": 1e-3,
        "optimizer": torch.optim.AdamW(model.parameters(), lr=1e-3), "torch": torch, "json": json, "os": os,
    }  # fmt: skip
