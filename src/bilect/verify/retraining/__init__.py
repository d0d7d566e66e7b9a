"""Do scores predict what retraining really does? ``bilect verify --retrain CONFIG``, docs/verify.md."""

from bilect.verify.retraining.study import run_retraining

__all__ = ["run_retraining"]
