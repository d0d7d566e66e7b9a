"""Is the selection what the theory says? The estimators against exact solutions: ``bilect verify``, docs/verify.md."""

from bilect.verify.run import run_verify

__all__ = ["run_verify"]
