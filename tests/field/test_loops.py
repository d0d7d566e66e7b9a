"""What people's training loops are like: wrappers, adapters, half precision, raw columns, damaged checkpoints."""

import copy
import shutil
from pathlib import Path
from typing import Any

import datasets
import peft
import pytest
import torch
from torch import nn
from torch.utils.data import IterableDataset
from transformers import TrainingArguments

from bilect.bilevel.online.feeds import Feed
from bilect.bilevel.online.selector import OnlineTokenSelector
from bilect.config import parse_config
from bilect.errors import BilectError
from bilect.integrations.trainer import BladeConfig, BladeTrainer
from bilect.pipeline.stages import run
from bilect.runtime import distributed
from bilect.training.train import per_rank_batch
from tests.bilevel.online_helpers import largest_difference, make_batch, plain_losses, small, train
from tests.corpus import tiny_settings, write_corpus

UPPER = [make_batch(100 + i, (9, 12), given=5) for i in range(3)]
BATCHES = [make_batch(i) for i in range(4)]
BLADE = BladeConfig(sync_every=2, reference_steps=2, reference_learning_rate=1e-2, upper_batch_size=2, penalty=0.0)


def selector_for(model: Any, upper: Any = UPPER, **more: Any) -> OnlineTokenSelector:
    options: dict[str, Any] = {
        "sync_every": 3, "reference_steps": 2, "reference_learning_rate": 1e-2, "lower_loader": [make_batch(200)],
    }  # fmt: skip
    return OnlineTokenSelector(model, upper, **{**options, **more})


def one_line(error: Any) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


# ------------------------------------------------------------------------------------------------------ wrappers


