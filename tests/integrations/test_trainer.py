"""BladeTrainer against the Trainer, and against the selector in a plain loop; checkpoints; its settings."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import Trainer, TrainerCallback, TrainingArguments

from bilect.bilevel.online.selector import OnlineTokenSelector
from bilect.errors import BilectError
from bilect.integrations.trainer import BladeConfig, BladeTrainer
from tests.bilevel.online_helpers import Batch, make_batch, plain_losses, small

BLADE = BladeConfig(
    sync_every=2, reference_steps=3, reference_learning_rate=1e-2, warmup_steps=0, upper_batch_size=1, diagnose_every=2
)


def rows(seed: int, n: int) -> list[Batch]:
    return [{k: v[0] for k, v in make_batch(seed + i, (12 - i % 4,), width=12).items()} for i in range(n)]


def collate(examples: list[Batch]) -> Batch:
    return {k: torch.stack([e[k] for e in examples]) for k in examples[0]}


def arguments(folder: Path, **more: Any) -> TrainingArguments:
    options: dict[str, Any] = {
        "max_steps": 7, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 1e-2,
        "logging_steps": 1, "save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True,
        "dataloader_pin_memory": False, "seed": 3,
    }  # fmt: skip
    return TrainingArguments(output_dir=str(folder), **{**options, **more})


def train(folder: Path, kind: type = BladeTrainer, resume: str | None = None, **more: Any) -> Any:
    model = small("gpt2", dtype=torch.float32, resid_pdrop=0.1).train()
    blade = {k: more.pop(k) for k in ("blade", "upper_dataset", "reference") if k in more}
    callbacks, evaluated = more.pop("callbacks", None), more.pop("eval_dataset", None)
    if kind is BladeTrainer:
        blade = {"blade": BLADE, "upper_dataset": rows(100, 5), **blade}
    trainer = kind(
        model,
        arguments(folder, **more),
        train_dataset=rows(0, 40),
        eval_dataset=evaluated,
        data_collator=collate,
        callbacks=callbacks,
        **blade,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("setting", [{"keep_ratio": 1.0}, {"method": "full"}])
def test_keeping_everything_is_the_trainer_bit_for_bit(tmp_path: Path, setting: dict[str, Any]) -> None:
    plain = train(tmp_path, Trainer)
    state = torch.get_rng_state()
    ours = train(tmp_path, blade=BladeConfig(**setting))
    assert torch.equal(torch.get_rng_state(), state)
    assert losses(ours) == losses(plain) and len(losses(plain)) == 7
    for p, q in zip(ours.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_resumed_from_its_checkpoint_exactly(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", save_strategy="steps", save_steps=3)
    assert whole.selector.synchronisations == 3 and whole.selector.steps == 7  # after 3 batches, then every 2 steps
    assert [e["step"] for e in whole.selector.diagnostics] == [2, 4, 6]
    again = train(tmp_path / "again", resume=str(tmp_path / "whole" / "checkpoint-3"))
    assert losses(again) == losses(whole) and again.selector.steps == 7
    for p, q in zip(again.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(p, q)
    assert str(again.selector.diagnostics) == str(whole.selector.diagnostics)


def test_loss_of_the_selected_tokens_over_accumulation(tmp_path: Path) -> None:
    """One step of two micro-batches: their selected means, weighted by their learned tokens."""
    reference = small("gpt2", seed=3, dtype=torch.float32)
    seen: list[Batch] = []

    class Spy(BladeTrainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            seen.append({k: v.clone() for k, v in inputs.items()})
            return super().compute_loss(model, inputs, *args, **kwargs)

    rho1 = BladeConfig(method="rho1", diagnose_every=None)
    model = small("gpt2", dtype=torch.float32, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    trainer = Spy(
        model, arguments(tmp_path, max_steps=1), train_dataset=rows(0, 8), data_collator=collate, blade=rho1,
        reference=reference,
    )  # fmt: skip
    trainer.train()
    model = small("gpt2", dtype=torch.float32)
    selector = OnlineTokenSelector(model, sync_every=None, reference=reference)
    counts = [int((b["labels"][:, 1:] != -100).sum()) for b in seen]
    expected = sum(n * selector.loss(model, b).item() for n, b in zip(counts, seen, strict=True)) / sum(counts)
    assert len(seen) == 2 and losses(trainer)[0] == pytest.approx(expected, abs=1e-3)  # the log rounds
    with torch.no_grad():
        metrics = trainer.evaluate(rows(50, 2))
        batch = collate(rows(50, 2))
        assert metrics["eval_loss"] == pytest.approx(float(plain_losses(trainer.model, batch).nanmean()), abs=1e-4)


def test_bf16(tmp_path: Path) -> None:
    """Under accelerate's mixed precision, which it ties to the model's forward function."""
    seen: list[torch.dtype] = []

    class Spy(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            layer = model.transformer.h[0].mlp
            layer.register_forward_hook(lambda m, a, out: seen.append(out.dtype) if m.training else None)

    trainer = train(tmp_path, bf16=True, max_steps=3, callbacks=[Spy()])
    plain = train(tmp_path, max_steps=3)
    assert set(seen) == {torch.bfloat16} and losses(trainer)[0] == pytest.approx(losses(plain)[0], rel=0.02)


def test_random_tokens(tmp_path: Path) -> None:
    trainer = train(tmp_path, blade=BladeConfig(method="random-token", diagnose_every=1), max_steps=2)
    assert trainer.selector.reference is None
    assert all(0.6 <= entry["kept"] < 0.66 for entry in trainer.selector.diagnostics)
    assert not any("delta" in entry or "share_positive" in entry for entry in trainer.selector.diagnostics)
    assert set(trainer.selector.diagnostics[0]["documents"][0]["delta"]) == {None}


def test_settings(tmp_path: Path) -> None:
    assert BladeConfig(method="rho1", reference="x").selector_options(0.1)["sync_every"] is None
    assert BladeConfig(reference_dtype="bfloat16").selector_options(0.1)["reference_dtype"] is torch.bfloat16
    assert BladeConfig().selector_options(0.1)["reference_learning_rate"] == 0.1  # that of the training
    assert BladeConfig(reference_learning_rate=0.2).selector_options(0.1)["reference_learning_rate"] == 0.2
    scheduled = BladeConfig(keep_ratio={0: 1, 5: 0.5, 9: 0.25}, sync_every={0: 2, 10: 4}).selector_options(0.1)
    assert [scheduled["keep_ratio"](step) for step in (0, 4, 5, 8, 9, 100)] == [1, 1, 0.5, 0.5, 0.25, 0.25]
    assert [scheduled["sync_every"](step) for step in (0, 9, 10)] == [2, 2, 4]
    given = BladeConfig(method="rho1", reference="x")
    assert given.of("blade").reference is None and given.of("rho1").reference == "x"
    assert BladeConfig(baseline="matched").of("rho1").baseline == "model"
    for wrong in (
        {"keep_ratio": 0},
        {"keep_ratio": 1.5},
        {"reference": "x"},
        {"keep_ratio": {5: 0.5}},
        {"sync_every": {0: 0}},
        {"method": "rho1", "baseline": "matched"},
    ):
        with pytest.raises(ValidationError):
            BladeConfig(**wrong)  # type: ignore[arg-type]
    with pytest.raises(BilectError, match="give upper_dataset"):
        BladeTrainer(small("gpt2"), arguments(tmp_path), blade=BLADE)
