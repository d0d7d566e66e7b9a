"""Adapters beside all weights: the table by hand, and a training of each arm on a run's own documents."""

import json
import sys

import pytest
from torch import equal

from benchmarks import lora
from bilect.config import parse_config
from bilect.models.loading import load_causal_lm
from bilect.pipeline.stages import run
from tests.corpus import tiny_settings, write_corpus


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    write_corpus(folder)
    values = tiny_settings(folder, controls=[])
    values["training"] |= {"steps": 60, "decay_steps": 0, "schedule": "cosine"}
    values["warmup"]["target"] |= {"decay_steps": 0}
    values["models"]["target"] = {
        "model_type": "llama",
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "tie_word_embeddings": True,
    }
    values["online"] = {"sync_every": 4, "reference_steps": 3, "upper_batch_size": 2}
    run(parse_config(values), folder / "run", command="train", arms=["full", "blade"])
    return folder / "run"


def test_arms_of_a_run_once_more_with_adapters(trained, tmp_path, monkeypatch, capsys):
    words = ["lora", str(trained), "--rank", "2", "--learning-rate", "0.003", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", words)
    lora.main()
    first = capsys.readouterr().out
    full, blade = (json.loads((tmp_path / f"{arm}-0-2-0.003.json").read_text()) for arm in ("full", "blade"))
    warm, own = (json.loads((trained / p).read_text())["heldout"]["loss"]
                 for p in ("warmup/eval.json", "controls/full/round-1/eval.json"))  # fmt: skip
    assert full["trained"] == 2 * (4 * (16 + 16) + 3 * (16 + 32))  # rank 2, four square matrices and three others
    assert full["heldout"] < warm and full["heldout"] != blade["heldout"] and full["heldout"] != own
    for line in (f"| full | all weights | {own:.4f} |", f"| warm | - | {warm:.4f} |",
                 f"| full | LoRA, rank 2, 0.003 | {full['heldout']:.4f} |"):  # fmt: skip
        assert line in first
    monkeypatch.setattr(lora, "adapted", None)  # nothing is trained twice
    lora.main()
    assert capsys.readouterr().out in first


def test_the_runs_own_weights_stay(trained, tmp_path):
    before = load_causal_lm(str(trained / "warmup/target")).state_dict()
    context = lora.RunContext(trained, lora.load_config(trained / "config.yaml"), lora.SilentProgress())
    once, again = (lora.adapted(context, "full", 2, 0.01, tmp_path / name) for name in "ab")
    assert once["heldout"] == again["heldout"]
    after = load_causal_lm(str(trained / "warmup/target")).state_dict()
    assert all(equal(before[name], after[name]) for name in before)


def test_losses_are_less_those_of_all_tokens_with_as_many_weights():
    found = {
        ("warm", ""): {0: {"math": 2.0}, 1: {"math": 2.0}},
        ("full", "LoRA"): {0: {"math": 1.8, "seconds": 10.0}, 1: {"math": 1.9, "seconds": 12.0}},
        ("blade", "LoRA"): {0: {"math": 1.5, "seconds": 20.0}, 1: {"math": 1.6, "seconds": 20.0}},
        ("full", "all weights"): {0: {"math": 1.0}},
        ("blade", "all weights"): {0: {"math": 1.25}},
    }
    assert lora.table(found)[2:] == [
        "| warm | - | 2.0000, 2.0000 | - | - |",
        "| blade | LoRA | 1.5000, 1.6000 | -0.300 ± 0.000 | 20 |",
        "| full | LoRA | 1.8000, 1.9000 | - | 11 |",
        "| blade | all weights | 1.2500 | +0.250 | - |",
        "| full | all weights | 1.0000 | - | - |",
    ]


def test_a_run_with_a_decay_branch_is_refused(tmp_path, monkeypatch, capsys):
    write_corpus(tmp_path)
    values = tiny_settings(tmp_path, controls=[])
    values["training"] |= {"steps": 8, "decay_steps": 2}
    run(parse_config(values), tmp_path / "run", command="train", arms=["full"])
    monkeypatch.setattr(sys, "argv", ["lora", str(tmp_path / "run"), "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as end:
        lora.main()
    assert end.value.code == 2 and "decay_steps: 0" in capsys.readouterr().err