class Engine(nn.Module):
    """As DeepSpeed's engine and FSDP1: the model is ``module``, and what is not found here is looked for there."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


@pytest.mark.parametrize("wrap", [nn.DataParallel, Engine, lambda m: Engine(Engine(m))])
@pytest.mark.parametrize("early", [True, False])
def test_wrappers_with_a_module(wrap: Any, early: bool) -> None:
    plain, model = small(), small()
    wrapped = wrap(model)
    expected = train(plain, selector_for(plain), BATCHES)
    assert train(wrapped, selector_for(wrapped if early else model), BATCHES) == pytest.approx(expected, abs=1e-9)
    assert largest_difference(plain, model) < 1e-9
    with pytest.raises(BilectError, match="made for another model"):
        selector_for(small()).loss(wrapped, BATCHES[0])


def test_wrappers_that_take_the_model_apart_are_named() -> None:
    model, parallel = small(), nn.DataParallel(small())
    selector = selector_for(model)
    parallel.device_ids = [0, 1]
    with pytest.raises(BilectError, match="torchrun"):
        selector.loss(parallel, BATCHES[0])
    engine = Engine(model)
    next(model.parameters()).ds_id = 0
    with pytest.raises(BilectError, match="ZeRO-3"):
        selector.loss(engine, BATCHES[0])
    prompt = peft.get_peft_model(small(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(BilectError, match="prompt learning"):
        selector_for(prompt)


# ------------------------------------------------------------------------------------------------------ adapters


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "tied": True},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj", "lm_head"], "use_dora": True},
    ],
    ids=["saved head", "saved head of a tied model", "LoRA on the head", "DoRA on the head"],
)
def test_adapters_of_the_head(settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    tied = settings.get("tied", False)
    settings = {k: v for k, v in settings.items() if k != "tied"}
    config = peft.LoraConfig(r=4, init_lora_weights=False, **settings)
    model = peft.get_peft_model(small(dtype=torch.float32, tie_word_embeddings=tied), config)
    if "modules_to_save" in settings:
        nn.init.normal_(model.get_base_model().lm_head.modules_to_save["default"].weight, std=0.3)
    selector = selector_for(model, keep_ratio=0.5)
    own = {k for k, p in model.get_base_model().named_parameters() if p.requires_grad}
    for batch in BATCHES:
        plain_BT = plain_losses(model, batch)
        loss = selector.loss(model, batch)
        assert selector.reference is not None and selector.last_mask_BT is not None
        with torch.no_grad():
            delta_BT = plain_BT - plain_losses(selector.reference.model, batch)
        torch.testing.assert_close(selector.last_delta_BT, delta_BT, rtol=0, atol=1e-4, equal_nan=True)
        plain = plain_BT[selector.last_mask_BT].mean()
        assert loss.item() == pytest.approx(plain.item(), abs=1e-5)
        trained = [p for p in model.parameters() if p.requires_grad]
        ours, theirs = torch.autograd.grad(loss, trained), torch.autograd.grad(plain, trained)
        for g, e in zip(ours, theirs, strict=True):
            torch.testing.assert_close(g, e, rtol=0, atol=1e-5)
        with torch.no_grad():
            for p, g in zip(trained, ours, strict=True):
                p -= 0.1 * g
        selector.step()
    assert selector.synchronisations == 2 and selector.reference.own.keys() == own
    assert any("lm_head" in name for name in own)


@pytest.mark.parametrize("reentrant", [True, False])
def test_adapters_under_gradient_checkpointing(reentrant: bool) -> None:
    """The reentrant kind gives no gradients where no input needs one."""
    told = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        settings = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
        model = peft.get_peft_model(small(dtype=torch.float32), settings).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        told.append(train(model, selector_for(model), BATCHES))
    assert told[1] == pytest.approx(told[0], abs=1e-6) and told[0][0] != told[0][1]


# ------------------------------------------------------------------------------------------------------- half precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rate", [5e-5, 1e-6])
def test_the_reference_of_a_model_in_half_precision_moves_as_in_float32(dtype: torch.dtype, rate: float) -> None:
    model = small(dtype=torch.float32).to(dtype)
    full = copy.deepcopy(model).float()
    moved: list[dict[str, torch.Tensor]] = []
    for each in (full, model):
        start = {k: p.detach().float().clone() for k, p in each.named_parameters()}

        def look(selector: OnlineTokenSelector, start: Any = start) -> None:
            assert selector.reference is not None
            assert {p.dtype for p in selector.reference.own.values()} == {torch.float32}
            moved.append({k: p.detach() - start[k] for k, p in selector.reference.own.items()})

        selector = selector_for(each, reference_learning_rate=rate, reference_steps=10, on_reference_step=look)
        selector.loss(each, BATCHES[0]).backward()
        assert selector.reference is not None
        assert {p.dtype for p in selector.reference.own.values()} == {each.dtype}
    expected, ours = (torch.cat([v.flatten() for v in moved[i].values()]) for i in (9, 19))
    assert float((ours != 0).float().mean()) > 0.99
    assert float(torch.cosine_similarity(ours, expected, dim=0)) > 0.9
    assert float(ours.norm()) == pytest.approx(float(expected.norm()), rel=0.1)


def test_a_partly_frozen_model_in_half_precision() -> None:
    model = small(dtype=torch.float32).bfloat16()
    model.get_input_embeddings().weight.requires_grad_(False)
    selector = selector_for(model)
    selector.loss(model, BATCHES[0]).backward()
    assert selector.reference is not None and selector.synchronisations == 1


# ------------------------------------------------------------------------------------------------------ BladeTrainer


def rows(seed: int, n: int) -> list[dict[str, Any]]:
    return [{k: v[0].tolist() for k, v in make_batch(seed + i, (12,)).items()} for i in range(n)]


def arguments(folder: Path, **more: Any) -> TrainingArguments:
    options: dict[str, Any] = {
        "max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "logging_steps": 1,
        "save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True, "seed": 3,
        "dataloader_pin_memory": False,
    }  # fmt: skip
    return TrainingArguments(output_dir=str(folder), **{**options, **more})


def trainer_for(folder: Path, upper: Any, blade: BladeConfig = BLADE, **more: Any) -> BladeTrainer:
    kwargs = {k: more.pop(k) for k in ("model_init", "data_collator") if k in more}
    model = None if "model_init" in kwargs else small("gpt2", dtype=torch.float32)
    return BladeTrainer(model, arguments(folder, **more), train_dataset=rows(0, 20), blade=blade, upper_dataset=upper,
                        **kwargs)  # fmt: skip


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


RAW = [
    {**row, "text": f"text {i}", "source": "books", "messages": [{"role": "user", "content": "x" * i}]}
    for i, row in enumerate(rows(100, 6))
]


class Streamed(IterableDataset):  # type: ignore[type-arg]
    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __iter__(self) -> Any:
        return iter(self.items)


def test_upper_data_with_raw_columns_are_treated_as_training_data(tmp_path: Path) -> None:
    clean = trainer_for(tmp_path, rows(100, 6))
    clean.train()
    for upper in (RAW, datasets.Dataset.from_list(RAW)):
        trainer = trainer_for(tmp_path, upper)
        trainer.train()
        assert losses(trainer) == losses(clean) and trainer.selector.synchronisations == 2


def test_streamed_upper_data(tmp_path: Path) -> None:
    seen = []
    for upper in (Streamed(RAW), datasets.Dataset.from_list(RAW).to_iterable_dataset()):
        trainer = trainer_for(tmp_path, upper)
        trainer.train()
        seen.append(losses(trainer))
    assert seen[0] == seen[1] and len(seen[0]) == 4


WRONG: dict[str, tuple[Any, str]] = {
    "empty": ([], "upper_dataset is empty"),
    "empty stream": (Streamed([]), "upper_dataset gives no batches"),
    "a dict": ({"train": rows(0, 2)}, "give one data set"),
    "unlabelled": ([{"input_ids": r["input_ids"]} for r in RAW], "upper_dataset: a batch needs input_ids and labels"),
    "text only": ([{"text": "a"}], "upper_dataset: "),
    "text only table": (datasets.Dataset.from_list([{"text": "a"}]), r"upper_dataset: .* columns \(text\)"),
    "ragged": ([{k: v[: 5 + i] for k, v in r.items()} for i, r in enumerate(rows(0, 4))], "upper_dataset: cannot make"),
    "nothing learned": ([{**r, "labels": [-100] * 12} for r in rows(0, 2)], "upper_dataset: nothing in its first"),
    "other ids": (
        [{**r, "input_ids": [99] * 12} for r in rows(0, 2)],
        "upper_dataset: a batch has id 99, the model 64",
    ),
    "too long": (
        [{k: v * 3 for k, v in r.items()} for r in rows(0, 2)],
        "upper_dataset: a batch has 36 .* 32 positions",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_upper_data_that_cannot_be_used_are_named_in_the_constructor(tmp_path: Path, kind: str) -> None:
    upper, message = WRONG[kind]
    with pytest.raises(BilectError, match=message) as caught:
        trainer_for(tmp_path, upper)
    one_line(caught)


def test_columns_kept_on_purpose_are_named(tmp_path: Path) -> None:
    def collate(examples: list[Any]) -> Any:
        return {k: torch.tensor([e[k] for e in examples]) if k != "text" else [e[k] for e in examples]
                for k in ("input_ids", "labels", "attention_mask", "text")}  # fmt: skip

    with pytest.raises(BilectError, match="upper_dataset: the model takes no text"):
        trainer_for(tmp_path, RAW, remove_unused_columns=False, data_collator=collate)


def test_looking_at_the_first_batch_draws_nothing_twice() -> None:
    for loader in ([1, 2, 3], iter([1, 2, 3])):
        feed = Feed(loader, 0, "upper_loader")
        state = torch.get_rng_state()
        assert feed.peek() == feed.peek() == 1 and feed.state_dict() == {"passes": 0, "drawn": 0}
        assert [feed(), feed(), feed()] == [1, 2, 3] and torch.equal(torch.get_rng_state(), state)
    resumed = Feed(iter([1, 2, 3]), 0, "upper_loader")
    resumed.peek()
    resumed.load_state_dict({"passes": 0, "drawn": 2})
    assert resumed() == 3


def test_model_init(tmp_path: Path) -> None:
    """Every call of train builds a model anew, and the selector with it."""
    trainer = trainer_for(tmp_path, rows(100, 6), model_init=lambda: small("gpt2", dtype=torch.float32))
    selectors, told = [trainer.selector], []
    for _ in range(2):
        trainer.train()
        selectors.append(trainer.selector)
        told.append(losses(trainer))
        assert trainer.selector.steps == 4 and trainer.selector.synchronisations == 2
    assert told[0] == told[1] and len(told[0]) == 4
    assert selectors[0].steps == 0 and selectors[1] is not selectors[2]


def test_padding_free_batches() -> None:
    """Examples end to end in one row, told apart by their positions, with the kernel's lengths as numbers."""
    batch = {
        "input_ids": torch.arange(48)[None] % 63 + 1, "position_ids": (torch.arange(48) % 24)[None],
        "labels": torch.where(torch.arange(48) % 24 == 0, -100, torch.arange(48) % 63 + 1)[None],
        "cu_seq_lens_q": torch.tensor([0, 24, 48], dtype=torch.int32), "max_length_q": 24,
    }  # fmt: skip
    model = small()
    selector = selector_for(model, [batch])  # 48 tokens, 32 positions
    selector.loss(model, BATCHES[0]).backward()
    assert selector.synchronisations == 1
    with pytest.raises(BilectError, match="a batch has 48 tokens in a row, the model 32 positions"):
        selector_for(small(), [{k: v for k, v in batch.items() if k != "position_ids"}])


