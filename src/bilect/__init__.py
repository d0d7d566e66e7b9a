"""bilect: choose training data for language models by bilevel optimisation.

After ``import bilect`` a saved score model loads with ``transformers.AutoModel.from_pretrained``.
"""

import importlib
from typing import Any

from bilect.models import registration

__version__ = "0.1.0"

_PUBLIC = {
    "BilectError": "bilect.errors",
    "BilevelFit": "bilect.bilevel.offline.fit",
    "BladeConfig": "bilect.config.online",
    "BladeTrainer": "bilect.integrations.trainer",
    "CausalLM": "bilect.models.causal_lm",
    "Chooser": "bilect.pipeline.chooser",
    "Chosen": "bilect.pipeline.choose",
    "Config": "bilect.config",
    "FitConfig": "bilect.config",
    "OnlineTokenSelector": "bilect.bilevel.online.selector",
    "ScoreModel": "bilect.models.score_model",
    "ScoreModelConfig": "bilect.models.score_model",
    "choose": "bilect.pipeline.choose",
    "load_causal_lm": "bilect.models.loading",
    "load_config": "bilect.config",
    "plan_run": "bilect.pipeline.plan",
    "run": "bilect.pipeline.stages",
    "score_files": "bilect.pipeline.reuse",
    "select_again": "bilect.pipeline.reuse",
    "write_report": "bilect.report",
}

__all__ = ["__version__", *sorted(_PUBLIC)]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'bilect' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__


registration.register_with_transformers()
