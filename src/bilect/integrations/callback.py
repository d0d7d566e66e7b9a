"""Online token selection for a transformers ``Trainer`` whose class cannot be exchanged: one callback.

trainer = AnyTrainer(model, args, ..., callbacks=[BladeCallback(BladeConfig(keep_ratio=0.6), upper_loader)])
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.modeling_outputs import CausalLMOutput
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from bilect.bilevel.online.selector import OnlineTokenSelector
from bilect.bilevel.online.selector_files import load_selector, save_selector
from bilect.bilevel.online.wrappers import unwrap
from bilect.config.online import BladeConfig
from bilect.runtime import distributed

__all__ = ["BladeCallback"]

_RESTORE = "restore it, resume from another checkpoint, or start anew from the model in it"


class BladeCallback(TrainerCallback):
    """From the beginning of a training to its end, the model called with labels returns the selected tokens' loss.

    It returns no logits then: a trainer that looks at them in training (``SFTTrainer``) has a class of its own here.
    In evaluation mode the model is as ever. Checkpoints hold the selector's state, one file per rank. With FSDP2 take
    ``BladeTrainer``.

    Args:
        blade: the settings.
        upper_loader: batches of the target set, as the model takes them; this rank's part, read over and over.
        reference: see ``OnlineTokenSelector``.

    Attributes:
        selector: the ``OnlineTokenSelector``, once training has begun.
    """

    selector: OnlineTokenSelector

    def __init__(
        self, blade: BladeConfig, upper_loader: Iterable[Mapping[str, Any]] | None = None, reference: Any = None
    ) -> None:
        self.blade, self._upper, self._reference = blade, upper_loader, reference
        self._before: Callable[..., Any] | None = None
        self._inside = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Make the selector, or go on with that of the checkpoint."""
        options = self.blade.selector_options(args.learning_rate)
        if self._reference is not None:
            options["reference"] = self._reference
        self.selector = OnlineTokenSelector(model, self._upper if self.blade.needs_upper_data else None, **options)
        if self.selector.keep_ratio == 1.0:
            return
        if state.global_step:
            load_selector(_folder(args, state), self.selector, _RESTORE)
        base: nn.Module = unwrap(model)
        self._before, own = vars(base).get("forward"), base.forward

        def forward(*given: Any, **inputs: Any) -> Any:
            if self._inside or not base.training or given or inputs.get("labels") is None:
                return own(*given, **inputs)
            self._inside = True
            try:
                return CausalLMOutput(loss=self._loss(base, inputs, args))
            finally:
                self._inside = False

        base.forward = forward

    def _loss(self, base: nn.Module, inputs: dict[str, Any], args: TrainingArguments) -> torch.Tensor:
        items, world = inputs.pop("num_items_in_batch", None), distributed.world_size()
        if items is None:
            return self.selector.loss(base, inputs)
        if args.average_tokens_across_devices:  # it counts all ranks', and is multiplied by their number
            return self.selector.loss(base, inputs, items) / world
        return self.selector.loss(base, inputs, items * world)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Count the step."""
        self.selector.step()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Put the selector's state into the checkpoint."""
        if not args.save_only_model:
            save_selector(_folder(args, state), self.selector)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Give the model its own forward function back."""
        if self.selector.keep_ratio == 1.0:
            return
        base = unwrap(model)
        if self._before is None:
            del base.forward
        else:
            base.forward = self._before


def _folder(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
