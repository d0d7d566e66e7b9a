"""Online token selection in scripts that use TRL's ``SFTTrainer``: exchange the class, add two arguments.

trainer = BladeSFTTrainer(model, args, train_dataset=..., blade=BladeConfig(keep_ratio=0.6), upper_dataset=...)
"""

from typing import Any

from bilect.integrations.trainer import BladeTrainer

try:
    from trl import SFTTrainer
except ImportError as error:
    raise ImportError(f"BladeSFTTrainer needs TRL: pip install 'bilect[trl]' ({error})") from error

__all__ = ["BladeSFTTrainer"]


class BladeSFTTrainer(BladeTrainer, SFTTrainer):
    """An ``SFTTrainer`` whose training loss is that of the selected tokens; evaluation is untouched.

    Args:
        *args: as for ``SFTTrainer``.
        upper_dataset: examples of the target set, in any form that ``SFTTrainer`` takes for ``train_dataset``, such as
            text, conversations, or prompt and completion; prepared as that is, but not packed.
        formatting_func: as for ``SFTTrainer``; upper data goes through it too.
        **kwargs: as for ``SFTTrainer`` and ``BladeTrainer``.
    """

    def __init__(self, *args: Any, upper_dataset: Any = None, formatting_func: Any = None, **kwargs: Any) -> None:
        self._formatting = formatting_func
        super().__init__(*args, upper_dataset=upper_dataset, formatting_func=formatting_func, **kwargs)

    def _upper_loader(self, dataset: Any) -> Any:
        prepared = self._prepare_dataset(dataset, self.processing_class, self.args, False, self._formatting, "upper")
        return super()._upper_loader(prepared)
