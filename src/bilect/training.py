"""Plain language-model training through the transformers ``Trainer``, on packed windows, with a decay branch."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from bilect.config import TrainConfig
from bilect.data.batch import IGNORE
from bilect.data.loading import PackedWindows
from bilect.data.tokens import TokenStore
from bilect.errors import BilectError
from bilect.functional.losses import weighted_token_loss
from bilect.models.causal_lm import CausalLM
from bilect.models.flops import forward_flops
from bilect.progress import Task
from bilect.runtime import distributed

__all__ = ["train"]

OPTIMIZER_FILE = "optimizer.pt"


class _FusedLoss(nn.Module):
    """A causal LM whose forward pass gives the mean loss without holding logits; what the ``Trainer`` sees."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.lm = CausalLM(model)

    def forward(
        self, input_ids: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None = None, **kwargs: Any
    ) -> dict[str, Tensor]:
        keep_BT = labels[:, 1:] != IGNORE
        hidden_ND = self.lm.hidden(input_ids)[:, :-1][keep_BT]
        labels_N = labels[:, 1:][keep_BT]
        # the Trainer counts the learned tokens of the whole step, over accumulation and ranks
        n_items = max(len(labels_N), 1) if num_items_in_batch is None else num_items_in_batch
        weight_N = torch.ones(labels_N.shape, device=labels_N.device) / n_items
        return {"loss": weighted_token_loss(hidden_ND, self.lm.head(), labels_N, weight_N)[0]}


class _Watch(TrainerCallback):
    """Shows every step, keeps the logged losses, and stops a run whose loss is not a number."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.history: list[dict[str, Any]] = []

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.task.advance(1)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs and "loss" in logs:
            if not np.isfinite(logs["loss"]):
                raise BilectError(f"training: the loss is {logs['loss']} at step {state.global_step}; "
                                  "lower the learning rate or the gradient clip")  # fmt: skip
            self.history.append(
                {"step": state.global_step, "loss": logs["loss"], "learning_rate": logs.get("learning_rate")}
            )
            self.task.advance(0, loss=logs["loss"])


class _Trainer(Trainer):
    """A Trainer whose optimiser goes on from an earlier stage's state."""

    optimizer_state: dict[str, Any] | None = None

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(*args, **kwargs)
        if self.optimizer_state is not None:
            optimizer.load_state_dict(self.optimizer_state)
            for group in optimizer.param_groups:
                group["lr"] = self.args.learning_rate
                group.pop("initial_lr", None)
            self.optimizer_state = None
        return optimizer


def train(
    model: PreTrainedModel,
    store: TokenStore,
    rows: np.ndarray,
    folder: Path,
    config: TrainConfig,
    *,
    context: int,
    seed: int,
    task: Task,
    start_from: Path | None = None,
    decay: bool = False,
    device: torch.device | None = None,
) -> dict[str, Any]:
    """Train ``model`` in place and, on the main rank, keep its optimiser state and its losses in ``folder``.

    Args:
        model: a causal LM.
        store: token rows.
        rows: documents to train on, packed in random order.
        folder: gets ``optimizer.pt`` and ``training.jsonl``.
        config: steps, schedule and so on.
        context: tokens per window.
        seed: of the order of documents.
        task: progress.
        start_from: folder of an earlier stage whose optimiser state goes on (then without warm-up).
        decay: the decay branch: ``decay_steps`` steps with a learning rate falling linearly to zero.
        device: where to train.

    Returns:
        ``tokens``, ``flops``, ``steps``, ``passes`` over the rows, and the last logged ``loss``.

    Raises:
        BilectError: the loss is not a number.
    """
    steps = config.decay_steps if decay else config.steps
    state_file = None if start_from is None else start_from / OPTIMIZER_FILE
    per_rank = config.batch_size // config.gradient_accumulation
    n_windows = steps * config.batch_size * distributed.world_size()
    windows = PackedWindows(store, rows, context, n_windows, seed)
    warmup_steps = 0 if state_file is not None else int(config.warmup_ratio * steps)
    if decay:
        schedule = "linear"
    else:
        schedule = "cosine" if config.schedule == "cosine" else "constant_with_warmup"
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        max_steps=steps,
        per_device_train_batch_size=per_rank,
        gradient_accumulation_steps=config.gradient_accumulation,
        learning_rate=config.learning_rate,
        lr_scheduler_type=schedule,
        warmup_steps=warmup_steps,
        weight_decay=config.weight_decay,
        max_grad_norm=config.grad_clip,
        bf16=config.bf16,
        seed=seed,
        data_seed=seed,
        use_cpu=device is not None and device.type == "cpu",
        report_to=list(config.report_to) or "none",
        save_strategy="no",
        logging_steps=max(steps // 50, 1),
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        dataloader_num_workers=0,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
    )
    watch = _Watch(task)
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        trainer = _Trainer(model=_FusedLoss(model).train(), args=arguments, train_dataset=windows, callbacks=[watch])
        trainer.remove_callback(transformers.PrinterCallback)
        if state_file is not None:
            trainer.optimizer_state = torch.load(state_file, map_location="cpu", weights_only=True)
        trainer.train()
        model.eval()
    finally:
        transformers.logging.set_verbosity(verbosity)
    if distributed.is_main() and not decay:
        torch.save(trainer.optimizer.state_dict(), folder / OPTIMIZER_FILE)
    if distributed.is_main():
        name = "decay.jsonl" if decay else "training.jsonl"
        (folder / name).write_text("".join(json.dumps(h) + "\n" for h in watch.history), encoding="utf-8")
        trainer_folder = folder / "trainer"
        if trainer_folder.is_dir() and not any(trainer_folder.iterdir()):
            trainer_folder.rmdir()
    tokens = n_windows * context
    return {
        "tokens": tokens,
        "flops": 3 * forward_flops(model, tokens, context),
        "steps": steps,
        "passes": round(windows.passes, 3),
        "loss": watch.history[-1]["loss"] if watch.history else None,
    }
