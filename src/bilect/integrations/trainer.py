"""Online token selection in scripts that use the transformers ``Trainer``: exchange the class, add two arguments.

trainer = BladeTrainer(model, args, train_dataset=..., blade=BladeConfig(keep_ratio=0.6), upper_dataset=...)
"""

import os
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_pt_utils import IterableDatasetShard
from transformers.utils import is_datasets_available

from bilect.bilevel.online.feeds import Feed
from bilect.bilevel.online.selector import OnlineTokenSelector
from bilect.bilevel.online.selector_files import load_selector, save_selector, selector_file
from bilect.config.online import BladeConfig
from bilect.errors import BilectError
from bilect.runtime import distributed

__all__ = ["BladeConfig", "BladeTrainer", "check_complete"]

RESTORE = (
    "restore it, resume from another checkpoint (written by as many processes), or start anew from the model in it"
)


class _Steps(TrainerCallback):
    def __init__(self, selector: OnlineTokenSelector) -> None:
        self.selector = selector

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.selector.step()


class BladeTrainer(Trainer):
    """A ``Trainer`` whose training loss is that of the selected tokens; evaluation is untouched.

    With keep_ratio 1 or method "full" it is the ``Trainer``, bit for bit. Checkpoints hold the selector's state beside
    the Trainer's own, one file per rank, and ``resume_from_checkpoint`` restores it.

    Args:
        model: a causal LM; or None with ``model_init``, as for ``Trainer``.
        args: as for ``Trainer``. A column ``source`` for the diagnostics needs ``remove_unused_columns=False``.
        blade: the settings.
        upper_dataset: examples of the target set, in the form of ``train_dataset`` and treated like it: columns that
            the model does not take are left out, and ``data_collator`` makes the batches. One is drawn here.
        reference: a fixed reference, for method "rho1", or a function that makes one; see ``OnlineTokenSelector``.
        **kwargs: as for ``Trainer``.

    Attributes:
        selector: the ``OnlineTokenSelector``, with ``diagnostics``.

    Raises:
        BilectError: upper data is needed and missing, or no batch the model can take; the model's form is not known.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        args: TrainingArguments | None = None,
        *,
        blade: BladeConfig | None = None,
        upper_dataset: Any = None,
        reference: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, args, **kwargs)
        self.blade = BladeConfig() if blade is None else blade
        if self.blade.needs_upper_data and upper_dataset is None and reference is None:
            raise BilectError(f"method {self.blade.method} trains its reference on the target set: give upper_dataset")
        self._given = (upper_dataset, reference)
        self._steps: _Steps | None = None
        self._select(self.model)

    def _select(self, model: nn.Module) -> None:
        """A selector for the model in training."""
        upper_dataset, options = self._given[0], self._options()
        if options["keep_ratio"] != 1.0 and (n := self.args.n_gpu) > 1 and not self.is_model_parallel:
            raise BilectError(f"the Trainer spreads batches over {n} GPUs in one process, where no tokens can be "
                              f"chosen; start one process per GPU: torchrun --nproc-per-node={n} SCRIPT")  # fmt: skip
        self.selector = OnlineTokenSelector(model, self._upper_feed(upper_dataset), **options)
        if self._steps is not None:
            self.remove_callback(self._steps)
        self._steps = _Steps(self.selector)
        self.add_callback(self._steps)

    def _options(self) -> dict[str, Any]:
        options, reference = self.blade.selector_options(self.args.learning_rate), self._given[1]
        return options if reference is None else {**options, "reference": reference}

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """Another model is trained by another selector."""
        model = super().call_model_init(trial)
        if "selector" in vars(self):
            if self.place_model_on_device:
                self._move_model_to_device(model, self.args.device)
            self._select(model)
        return model

    def _upper_feed(self, dataset: Any) -> Any:
        if dataset is None or not self.blade.needs_upper_data:
            return None
        if isinstance(dataset, dict):
            raise BilectError(f"upper_dataset: give one data set, not a mapping of {len(dataset)}")
        if hasattr(dataset, "__len__") and len(dataset) == 0:
            raise BilectError("upper_dataset is empty; give examples of the target set")
        return Feed(self._upper_loader(dataset), self.blade.seed, "upper_dataset")

    def _upper_loader(self, dataset: Any) -> Iterable[Any]:
        world, collate = distributed.world_size(), self.data_collator
        size, remainder = divmod(self.blade.upper_batch_size, world)
        if remainder:
            raise BilectError(f"upper_batch_size: {self.blade.upper_batch_size} examples do not divide into {world} "
                              f"ranks; set {max(size, 1) * world}")  # fmt: skip
        if is_datasets_available() and _is_table(dataset):
            try:
                dataset = self._remove_unused_columns(dataset, description="upper")
            except ValueError as error:
                found = ", ".join(dataset.column_names)
                raise BilectError(f"upper_dataset: the model takes none of its columns ({found}); tokenise it like "
                                  "train_dataset") from error  # fmt: skip
        else:
            collate = self._get_collator_with_removed_columns(collate, description="upper")
        if isinstance(dataset, IterableDataset):
            own = IterableDatasetShard(dataset, size, num_processes=world, process_index=distributed.rank())
            return DataLoader(dataset if world == 1 else own, batch_size=size, collate_fn=collate)
        sampler: Any = DistributedSampler(dataset, seed=self.blade.seed) if world > 1 else None
        return DataLoader(dataset, batch_size=size, shuffle=sampler is None, sampler=sampler, collate_fn=collate)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The selected tokens' mean loss in training; the Trainer's own loss in evaluation and with keep_ratio 1."""
        if self.selector.keep_ratio == 1.0 or not model.training or return_outputs:
            inputs = {k: v for k, v in inputs.items() if k != "source"}
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        # accelerate's mixed precision is tied to the forward function that the selector puts its own in place of
        precision = self.accelerator.autocast() if self.accelerator.native_amp else nullcontext()
        if num_items_in_batch is not None and not self.args.average_tokens_across_devices:
            num_items_in_batch = num_items_in_batch * distributed.world_size()  # it counts this rank's only
        with precision:
            return self.selector.loss(model, inputs, num_items_in_batch)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        folder = os.path.join(self._get_output_dir(trial=trial), f"checkpoint-{self.state.global_step}")
        if not self.args.save_only_model:
            save_selector(Path(folder), self.selector)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.selector.keep_ratio != 1.0:
            names = [*_files_of(self), selector_file(Path(resume_from_checkpoint)).name]
            check_complete(resume_from_checkpoint, names)
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.selector.keep_ratio != 1.0:
            load_selector(Path(checkpoint), self.selector, RESTORE)


def _is_table(dataset: Any) -> bool:
    import datasets

    return isinstance(dataset, datasets.Dataset)


def check_complete(checkpoint: str | Path, names: Iterable[str]) -> None:
    """Files that the ``Trainer`` would do without, in silence, must be in a checkpoint.

    Raises:
        BilectError: names the first that is missing.
    """
    for name in names:
        if not os.path.isfile(os.path.join(checkpoint, name)):
            raise BilectError(f"checkpoint: {checkpoint} has no {name}; {RESTORE}")


def _files_of(trainer: Trainer) -> list[str]:
    rng = f"rng_state_{trainer.args.process_index}.pth" if trainer.args.world_size > 1 else "rng_state.pth"
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:  # those keep the others in folders
        return [TRAINER_STATE_NAME, rng]
    return [TRAINER_STATE_NAME, rng, OPTIMIZER_NAME, SCHEDULER_NAME]
