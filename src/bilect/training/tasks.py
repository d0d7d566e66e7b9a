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

import torch

from bilect.data.task_files import is_task_file, read_dataset, read_task_file
from bilect.errors import BilectError, reason
from bilect.models.loading import load_causal_lm, load_tokenizer
from bilect.training.task_examples import Examples, TaskExamples

__all__ = ["find_tasks", "run_tasks", "task_examples"]

Results = dict[str, dict[str, Any]]


def run_tasks(folder: Path | str, names: Sequence[str], **settings: Any) -> tuple[Results, dict[str, Any]]:
    """Figures of a saved model on tasks; arguments and errors as of ``task_examples``.

    Returns:
        By task ``{metric: {"value", "stderr"}, ..., "n": examples}``, with metrics named as in lm-eval: ``acc``,
        ``acc_norm`` (length-normalised: by characters), ``perplexity`` (of a whole answer), ``bits_per_byte`` ...;
        and ours, ``answer_bits_per_byte``. ``stderr`` is None where none is known (``Examples``). And the cost.
    """
    found, cost = task_examples(folder, names, **settings)
    return {name: task.figures() for name, task in found.items()}, cost


def task_examples(
    folder: Path | str,
    names: Sequence[str],
    *,
    limit: int | None = None,
    context: int | None = None,
    batch_tokens: int = 8192,
    device: torch.device | str = "cpu",
) -> tuple[dict[str, TaskExamples], dict[str, Any]]:
    """Evaluate a saved model on tasks, example by example.

    Where answers are scored, ``answer_bits_per_byte`` is the surprise at the right one, -log2 p over its bytes: it
    moves long before another answer becomes the likeliest.

    Args:
        folder: model and tokenizer in Hugging Face format, or a GGUF file.
        names: lm-eval names (a group stands for its tasks) or task files.
        limit: first examples of each task; None for all.
        context: greatest input, tokens; more is cut from the left. None: what the model's config says.
        batch_tokens: padded tokens per batch.
        device: to evaluate on.

    Returns:
        Every metric by task; and the cost: ``tokens``, ``flops`` (of generated text: not counted).

    Raises:
        BilectError: a task or the model cannot be loaded, or an answer has no tokens.
    """
    tasks = find_tasks(names, limit)
    from lm_eval.evaluator import evaluate

    from bilect.integrations.lm_eval_model import LMEvalModel

    with _quiet(), torch.random.fork_rng():
        model, tokenizer = load_causal_lm(str(folder)).to(device), load_tokenizer(str(folder))
        results, cost = dict[str, TaskExamples](), {"tokens": 0, "flops": 0.0}
        for name, task in tasks.items():
            torch.manual_seed(0)  # for tasks that sample
            lm = LMEvalModel(model, tokenizer, context, batch_tokens)
            try:
                found = evaluate(lm, {"tasks": {name: task}, "groups": {}}, limit=limit, bootstrap_iters=0)
            except OverflowError as error:
                raise BilectError(f"tasks: {name}: {reason(error)}: lm-eval's perplexity is of whole answers; for long "
                                  "ones leave it out: answer_bits_per_byte is there anyway") from error  # fmt: skip
            results[name] = _examples(name, task, found)
            cost = {key: cost[key] + getattr(lm, key) for key in cost}
    return results, cost


def _examples(name: str, task: Any, found: Mapping[str, Any]) -> TaskExamples:
    metrics: dict[str, Examples] = {}
    for key, value in found["results"][name].items():
        metric, comma, chosen = key.partition(",")  # "acc,none"; other filters of answers stay in the name
        if not comma or metric.endswith("_stderr"):
            continue
        samples = [s[metric] for s in found["samples"][name] if s["filter"] == chosen and metric in s]
        aggregation = getattr(task.aggregation().get(metric), "__name__", "mean")
        metrics[metric if chosen == "none" else key] = Examples(aggregation, float(value), samples)
    answers = [_right_answer(task, s) for s in found["samples"][name] if s["filter"] == "none"]
    pairs = [pair for pair in answers if pair is not None]
    if pairs and len(pairs) == len(answers):
        bits, n_bytes = map(sum, zip(*pairs, strict=True))
        metrics["answer_bits_per_byte"] = Examples("mean", bits / n_bytes, pairs)
    return TaskExamples(found["n-samples"][name]["effective"], metrics)


def _right_answer(task: Any, sample: Mapping[str, Any]) -> tuple[float, int] | None:
    """Bits and bytes of the right answer; None where none is scored, or several are right."""
    if task.OUTPUT_TYPE == "loglikelihood":
        right = 0
    elif task.OUTPUT_TYPE == "multiple_choice" and not task.multiple_input:
        right, choices = sample["target"], task.doc_to_choice(sample["doc"])
        right = choices.index(right) if right in choices else right
    else:
        return None
    if not isinstance(right, int) or not 0 <= right < len(sample["arguments"]):
        return None
    answer = sample["arguments"][right][1].strip()
    log_likelihood, _ = sample["filtered_resps"][right]
    return -log_likelihood / math.log(2), max(len(answer.encode()), 1)


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
