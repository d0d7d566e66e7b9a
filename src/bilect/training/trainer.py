"""The transformers ``Trainer`` as training uses it: no logits in memory, whole checkpoints, an eye on every step."""

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from safetensors.torch import load_file, load_model, save_model
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME

from bilect.data.batch import IGNORE
from bilect.errors import BilectError
from bilect.functional.losses import Head, weighted_token_loss
from bilect.integrations.trainer import BladeTrainer, check_complete
from bilect.models.causal_lm import CausalLM
from bilect.runtime import distributed
from bilect.runtime.checkpoints import all_finite, check_readable
from bilect.runtime.files import flush, write_text
from bilect.runtime.progress import Task
from bilect.runtime.sharding import (
    has_shards,
    load_optimizer_shards,
    load_shards,
    save_shards,
    spread_moments,
    take_weights,
)

__all__ = [
    "FusedLoss",
    "NotANumberError",
    "OptimizerTrainer",
    "SelectingTrainer",
    "Watch",
    "forget_checkpoints",
    "newest_checkpoint",
]

WEIGHTS_FILE = "model.safetensors"
SHARDS = "shards"  # folder of a sharded model's weights and optimiser state
COMPLETE = "complete"  # last file of a checkpoint
REMEDY = "delete {} to train from the start again"
_OWN = (TRAINER_STATE_NAME, SCHEDULER_NAME)


class NotANumberError(BilectError):
    """A loss, gradient or weight that is not finite; the model holds the newest weights at which all was well.

    Attributes:
        step: the first bad one, from 1.
        good_step: steps behind those weights; None if no step was good.
    """

    def __init__(self, step: int, good_step: int | None) -> None:
        super().__init__(f"training: the loss is not a number at step {step}")
        self.step, self.good_step = step, good_step


class FusedLoss(nn.Module):
    """A causal LM whose forward pass gives the mean loss without holding logits; what the ``Trainer`` sees."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.lm = CausalLM(model)

    def forward(
        self, input_ids: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None = None, **kwargs: Any
    ) -> dict[str, Tensor]:
        at_N = torch.nonzero(labels[:, 1:] != IGNORE, as_tuple=True)  # once: a GPU is waited for
        labels_N = labels[:, 1:][at_N]
        # the Trainer counts the learned tokens of the whole step, over accumulation and ranks
        n_items = max(len(labels_N), 1) if num_items_in_batch is None else num_items_in_batch
        weight_N = torch.ones(labels_N.shape, device=labels_N.device) / n_items

        def loss(hidden_BTD: Tensor, head: Head) -> Tensor:
            return weighted_token_loss(hidden_BTD[:, :-1][at_N], head, labels_N, weight_N)[0]

        return {"loss": self.lm.call(input_ids, loss)}


class Watch(TrainerCallback):
    """Shows every step, stops at the first that is not finite, and tells whole checkpoints from half-written ones.

    Whether all gradients so far were finite, and the newest weights for which they were (one more copy of the weights,
    on the main rank, or each rank's of its shards), are kept on the device; a GPU is asked when losses are logged, a
    CPU at every step.
    """

    def __init__(self, task: Task, model: PreTrainedModel) -> None:
        self.task, self.params = task, list(model.parameters())
        self.sharded = has_shards(model)
        self.first = 0
        self.good = torch.ones((), dtype=torch.bool)
        self.good_steps = torch.zeros((), dtype=torch.long)
        self.kept: list[Tensor] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.first = state.global_step
        self.good, self.good_steps = self.good.to(args.device), self.good_steps.to(args.device)
        keeps = self.sharded or distributed.is_main()
        self.kept = [distributed.local_part(p).detach().clone() for p in self.params] if keeps else []
        self.task.advance(self.first)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # the gradient is that of all ranks, and not finite where any of their losses is not
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.params if p.grad is not None])
        self.good &= (norm.full_tensor() if self.sharded else norm).isfinite()  # type: ignore[attr-defined]
        self.good_steps += self.good
        for p, kept in zip(self.params, self.kept, strict=False):
            torch.where(self.good, distributed.local_part(p).detach(), kept, out=kept)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        last = state.global_step >= state.max_steps
        if last:
            control.should_save = False  # the stage saves the result
        if args.device.type == "cpu" or control.should_log or control.should_save or last:
            self._check(state.global_step, weights=control.should_save or last)
        self.task.advance(1)

    def _check(self, step: int, weights: bool) -> None:
        good_steps = int(self.good_steps)
        if not bool(self.good):
            step = self.first + good_steps + 1
        elif not weights or self._all_finite():
            return
        for p, kept in zip(self.params, self.kept, strict=False):
            distributed.local_part(p).detach().copy_(kept)
        raise NotANumberError(step, self.first + good_steps - 1 if good_steps else None)

    def _all_finite(self) -> bool:
        fine = all_finite(map(distributed.local_part, self.params))
        return distributed.sum_scalar(not fine) == 0 if self.sharded else fine

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs and "loss" in logs:
            self.task.advance(0, loss=logs["loss"])

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        distributed.barrier()  # every rank has written its part
        if distributed.is_main():
            checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            flush(checkpoint)
            write_text(checkpoint / COMPLETE, "")
            _remove(p for p in _checkpoints(checkpoint.parent) if p != checkpoint)


class OptimizerTrainer(Trainer):
    """A Trainer of a ``FusedLoss``, or of a causal LM, whose optimiser goes on from an earlier stage's state.

    The model may be sharded (FSDP2). Its checkpoints are then written by all ranks; a training goes on from one with
    any number of ranks, sharded or not.
    """

    optimizer_state: dict[str, Any] | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sharded = has_shards(self._causal_lm)
        if self.sharded:
            self.model._is_accelerate_prepared = True  # else it is wrapped in DDP, which refuses it

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(*args, **kwargs)
        if self.optimizer_state is not None:
            optimizer.load_state_dict(spread_moments(optimizer, self.optimizer_state))
            for group in optimizer.param_groups:
                group["lr"] = self.args.learning_rate
                group.pop("initial_lr", None)
            self.optimizer_state = None
        return optimizer

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        with self.accelerator.autocast():  # which wrapping would have put around the model
            return super().compute_loss(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The weights of a checkpoint; tied ones once, which plain safetensors files refuse."""
        folder = Path(output_dir or self.args.output_dir)
        if self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
        if not self.sharded and self.args.should_save:
            save_model(self._causal_lm, str(folder / WEIGHTS_FILE))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.sharded:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        distributed.barrier()  # the folder is there
        save_shards(Path(output_dir) / SHARDS, self._causal_lm, self._plain_optimizer)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        checkpoint, remedy = Path(resume_from_checkpoint), REMEDY.format(resume_from_checkpoint)
        if (checkpoint / SHARDS).is_dir():
            check_complete(checkpoint, [*_OWN, f"{SHARDS}/.metadata"])
            load_shards(checkpoint / SHARDS, self._causal_lm, remedy)
            return
        check_complete(checkpoint, [*_OWN, WEIGHTS_FILE, OPTIMIZER_NAME])
        if self.sharded:
            take_weights(self._causal_lm, load_file(checkpoint / WEIGHTS_FILE))
        else:
            load_model(self._causal_lm, checkpoint / WEIGHTS_FILE, device=str(self.args.device))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        shards, optimizer = Path(checkpoint) / SHARDS, self._plain_optimizer
        if shards.is_dir():
            load_optimizer_shards(shards, self._causal_lm, optimizer, REMEDY.format(checkpoint))
            self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))
        elif self.sharded:
            optimizer.load_state_dict(spread_moments(optimizer, optimizer.state_dict()))

    @property
    def _plain_optimizer(self) -> torch.optim.Optimizer:
        assert self.optimizer is not None
        inside: Any = self.optimizer
        return inside.optimizer if isinstance(inside, AcceleratedOptimizer) else inside

    @property
    def _causal_lm(self) -> nn.Module:
        return self.model.model if isinstance(self.model, FusedLoss) else self.model


