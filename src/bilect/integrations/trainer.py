"""Online token selection in scripts that use the transformers ``Trainer``: exchange the class, add two arguments.

trainer = BladeTrainer(model, args, train_dataset=..., blade=BladeConfig(keep_ratio=0.6), upper_dataset=...)
"""

import os
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from bilect.bilevel.online.selector import OnlineTokenSelector
from bilect.config.online import BladeConfig
from bilect.errors import BilectError
from bilect.runtime import distributed

__all__ = ["BladeConfig", "BladeTrainer"]


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
        model: a causal LM.
        args: as for ``Trainer``. A column ``source`` for the diagnostics needs ``remove_unused_columns=False``.
        blade: the settings.
        upper_dataset: examples of the target set, a ``torch.utils.data.Dataset`` in the form of ``train_dataset``.
        reference: a fixed reference, for method "rho1", or a function that makes one; see ``OnlineTokenSelector``.
        **kwargs: as for ``Trainer``.

    Attributes:
        selector: the ``OnlineTokenSelector``, with ``diagnostics``.

    Raises:
        BilectError: upper data is needed and missing, or the model's form is not known.
    """

    def __init__(
        self,
        model: nn.Module,
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
        options = self.blade.selector_options(self.args.learning_rate)
        if reference is not None:
            options["reference"] = reference
        self.selector = OnlineTokenSelector(self.model, self._upper_loader(upper_dataset), **options)
        self.add_callback(_Steps(self.selector))

    def _upper_loader(self, dataset: Any) -> Iterable[Any] | None:
        if dataset is None:
            return None
        sampler: Any = None
        if distributed.world_size() > 1:
            sampler = DistributedSampler(dataset, seed=self.blade.seed)
        size = self.blade.upper_batch_size
        return DataLoader(
            dataset, batch_size=size, shuffle=sampler is None, sampler=sampler, collate_fn=self.data_collator
        )

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
            torch.save(self.selector.state_dict(), self._selector_file(folder))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and os.path.isfile(self._selector_file(checkpoint)):
            state = torch.load(self._selector_file(checkpoint), map_location="cpu", weights_only=True)
            self.selector.load_state_dict(state)

    def _selector_file(self, folder: str) -> str:
        return os.path.join(folder, f"selector-{distributed.rank()}.pt")
