"""Models and tokenizers that cannot be used: one line that says which and why."""

import pytest
import torch

from bilect.errors import BilectError
from bilect.models.checks import check_vocabulary
from bilect.models.loading import load_causal_lm, load_score_model, train_tokenizer
from bilect.models.score_model import ScoreModel
from tests.corpus import TINY

DAMAGES = {
    "truncated": ("model.safetensors", lambda data: data[: len(data) // 2], "incomplete metadata"),
    "garbage": ("model.safetensors", lambda data: b"garbage" * 10, "header"),
    "empty": ("model.safetensors", lambda data: b"", "header too small"),
    "no JSON": ("config.json", lambda data: data[:-20], "not a valid JSON"),
    "no mapping": ("config.json", lambda data: b"[]", "."),
    "another size": (
        "config.json",
        lambda data: data.replace(b'"hidden_size": 16', b'"hidden_size": 24'),
        "of another",
    ),
    "a layer lacks": (
        "config.json",
        lambda data: data.replace(b'"num_hidden_layers": 1', b'"num_hidden_layers": 2'),
        "weights missing: .*layers.1.* and 11 more",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("kind", ["model", "score model"])
def test_a_broken_checkpoint_is_one_line(tmp_path, capfd, kind, damage):
    network = load_causal_lm(TINY, vocab_size=64)
    if kind == "score model":
        network = ScoreModel.from_causal_lm(network, torch.Generator().manual_seed(0))
    network.save_pretrained(tmp_path)
    capfd.readouterr()
    name, change, message = DAMAGES[damage]
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(change(data))
    assert (tmp_path / name).read_bytes() != data
    load = load_causal_lm if kind == "model" else load_score_model
    with pytest.raises(BilectError, match=rf"^{kind}: cannot load '{tmp_path}': .*{message}") as caught:
        load(str(tmp_path) if kind == "model" else tmp_path)
    assert "\n" not in str(caught.value)
    assert "REPORT" not in "".join(capfd.readouterr())


def test_missing_weights_are_one_line(tmp_path):
    load_causal_lm(TINY, vocab_size=64).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(BilectError, match=f"cannot load '{tmp_path}': .*model.safetensors"):
        load_causal_lm(str(tmp_path))
    with pytest.raises(BilectError, match="no directory /nowhere/model"):
        load_score_model(tmp_path.__class__("/nowhere/model"))


@pytest.mark.parametrize("tied", [True, False])
def test_what_was_saved_loads(tmp_path, tied):
    saved = load_causal_lm({**TINY, "tie_word_embeddings": tied}, vocab_size=64, seed=3)
    saved.save_pretrained(tmp_path)
    for p, q in zip(saved.parameters(), load_causal_lm(str(tmp_path)).parameters(), strict=True):
        assert torch.equal(p, q)


def test_the_vocabulary_of_a_pretrained_model_is_that_of_the_run(tmp_path):
    same, other = train_tokenizer(["the sun and the rain"] * 9, 300), train_tokenizer(["prime lemma proof"] * 9, 300)
    assert len(same) == len(other)  # that alone would not tell
    check_vocabulary("models.proxy", str(tmp_path), same, "run/tokenizer")  # brings none
    same.save_pretrained(tmp_path)
    check_vocabulary("models.proxy", str(tmp_path), same, "run/tokenizer")
    with pytest.raises(BilectError, match=rf"^models.proxy: the tokenizer of {tmp_path} .* run/tokenizer") as caught:
        check_vocabulary("models.proxy", str(tmp_path), other, "run/tokenizer")
    assert "\n" not in str(caught.value)
    (tmp_path / "tokenizer.json").write_text("{half")
    with pytest.raises(BilectError, match=f"^tokenizer: cannot load '{tmp_path}'"):
        check_vocabulary("models.proxy", str(tmp_path), same, "run/tokenizer")
