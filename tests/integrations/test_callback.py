"""The callback in a plain ``Trainer`` is ``BladeTrainer``; checkpoints; the model afterwards."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import Trainer

from bilect.errors import BilectError
from bilect.integrations.callback import BladeCallback
from bilect.integrations.trainer import BladeConfig
from tests.bilevel.online_helpers import plain_losses
from tests.integrations.test_trainer import BLADE, collate, losses, rows, train


def callback(blade: BladeConfig = BLADE) -> BladeCallback:
    return BladeCallback(blade, DataLoader(rows(100, 5), batch_size=1, shuffle=True, collate_fn=collate))  # type: ignore[arg-type]


def by_callback(folder: Path, blade: BladeConfig = BLADE, resume: str | None = None, **more: Any) -> Any:
    own = callback(blade)
    trainer = train(folder, Trainer, resume, callbacks=[own], **more)
    trainer.selector = own.selector
    return trainer


def test_it_trains_as_blade_trainer_does_bit_for_bit(tmp_path: Path) -> None:
    theirs, ours = train(tmp_path / "a"), by_callback(tmp_path / "b")
    assert ours.selector.synchronisations == 3 and ours.selector.steps == 7
    assert losses(ours) == losses(theirs) != losses(train(tmp_path / "c", Trainer))
    for p, q in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_evaluation_and_the_model_afterwards_are_as_ever(tmp_path: Path) -> None:
    trainer = by_callback(tmp_path, eval_strategy="steps", eval_steps=7, eval_dataset=rows(50, 2))
    assert "forward" not in vars(trainer.model)
    batch = collate(rows(50, 2))
    (seen,) = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    with torch.no_grad():
        own = float(plain_losses(trainer.model.eval(), batch).nanmean())
    assert seen == pytest.approx(own, abs=1e-4)
    assert trainer.model.train()(**batch).logits is not None


def test_resumed_in_its_folder_exactly_and_without_its_state_not_at_all(tmp_path: Path) -> None:
    whole = by_callback(tmp_path, save_strategy="steps", save_steps=3)
    checkpoint = tmp_path / "checkpoint-3"
    again = by_callback(tmp_path, resume=str(checkpoint))
    assert losses(again) == losses(whole) and again.selector.steps == 7
    for p, q in zip(again.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(p, q)
    (checkpoint / "selector-0.pt").unlink()
    with pytest.raises(BilectError, match=r"selector-0\.pt.*restore it"):
        by_callback(tmp_path, resume=str(checkpoint))


def test_all_tokens_is_the_trainer(tmp_path: Path) -> None:
    assert losses(by_callback(tmp_path / "a", BladeConfig(method="full"))) == losses(train(tmp_path / "b", Trainer))
