"""Downstream tasks: zero-shot accuracies and likelihoods of a saved model, by lm-eval.

A task is a name that lm-eval knows, or a task file (``data/task_files.py``, ``examples/tasks``). A task file over local
data needs no network. No Python is imported for it; but its templates are programs: use only those that you trust.
"""

import difflib
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bilect.data.task_files import is_task_file, read_dataset, read_task_file
from bilect.errors import BilectError, reason
from bilect.models.loading import load_causal_lm, load_tokenizer

__all__ = ["find_tasks", "run_tasks", "standard_error"]

Results = dict[str, dict[str, Any]]


def run_tasks(
    folder: Path,
    names: Sequence[str],
    *,
    limit: int | None = None,
    context: int | None = None,
    batch_tokens: int = 8192,
    device: torch.device | str = "cpu",
) -> tuple[Results, dict[str, Any]]:
    """Evaluate a saved model on tasks.

    Args:
        folder: model and tokenizer in Hugging Face format.
        names: lm-eval names (a group stands for its tasks) or task files.
        limit: first examples of each task; None for all.
        context: greatest input, tokens; more is cut from the left. None: what the model's config says.
        batch_tokens: padded tokens per batch.
        device: to evaluate on.

    Returns:
        By task ``{metric: {"value", "stderr"}, ..., "n": examples}``, with metrics named as in lm-eval: ``acc``,
        ``acc_norm`` (length-normalised: by characters), ``perplexity`` (of a whole answer), ``bits_per_byte`` ...;
        ``stderr`` is None where ``standard_error`` knows none. And the cost: ``tokens``, ``flops`` (of generated text:
        not counted).

    Raises:
        BilectError: a task or the model cannot be loaded, or an answer has no tokens.
    """
    tasks = find_tasks(names, limit)
    from lm_eval.evaluator import evaluate

    from bilect.integrations.lm_eval_model import LMEvalModel

    with _quiet(), torch.random.fork_rng():
        model, tokenizer = load_causal_lm(str(folder)).to(device), load_tokenizer(str(folder))
        results, cost = Results(), {"tokens": 0, "flops": 0.0}
        for name, task in tasks.items():
            torch.manual_seed(0)  # for tasks that sample
            lm = LMEvalModel(model, tokenizer, context, batch_tokens)
            try:
                found = evaluate(lm, {"tasks": {name: task}, "groups": {}}, limit=limit, bootstrap_iters=0)
            except OverflowError as error:
                raise BilectError(f"tasks: {name}: {reason(error)}: lm-eval's perplexity is of whole answers; for long "
                                  "ones use bits_per_byte, as examples/tasks/gsm8k.yaml does") from error  # fmt: skip
            results[name] = _figures(name, task, found)
            cost = {key: cost[key] + getattr(lm, key) for key in cost}
    return results, cost


def _figures(name: str, task: Any, found: Mapping[str, Any]) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for key, value in found["results"][name].items():
        metric, comma, chosen = key.partition(",")  # "acc,none"; other filters of answers stay in the name
        if not comma or metric.endswith("_stderr"):
            continue
        samples = [s[metric] for s in found["samples"][name] if s["filter"] == chosen and metric in s]
        aggregation = getattr(task.aggregation().get(metric), "__name__", "mean")
        figures[metric if chosen == "none" else key] = {
            "value": float(value),
            "stderr": standard_error(aggregation, float(value), samples),
        }
    return {**figures, "n": found["n-samples"][name]["effective"]}


def standard_error(aggregation: str, value: float, samples: Sequence[Any]) -> float | None:
    """Of a metric, by the delta method; in closed form, so that repeating an evaluation repeats it to the last bit.

    With r = sum x_i / sum w_i (w_i = 1 but for metrics per byte or word), e_i = x_i - r w_i and n examples::

        se(r)^2 = n / (n - 1) * sum e_i^2 / (sum w_i)^2,    se(f(r)) = |f'(r)| se(r)

    which is s / sqrt(n) for a mean. (lm-eval bootstraps where f is not the identity.)

    Args:
        aggregation: lm-eval's name of f: mean, perplexity, weighted_perplexity or bits_per_byte.
        value: f(r).
        samples: x_i, or pairs (x_i, w_i).

    Returns:
        None for other aggregations, and for fewer than two examples.
    """
    slopes = {"mean": 1.0, "perplexity": value, "weighted_perplexity": value, "bits_per_byte": 1 / math.log(2)}
    n = len(samples)
    if aggregation not in slopes or n < 2:
        return None
    pair_N2 = np.array([s if isinstance(s, tuple) else (s, 1.0) for s in samples], dtype=float)
    x_N, w_N = pair_N2.T
    e_N = x_N - x_N.sum() / w_N.sum() * w_N
    return float(slopes[aggregation] * math.sqrt(n / (n - 1) * (e_N**2).sum()) / w_N.sum())


def find_tasks(names: Sequence[str], limit: int | None = None) -> dict[str, Any]:
    """lm-eval's task objects by name, with their data, each tried out on its examples; no model is needed.

    Raises:
        BilectError: lm-eval is missing, a name is unknown, or a task, its data or an example is wrong.
    """
    try:
        import datasets
        import lm_eval
    except ImportError as error:
        raise BilectError("tasks: they need the lm-eval library: pip install 'bilect[eval]'") from error
    del lm_eval
    datasets.disable_progress_bars()
    tasks: dict[str, Any] = {}
    for name in names:
        for found in _load(name, limit):
            if found.task_name in tasks:
                raise BilectError(f"tasks.names: two tasks are called {found.task_name!r}; leave one out or rename it")
            tasks[found.task_name] = found
    return tasks


def _load(name: str, limit: int | None) -> list[Any]:
    spec: Any = name
    if is_task_file(name):
        spec, files = read_task_file(name)
        if files:
            spec["custom_dataset"] = partial(read_dataset, files)
    manager = _manager(builtin=isinstance(spec, str))
    if isinstance(spec, str) and spec not in manager.task_index:
        near = difflib.get_close_matches(name, manager.all_tasks, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "`lm-eval ls tasks` lists them; task files end in .yaml"
        raise BilectError(f"tasks.names: lm-eval knows no task {name!r}; {hint}")
    try:
        with _quiet():
            tasks = list(manager.load([spec])["tasks"].values())
            for task in tasks:
                if task.get_config("unsafe_code") or getattr(task, "MULTIMODAL", False):
                    raise BilectError(f"tasks.names: {name}: tasks that run generated code or need images are not run")
                task.set_fewshot_seed(1234)  # lm-eval's own default
                task.build_all_requests(limit=limit)  # fails now where an example or a template is wrong
    except BilectError:
        raise
    except Exception as error:  # lm-eval, jinja2, datasets: each has its own kinds
        raise BilectError(f"tasks.names: cannot use {name}: {reason(error)}") from error
    return tasks


@cache
def _manager(*, builtin: bool) -> Any:
    """lm-eval's index of tasks; that of the built-in ones is made from 15,000 files, in seconds."""
    from lm_eval.tasks import TaskManager

    with _quiet():
        return TaskManager(include_defaults=builtin)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the bars and remarks that lm-eval writes to stderr."""
    with redirect_stderr(io.StringIO()):
        yield