class SelectingTrainer(OptimizerTrainer, BladeTrainer):
    """Trains the causal LM on the tokens that are chosen at every step; ``upper_dataset`` gives whole batches.

    Windows name their sources, in strings, which default collators drop.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, data_collator=_with_sources, **kwargs)

    def _upper_loader(self, dataset: Any) -> Any:
        return dataset

    def _options(self) -> dict[str, Any]:
        """A function that makes a reference does not make a fixed one, also where it starts from u only once."""
        options = super()._options()
        return {**options, "sync_every": options["sync_every"] or (lambda step: None)}


def _with_sources(windows: list[dict[str, Any]]) -> dict[str, Any]:
    columns = {k: [window[k] for window in windows] for k in windows[0]}
    return {k: torch.stack(v) if isinstance(v[0], Tensor) else v for k, v in columns.items()}


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint below ``folder``; half-written ones are removed.

    Raises:
        BilectError: a file of it is broken.
    """
    checkpoints = _checkpoints(folder)
    whole = [p for p in checkpoints if (p / COMPLETE).is_file()]
    if distributed.is_main():
        _remove(p for p in checkpoints if p not in whole)
    distributed.barrier()
    if not whole:
        return None
    newest = max(whole, key=lambda p: int(p.name.rpartition("-")[2]))
    check_readable(newest, REMEDY.format(newest))
    return newest


def forget_checkpoints(folder: Path) -> None:
    """Remove the checkpoints below ``folder``, and the folder if nothing else is in it."""
    if distributed.is_main() and folder.is_dir():
        _remove(_checkpoints(folder))
        if not any(folder.iterdir()):
            folder.rmdir()


def _checkpoints(folder: Path) -> list[Path]:
    return [p for p in folder.glob("checkpoint-*") if p.name.rpartition("-")[2].isdigit()]


def _remove(checkpoints: Iterable[Path]) -> None:
    for checkpoint in list(checkpoints):
        (checkpoint / COMPLETE).unlink(missing_ok=True)  # first: nobody goes on from what a kill in here leaves
        shutil.rmtree(checkpoint, ignore_errors=True)
