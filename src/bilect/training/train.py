"""Plain language-model training through the transformers ``Trainer``, on packed windows, with a decay branch."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainingArguments

from bilect.bilevel.cost import selecting_flops
from bilect.bilevel.online.selector import OnlineTokenSelector
from bilect.bilevel.online.selector_files import read_selector, save_selector
from bilect.config import TrainConfig
from bilect.config.online import BladeConfig
from bilect.data.loading import PackedWindows, UpperBatches
from bilect.data.tokens import TokenStore
from bilect.errors import BilectError
from bilect.models.flops import forward_flops
from bilect.runtime import distributed
from bilect.runtime.checkpoints import load_state
from bilect.runtime.files import write_json
from bilect.runtime.progress import Task
from bilect.runtime.sharding import has_shards, shard, whole
from bilect.training.curve import CurveCallback, HeldoutCurve, points
from bilect.training.trainer import (
    FusedLoss,
    NotANumberError,
    OptimizerTrainer,
    SelectingTrainer,
    Watch,
    forget_checkpoints,
    newest_checkpoint,
)

__all__ = ["NotANumberError", "Online", "forget_training", "per_rank_batch", "train"]

OPTIMIZER_FILE = "optimizer.pt"
ONLINE_FILE = "online.json"  # beside it, once the selection's states are there


@dataclass(frozen=True)
class Online:
    """Choice of tokens inside a training.

    Attributes:
        config: of the selection.
        upper: the target set, where a reference is trained.
        decode: text of a token, for the report.
    """

    config: BladeConfig
    upper: UpperBatches | None
    decode: Callable[[int], str]


def train(
    model: PreTrainedModel,
    store: TokenStore,
    rows: np.ndarray,
    folder: Path,
    config: TrainConfig,
    *,
    context: int,
    seed: int,
    task: Task,
    checkpoint_every: int,
    start_from: Path | None = None,
    decay: bool = False,
    device: torch.device | None = None,
    weight_R: np.ndarray | None = None,
    online: Online | None = None,
    curve: HeldoutCurve | None = None,
) -> dict[str, Any]:
    """Train ``model`` in place and, on the main rank, keep its optimiser state and its losses in ``folder``.

    With ``online`` the state of the selection is kept too, by every rank, and goes on where the training does.

    Goes on from the checkpoint that an interrupted call has left in ``folder``, to the same result; ``forget_training``
    removes it once the result is kept. Another number of ranks may go on from it.

    Args:
        model: a causal LM; it may be sharded (``runtime.sharding``).
        store: token rows.
        rows: documents to train on, packed in random order.
        folder: gets ``optimizer.pt`` and ``training.jsonl``; with ``online`` also ``selector-RANK.pt`` and, of what the
            selection did, ``online.json``; with ``curve`` its points, ``heldout.jsonl``.
        config: steps, schedule and so on.
        context: tokens per window.
        seed: of the order of documents.
        task: progress.
        checkpoint_every: steps between two checkpoints, rounded down to a multiple of the steps between two logged
            losses, so that no logged mean reaches over a checkpoint; fewer steps in all write none.
        start_from: folder of an earlier stage whose optimiser state goes on (then without warm-up).
        decay: the decay branch: ``decay_steps`` steps with a learning rate falling linearly to zero.
        device: where to train.
        weight_R: how often a pass has each row of the store; None: once.
        online: choose tokens; None: learn all of them.
        curve: what is measured on the way.

    Returns:
        ``tokens``, ``flops``, ``steps``, ``passes`` over the rows, the last logged ``loss``, and ``curve_seconds`` that
        this call spent on measuring the curve, which is no part of the training.

    Raises:
        NotANumberError: at the first loss that is none; ``model`` then holds the last good weights.
        BilectError: nothing to train on, or a checkpoint or optimiser state that cannot be read.
    """
    steps = config.decay_steps if decay else config.steps
    state_file = None if start_from is None else start_from / OPTIMIZER_FILE
    per_rank = per_rank_batch(config.batch_size, config.gradient_accumulation)
    n_windows = steps * config.batch_size
    windows = PackedWindows(store, rows, context, n_windows, seed, weight_R, label_sources=online is not None)
    warmup_steps = 0 if state_file is not None else int(config.warmup_ratio * steps)
    if decay:
        schedule = "linear"
    else:
        schedule = "cosine" if config.schedule == "cosine" else "constant_with_warmup"
    logging_steps = max(steps // 50, 1)
    save_steps = max(checkpoint_every // logging_steps, 1) * logging_steps
    output = _trainer_folder(folder, decay)
    arguments = TrainingArguments(
        output_dir=str(output),
        max_steps=steps,
        per_device_train_batch_size=per_rank,
        gradient_accumulation_steps=config.gradient_accumulation,
        learning_rate=config.learning_rate,
        lr_scheduler_type=schedule,
        warmup_steps=warmup_steps,
        weight_decay=config.weight_decay,
        max_grad_norm=config.grad_clip,
        bf16=config.bf16,
        seed=seed,
        data_seed=seed,
        use_cpu=device is not None and device.type == "cpu",
        report_to=list(config.report_to) or "none",
        save_strategy="steps" if save_steps < steps else "no",
        save_steps=save_steps,
        logging_steps=logging_steps,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        dataloader_num_workers=0,
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
    )
    checkpoint = newest_checkpoint(output)
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        common: dict[str, Any] = {"args": arguments, "train_dataset": windows, "callbacks": [Watch(task, model)]}
        selector: OnlineTokenSelector | None = None
        carried: dict[str, Any] = {}
        if online is None:
            trainer = OptimizerTrainer(model=FusedLoss(model).train(), **common)
        else:
            another = partial(_another, model, arguments.device) if has_shards(model) else None
            trainer = SelectingTrainer(
                model.train(),
                blade=online.config,
                upper_dataset=online.upper,
                reference=another if online.config.needs_upper_data else None,
                **common,
            )
            selector = trainer.selector
        trainer.remove_callback(transformers.PrinterCallback)
        measuring = None if curve is None else CurveCallback(curve, model, trainer)
        if measuring is not None:
            trainer.add_callback(measuring)
        remedy = "restore it, or start again in a new run directory"
        if state_file is not None and checkpoint is None:
            trainer.optimizer_state = load_state(state_file, remedy)
        if selector is not None and start_from is not None and (start_from / ONLINE_FILE).is_file():
            carried = read_selector(start_from, selector, remedy)
            if checkpoint is None:
                selector.load_state_dict(carried)
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    finally:
        model.eval()
        transformers.logging.set_verbosity(verbosity)
    keys = ("step", "loss", "learning_rate")
    history = [{k: entry.get(k) for k in keys} for entry in trainer.state.log_history if "loss" in entry]
    state = None if decay else whole(trainer.optimizer.state_dict())
    if distributed.is_main() and state is not None:
        torch.save(state, folder / OPTIMIZER_FILE)
    if distributed.is_main():
        name = "decay.jsonl" if decay else "training.jsonl"
        _write_lines(folder / name, history)
    if curve is not None and distributed.is_main():
        _write_lines(folder / "heldout.jsonl", points(trainer.state.log_history))
    tokens = n_windows * context
    flops = 3 * forward_flops(model, tokens, context)
    if online is not None and selector is not None:
        if not decay:
            save_selector(folder, selector)
            if distributed.is_main():
                write_json(folder / ONLINE_FILE, _account(online, selector))
        world = distributed.world_size()
        made = selector.synchronisations - carried.get("synchroniser", {}).get("count", 0)
        upper_tokens = online.upper.tokens if online.upper is not None else 0
        flops += selecting_flops(online.config, model, tokens=tokens, context=context, upper_tokens=upper_tokens,
                                 batch_tokens=per_rank * context * world, synchronisations=made)  # fmt: skip
    return {
        "tokens": tokens,
        "flops": flops,
        "steps": steps,
        "passes": round(windows.passes, 3),
        "loss": history[-1]["loss"] if history else None,
        "curve_seconds": round(measuring.seconds, 3) if measuring is not None else 0.0,
    }


def _another(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """Another sharded model like this one, which cannot be copied."""
    twin: PreTrainedModel = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32)
    shard(twin, device)
    return twin


def per_rank_batch(batch_size: int, gradient_accumulation: int = 1, name: str = "batch_size") -> int:
    """Sequences of one micro-batch on one rank, from those of a step.

    Raises:
        BilectError: they do not divide evenly.
    """
    parts = distributed.world_size() * gradient_accumulation
    if batch_size % parts:
        nearest = max(round(batch_size / parts), 1) * parts
        raise BilectError(f"{name}: a step of {batch_size} sequences does not divide into {distributed.world_size()} "
                          f"ranks x {gradient_accumulation} micro-batches (gradient_accumulation); set {nearest}"
                          )  # fmt: skip
    return batch_size // parts


def _write_lines(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def forget_training(folder: Path, *, decay: bool = False) -> None:
    """Remove the checkpoints of a ``train`` whose result is kept; what trackers have written there stays."""
    output = _trainer_folder(folder, decay)
    forget_checkpoints(output)
    if distributed.is_main() and output.parent.is_dir() and not any(output.parent.iterdir()):
        output.parent.rmdir()


def _account(online: Online, selector: OnlineTokenSelector) -> dict[str, Any]:
    """What the selection did so far, earlier rounds included: its diagnostics, with the text of tokens."""

    def entry(seen: dict[str, Any]) -> dict[str, Any]:
        documents = [{"text": [online.decode(i) for i in d["tokens"]], "delta": d["delta"], "mask": d["mask"]}
                     for d in seen["documents"]]  # fmt: skip
        return {**seen, "documents": documents}

    used = {"method", "keep_ratio", *(["reference_steps"] if online.config.needs_upper_data else []),
            *(["sync_every"] if online.config.method == "blade" else [])}  # fmt: skip
    return {
        **online.config.model_dump(include=used),
        "synchronisations": selector.synchronisations,
        "entries": [*map(entry, selector.diagnostics)],
    }


def _trainer_folder(folder: Path, decay: bool) -> Path:
    return folder / "trainer" / ("decay" if decay else "main")
