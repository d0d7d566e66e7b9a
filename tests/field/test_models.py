"""What people's models are like: padded vocabularies, added tokens, short contexts, GGUF files."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from bilect.config import FitConfig
from bilect.errors import BilectError
from bilect.functional.trees import Tree
from bilect.models import checks
from bilect.models.causal_lm import CausalLM, share_vocabulary
from bilect.models.checks import check_models
from bilect.models.loading import (
    extend_vocabulary,
    load_causal_lm,
    load_tokenizer,
    read_config,
    train_tokenizer,
)
from tests.corpus import TINY
from tests.helpers import batch_of, documents, tiny_lm

TOKENIZER = train_tokenizer(["the sun and the rain over the hills"] * 9, 300)


def saved(folder: Path, rows: int = 320, positions: int = 64, tokenizer: Any = TOKENIZER, **more: Any) -> str:
    load_causal_lm({**TINY, "max_position_embeddings": positions, **more}, vocab_size=rows).save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return str(folder)


def refused(spec: Any, tokenizer: Any = TOKENIZER, context: int = 64) -> str:
    with pytest.raises(BilectError) as caught:
        check_models({"models.proxy": spec}, tokenizer, context=context, place="run/tokenizer")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_models_of_one_tokenizer_are_accepted_without_reading_weights(tmp_path: Path) -> None:
    padded = TOKENIZER.__class__.from_pretrained(saved(tmp_path / "a"))
    padded.add_special_tokens({"pad_token": "<pad>"})
    b = saved(tmp_path / "b", 384, tokenizer=padded)
    for file in (tmp_path / "a" / "model.safetensors", tmp_path / "b" / "model.safetensors"):
        file.write_bytes(b"not weights")
    models = {"models.proxy": str(tmp_path / "a"), "models.target": b, "other": TINY, "preset": "tiny-100k"}
    for tokenizer in (TOKENIZER, padded, str(tmp_path / "a")):
        check_models(models, tokenizer, context=64, place="run/tokenizer")
    check_models(models, None, context=None, place="")


def test_a_context_longer_than_the_positions(tmp_path: Path) -> None:
    spec = saved(tmp_path, positions=32)
    assert refused(spec, context=33) == (
        f"models.proxy: {spec} has 32 positions, the context is 33 tokens; set data.context=32 or less, or use a model "
        "with more"
    )
    check_models({"models.proxy": spec}, TOKENIZER, context=32, place="")
    check_models({"models.proxy": {**TINY, "max_position_embeddings": 8}}, TOKENIZER, context=32, place="")
    for kind, name in ("gpt2", "n_positions"), ("bloom", None):
        tiny = {"model_type": kind, "hidden_size": 16, "n_layer": 1, "n_head": 2, **({name: 16} if name else {})}
        config = read_config(tiny, context=64)
        assert checks.positions(config) == (64 if name else None)


def test_other_tokenizers_and_models_that_are_none(tmp_path: Path) -> None:
    other = train_tokenizer(["prime lemma proof"] * 9, 300)
    told = refused(saved(tmp_path / "a"), other)
    assert "differs from the run's in run/tokenizer" in told and " in one and " in told
    longer = train_tokenizer(["the sun and the rain over the hills, prime lemma"] * 9, 320)
    assert "differs" in refused(saved(tmp_path / "b"), longer)
    clash = load_tokenizer(str(tmp_path / "a"))
    clash.add_special_tokens({"pad_token": "<pad>"})
    other_clash = load_tokenizer(str(tmp_path / "a"))
    other_clash.add_special_tokens({"pad_token": "[PAD]"})
    spec = saved(tmp_path / "c", tokenizer=clash)
    assert f"id {len(TOKENIZER)} is '<pad>' in one and '[PAD]' in the other" in refused(spec, other_clash)
    assert "vocabulary of 64 is smaller than the tokenizer's" in refused(saved(tmp_path / "d", 64, tokenizer=None))
    (tmp_path / "a" / "model.safetensors").unlink()
    assert "no *.safetensors" in refused(str(tmp_path / "a"))
    assert "no directory ./nowhere" in refused("./nowhere")
    assert "needs model_type" in refused({"hidden_size": 3})
    assert "is no causal LM" in refused({"model_type": "vit"})


def test_rows_for_an_added_token(tmp_path: Path) -> None:
    rows = len(TOKENIZER)
    model = load_causal_lm(saved(tmp_path, rows))
    tokenizer = load_tokenizer(str(tmp_path))
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    check_models({"models.proxy": str(tmp_path)}, tokenizer, context=64, place="")
    before, state = model.get_input_embeddings().weight.detach().clone(), torch.get_rng_state()
    extend_vocabulary(model, tokenizer, seed=1)
    after = model.get_input_embeddings().weight
    assert after.shape[0] == rows + 1 == len(tokenizer) and torch.equal(after[:rows], before)
    assert torch.equal(torch.get_rng_state(), state) and model.config.vocab_size == rows + 1
    extend_vocabulary(model, tokenizer, seed=1)
    assert model.get_input_embeddings().weight is after


@pytest.mark.parametrize("sizes", [(64, 80), (80, 64)])
@pytest.mark.parametrize("direction", ["target_to_proxy", "proxy_to_target"])
def test_the_divergence_of_differently_padded_models_is_over_common_ids(sizes: tuple[int, int], direction: Any) -> None:
    """Gradient and value against full logits, cut by hand; then a whole step of the fit."""
    from bilect.bilevel.objective import directional, lower_objective, target_on_batch

    proxy, target = (CausalLM(tiny_lm("llama", vocab=v, seed=s, layers=1)) for v, s in zip(sizes, (0, 1), strict=True))
    share_vocabulary(proxy, target)
    assert proxy.vocabulary == target.vocabulary == 64
    docs = documents((7, 9, 5), seed=3)
    batch = batch_of(docs)
    weight_B = torch.full((3,), 1 / 3, dtype=torch.float64)
    lower = lower_objective(proxy, batch, weight_B, target=target_on_batch(target, batch), kl_coef=0.5,
                            direction=direction)  # fmt: skip
    ours = lower.gradient(proxy.params())
    logp, logq, ce = [], [], []
    for ids, _ in docs:
        p, q = (m.model(input_ids=ids[None]).logits[0, :-1, :64].log_softmax(-1) for m in (proxy, target))
        logp.append(p)
        logq.append(q.detach())
        ce.append(torch.nn.functional.nll_loss(p, ids[1:]))
    p, q = torch.cat(logp), torch.cat(logq)
    a, b = (q, p) if direction == "target_to_proxy" else (p, q)
    kl = (a.exp() * (a - b)).sum(-1).mean()
    assert ours.kl == pytest.approx(0.5 * kl.item(), abs=1e-10)
    assert ours.ce == pytest.approx(torch.stack(ce).mean().item(), abs=1e-10)
    expected = torch.autograd.grad(torch.stack(ce).mean() + 0.5 * kl, list(proxy.params().values()))
    for g, e in zip(ours.tree.values(), expected, strict=True):
        torch.testing.assert_close(g, e, rtol=0, atol=1e-10)
    z: Tree = {k: torch.randn_like(v) for k, v in proxy.params().items()}
    ghost, jvp = (directional(proxy, batch, proxy.params(), z, m) for m in ("ghost", "jvp"))
    torch.testing.assert_close(ghost, jvp, rtol=0, atol=1e-9)


def test_a_fit_of_differently_padded_models() -> None:
    from bilect.bilevel.offline.fit import BilevelFit
    from bilect.models.score_model import ScoreModel

    proxy, target = (tiny_lm("llama", vocab=v, layers=1, dtype=torch.float32) for v in (80, 64))
    score = ScoreModel.from_causal_lm(proxy, torch.Generator().manual_seed(0))
    batches = iter([batch_of(documents((7, 9, 5), seed=s)) for s in range(4)])
    fit = BilevelFit(proxy, score, target, batches, batches, FitConfig(steps=2, kl_coef=0.5))
    figures = fit.step()
    assert 0 < figures["kl"] < 10 and np.isfinite(figures["lower_loss"])


# ---------------------------------------------------------------------------------------------------------- GGUF


def write_gguf(path: Path, dtype: Any = np.float32) -> Any:
    """A llama with its byte-level tokenizer, as the converters of llama.cpp write one."""
    config = LlamaConfig(
        vocab_size=len(TOKENIZER), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, rms_norm_eps=1e-5, tie_word_embeddings=False,
        rope_theta=10000.0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(2)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(8)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(TOKENIZER))
    words = sorted(TOKENIZER.get_vocab().items(), key=lambda item: item[1])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([word for word, _ in words])
    writer.add_token_types([3 if i in TOKENIZER.added_tokens_decoder else 1 for _, i in words])
    merges = json.loads(TOKENIZER.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(m) if isinstance(m, list) else m for m in merges])
    writer.add_bos_token_id(TOKENIZER.bos_token_id)
    writer.add_eos_token_id(TOKENIZER.eos_token_id)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for name, value in model.state_dict().items():
        own = names.get_name(name, try_suffixes=(".weight",))
        if "q_proj" in name or "k_proj" in name:  # llama.cpp keeps the two halves of a rotation side by side
            heads = 4 if "q_proj" in name else 2
            value = (
                value.reshape(heads, 2, value.shape[0] // heads // 2, *value.shape[1:])
                .swapaxes(1, 2)
                .reshape(value.shape)
            )
        writer.add_tensor(own, value.numpy().astype(dtype if value.ndim > 1 else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_gguf_file_is_the_model_and_tokenizer_that_were_written(tmp_path: Path, dtype: Any) -> None:
    path = tmp_path / "tiny model.GGUF"
    written = write_gguf(path, dtype)
    model, tokenizer = load_causal_lm(str(path)), load_tokenizer(str(path))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        ours, expected = model(input_ids=ids).logits, written(input_ids=ids).logits
    assert float((ours - expected).abs().max()) < (1e-4 if dtype is np.float32 else 1e-2)
    text = "the sun over the hills, and the rain"
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == TOKENIZER(text)["input_ids"]
    assert tokenizer.eos_token_id == TOKENIZER.eos_token_id
    assert read_config(str(path)).max_position_embeddings == 64
    check_models({"models.proxy": str(path)}, tokenizer, context=64, place="")
    assert "has 64 positions, the context is 65" in refused(str(path), tokenizer, 65)
    model.save_pretrained(tmp_path / "again")
    for p, q in zip(model.parameters(), load_causal_lm(str(tmp_path / "again")).parameters(), strict=True):
        assert torch.equal(p, q)


def test_gguf_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for load in (load_causal_lm, load_tokenizer, read_config):
        with pytest.raises(BilectError, match=r"no file .*none.gguf"):
            load(str(tmp_path / "none.gguf"))
        (tmp_path / "broken.gguf").write_bytes(b"GGUF" + b"\0" * 10)
        with pytest.raises(BilectError, match=r"cannot load .*broken.gguf") as caught:
            load(str(tmp_path / "broken.gguf"))
        assert "\n" not in str(caught.value)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'bilect[gguf]'" in refused(str(tmp_path / "broken.gguf"))