def test_several_gpus_in_one_process_are_named_in_the_constructor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: 2))
    with pytest.raises(BilectError, match="torchrun --nproc-per-node=2"):
        trainer_for(tmp_path, rows(0, 2))


@pytest.mark.parametrize(
    "name", ["selector-0.pt", "optimizer.pt", "scheduler.pt", "trainer_state.json", "rng_state.pth"]
)
def test_a_checkpoint_that_lacks_a_file(tmp_path: Path, name: str) -> None:
    trainer_for(tmp_path, rows(100, 6), save_strategy="steps", save_steps=2).train()
    checkpoint = tmp_path / "checkpoint-2"
    shutil.copytree(checkpoint, tmp_path / "whole")
    (checkpoint / name).unlink()
    with pytest.raises(BilectError, match=f"checkpoint: {checkpoint} has no {name}; restore it") as caught:
        trainer_for(tmp_path, rows(100, 6)).train(resume_from_checkpoint=str(checkpoint))
    one_line(caught)
    trainer_for(tmp_path, rows(100, 6)).train(resume_from_checkpoint=str(tmp_path / "whole"))
    if name == "selector-0.pt":
        full = trainer_for(tmp_path, rows(100, 6), blade=BladeConfig(method="full"))
        full.train(resume_from_checkpoint=str(checkpoint))  # nothing is selected: nothing is missed


# --------------------------------------------------------------------------------------------------------- one unit


def test_batches_that_do_not_divide_are_told_before_any_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_corpus(tmp_path)
    settings = tiny_settings(tmp_path)
    settings["warmup"] = {role: {**kind, "batch_size": 6} for role, kind in settings["warmup"].items()}
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    with pytest.raises(BilectError, match=r"training\.batch_size: a step of 4 sequences .* 3 ranks .* set 3"):
        run(parse_config(settings), tmp_path / "run")
    assert not (tmp_path / "run" / "tokens").exists()


def test_batch_sizes_are_of_all_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert per_rank_batch(16) == 16 and per_rank_batch(16, 4) == 4
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    assert per_rank_batch(16, 4) == 2
    with pytest.raises(BilectError, match=r"training.batch_size: a step of 10 sequences .* 2 ranks x 2 .* set 8"):
        per_rank_batch(10, 2, "training.batch_size")
    monkeypatch.setattr(distributed, "world_size", lambda: 1)
    trainer = trainer_for(tmp_path, rows(100, 7))
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    trainer.blade = BLADE.model_copy(update={"upper_batch_size": 3})
    with pytest.raises(BilectError, match="upper_batch_size: 3 examples do not divide into 2 ranks; set 2"):
        trainer._upper_loader(Streamed(RAW))
    trainer.blade = BLADE.model_copy(update={"upper_batch_size": 4})
    assert len(next(iter(trainer._upper_loader(Streamed(RAW))))["input_ids"]) == 2


# ------------------------------------------------------------------------------------------------ references


def test_a_fixed_reference_of_another_padding(tmp_path: Path) -> None:
    from bilect.models.loading import load_causal_lm, train_tokenizer
    from tests.corpus import TINY

    tokenizer = train_tokenizer(["the sun and the rain"] * 9, 300)
    folders = [str(tmp_path / name) for name in "ab"]
    for folder, size in zip(folders, (320, 384), strict=True):
        load_causal_lm(TINY, vocab_size=size).save_pretrained(folder)
    model = load_causal_lm(folders[0])
    with pytest.raises(BilectError, match=r"has 384 entries, the model's 320; .* save it beside both"):
        selector_for(model, sync_every=None, reference=folders[1])
    for folder in folders:
        tokenizer.save_pretrained(folder)
    selector = selector_for(model, sync_every=None, reference=folders[1])
    assert float(selector.loss(model, BATCHES[0])) > 0 and selector.last_delta_BT is not None
    train_tokenizer(["prime lemma proof"] * 9, 300).save_pretrained(folders[1])
    with pytest.raises(BilectError, match=r"only under one tokenizer: .* in one and"):
        selector_for(model, sync_every=None, reference=folders[1])


def test_a_reference_to_be_overwritten_must_be_like_the_model() -> None:
    with pytest.raises(
        BilectError, match=r"reference: it takes over .* shape \(80, 16\) where the model's has \(64, 16\)"
    ):
        selector_for(small(), reference=small(vocab=80))
