"""Training and evaluation: the warm-up, the arms of each round, the held-out sets, the proxy's fidelity."""

import json
import math
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr
from transformers import PreTrainedModel

from bilect.config import TrainConfig
from bilect.data.loading import UpperBatches
from bilect.data.tokens import TokenStore
from bilect.errors import BilectError
from bilect.methods import methods_of
from bilect.models.checks import check_models
from bilect.models.flops import forward_flops
from bilect.models.loading import extend_vocabulary, load_causal_lm, padded_vocabulary
from bilect.pipeline.choosing import SAVED, documents_of
from bilect.pipeline.context import Figures, RunContext
from bilect.pipeline.last_good import keep_last_good
from bilect.runtime import distributed
from bilect.runtime.files import write_json
from bilect.runtime.seeds import derive_seed
from bilect.training import evaluation
from bilect.training.curve import HeldoutCurve
from bilect.training.train import NotANumberError, Online, forget_training, train

__all__ = ["PROBE_DOCUMENTS", "evaluate", "fidelity", "online_of", "publish", "train_arm", "warm_up"]

PROBE_DOCUMENTS = 256


def warm_up(run: RunContext, scratch: Path, role: str) -> Figures:
    """Train proxy or target on the warm-up shard."""
    spec = run.config.models.proxy if role == "proxy" else run.config.models.target
    settings = run.config.warmup.proxy if role == "proxy" else run.config.warmup.target
    vocabulary = padded_vocabulary(run.tokenizer)
    seed = derive_seed(run.config.seed, "initial", role)
    context = run.config.data.context
    check_models({f"models.{role}": spec}, run.tokenizer, context=context, place=str(run.root / "tokenizer"))
    model = load_causal_lm(spec, vocab_size=vocabulary, seed=seed, context=context)
    extend_vocabulary(model, run.tokenizer, seed)
    out = scratch / "warmup" / role
    if not settings.steps:  # a pretrained model that is taken as it is
        run.save(model, out)
        return {"tokens": 0, "flops": 0.0}
    pool = run.pool()
    rows, title = run.shard(0, len(pool)), f"warm up the {role}"
    decayed = role == "target"
    labels = ("warm-up", role)
    return _train(run, run.place(model), pool, rows, scratch, out, settings, title, labels, decayed=decayed,
                  weight_R=pool.weight_R)  # fmt: skip


def train_arm(run: RunContext, scratch: Path, number: int, arm: str) -> Figures:
    """Train an arm's target on its documents of the shard, and a decayed copy for evaluation."""
    pool, rows = run.pool(), documents_of(run, arm, number)
    start = run.target_folder(arm, number - 1)
    whole_shard = not methods_of(run.config)[arm].scores_documents
    return _train(
        run,
        run.load_placed(start),
        pool,
        rows,
        scratch,
        scratch / run.target_folder(arm, number),
        run.config.training,
        f"round {number}: train on {arm}",
        ("train", number),
        decayed=True,
        start_from=run.training_of(start),
        weight_R=pool.weight_R if whole_shard else None,
        online=online_of(run, arm),
        curve=_curve(run),
    )


def _curve(run: RunContext) -> HeldoutCurve | None:
    config, curve = run.config, run.config.curve
    if curve.every is None:
        return None
    return HeldoutCurve(
        run.heldout_sets(), curve.every, curve.documents, run.pad_id, config.score_batch_tokens, config.training.bf16
    )


def online_of(run: RunContext, arm: str) -> Online | None:
    """How an arm's training chooses tokens; None where it learns all of them."""
    config = run.config.online_of(arm)
    if config is None:
        return None
    config = config.model_copy(update={"seed": derive_seed(run.config.seed, "online", config.seed)})
    upper = None
    if config.needs_upper_data:
        sets, size = run.upper_sets(), config.upper_batch_size
        seed = derive_seed(run.config.seed, "online upper")
        upper = UpperBatches([s for _, _, s in sets], [w for _, w, _ in sets], size, run.pad_id, seed)
    return Online(config, upper, lambda token: str(run.tokenizer.decode([token])))


def evaluate(run: RunContext, scratch: Path, folder: str) -> Figures:
    """Figures of the decayed copy of a target (or of itself, without a decay branch) on every held-out set.

    In the precision of ``training``, the warm target too: arms are compared with it.
    """
    model, config = run.load_placed(run.evaluated(folder)), run.config
    stores = run.heldout_sets()
    results, flops, tokens = {}, 0.0, 0
    with run.progress.task(f"evaluate {folder}", len(stores)) as task:
        for name, store in stores.items():
            results[name] = evaluation.evaluate(
                model, store, run.pad_id, config.score_batch_tokens, bf16=config.training.bf16
            ).as_dict()
            n_tokens = int(store.length_R.sum())
            flops, tokens = flops + forward_flops(model, n_tokens, n_tokens / len(store)), tokens + n_tokens
            task.advance(1, heldout_loss=results[name]["loss"])
    if distributed.is_main():
        write_json((scratch / folder).with_name("eval.json"), results)
    loss = sum(r["loss"] for r in results.values()) / len(results)
    return {"flops": flops, "tokens": tokens, "heldout_loss": loss}


def fidelity(run: RunContext, scratch: Path, number: int) -> Figures:
    """Does the proxy stand in for the target? Rank correlations over a probe of the shard's documents."""
    pool = run.pool()
    seed = derive_seed(run.config.seed, "probe", number)
    probe = np.sort(np.random.default_rng(seed).permutation(run.shard(number, len(pool)))[:PROBE_DOCUMENTS])
    config = run.config
    goes_on = number > 1 and not getattr(methods_of(config)[config.method].config, "reset_proxy", True)
    start = f"{run.arm_folder(config.method, number - 1)}/{SAVED}/proxy" if goes_on else "warmup/proxy"
    folders = {
        "proxy_before": start,
        "proxy_after": f"{run.arm_folder(config.method, number)}/{SAVED}/proxy",
        "target_before": run.target_folder(config.method, number - 1),
        "target_after": run.target_folder(config.method, number),
    }
    tokens = int(pool.length_R[probe].sum())

    def judged(folder: str) -> tuple[np.ndarray, float]:
        model = run.load_placed(folder)
        losses = evaluation.document_losses(
            model, pool, probe, run.pad_id, config.score_batch_tokens, bf16=config.training.bf16
        )
        task.advance(1)
        return losses, forward_flops(model, tokens, tokens / len(probe))

    with run.progress.task(f"round {number}: proxy fidelity", len(folders)) as task:
        share = map if run.shards else distributed.spread  # a sharded model needs all ranks
        found = dict(zip(folders, share(judged, list(folders.values())), strict=True))
    losses = {name: loss_R for name, (loss_R, _) in found.items()}
    flops = sum(flops for _, flops in found.values())
    result = {
        "round": number,
        "documents": len(probe),
        "loss_rank_correlation": _spearman(losses["proxy_after"], losses["target_before"]),
        "change_rank_correlation": _spearman(
            losses["proxy_after"] - losses["proxy_before"], losses["target_after"] - losses["target_before"]
        ),
    }
    if distributed.is_main():
        write_json(scratch / run.arm_folder(config.method, number) / "fidelity.json", result)
    return {**result, "flops": flops, "tokens": 4 * tokens}


def publish(run: RunContext, scratch: Path) -> Figures:
    """The final models where users look for them: those that the method has, and its target."""
    if distributed.is_main():
        arm, last = run.config.method, run.config.rounds
        fitted = run.root / run.arm_folder(arm, last) / SAVED
        sources = {"proxy": fitted / "proxy", "score_model": fitted / "score_model"}
        sources["target"] = run.root / run.evaluated(run.target_folder(arm, last))
        for name, folder in sources.items():
            if not folder.is_dir():
                continue
            (scratch / name).mkdir(exist_ok=True)
            for file in chain(folder.glob("*.json"), folder.glob("*.safetensors"), folder.glob("*.jinja")):
                (scratch / name / file.name).write_bytes(file.read_bytes())
            if name == "proxy":
                run.tokenizer.save_pretrained(scratch / name)
    return {"flops": 0.0}


def _train(
    run: RunContext,
    model: PreTrainedModel,
    pool: TokenStore,
    rows: np.ndarray,
    scratch: Path,
    out: Path,
    settings: TrainConfig,
    name: str,
    labels: tuple[str | int, ...],
    *,
    decayed: bool,
    start_from: Path | None = None,
    weight_R: np.ndarray | None = None,
    online: Online | None = None,
    curve: HeldoutCurve | None = None,
) -> Figures:
    """Train, then the decay branch; a restart goes on in whichever of the two it was."""
    context, seed = run.config.data.context, derive_seed(run.config.seed, *labels)
    decay_steps = settings.decay_steps if decayed else 0
    before_decay = scratch / ".before-decay.json"  # figures; there once model and optimiser are in ``out``
    out.mkdir(parents=True, exist_ok=True)
    common: dict[str, Any] = {
        "context": context, "device": run.device, "checkpoint_every": run.config.checkpoint_every,
        "weight_R": weight_R, "online": online,
    }  # fmt: skip
    try:
        with run.progress.task(name, settings.steps + decay_steps, unit="steps") as task:
            if before_decay.is_file():
                figures = json.loads(before_decay.read_text(encoding="utf-8"))
                figures["curve_seconds"] = 0.0  # another process spent them
                model = run.place(load_causal_lm(str(out)))
                task.advance(settings.steps)
            else:
                first = {**common, "task": task, "seed": seed, "start_from": start_from, "curve": curve}
                figures = train(model, pool, rows, out, settings, **first)
                run.save(model, out)
                if decay_steps and distributed.is_main():
                    write_json(before_decay, figures)
            forget_training(out)
            if decay_steps:
                distributed.barrier()
                second = {**common, "task": task, "seed": seed + 1, "start_from": out}
                more = train(model, pool, rows, out, settings, decay=True, **second)
                figures = {k: figures[k] + more[k] if k in ("tokens", "flops") else figures[k] for k in figures}
                run.save(model, out.with_name(f"{out.name}-decayed"))
                forget_training(out, decay=True)
    except NotANumberError as error:
        kept = keep_last_good(run, scratch, {"": model}, error.good_step)
        raise BilectError(f"{error} ({name}); lower its learning_rate or grad_clip; {kept}") from error
    return figures


def _spearman(a: np.ndarray, b: np.ndarray) -> float | None:
    if not (np.ptp(a) and np.ptp(b)):
        return None  # a constant has no ranks
    value = float(spearmanr(a, b).statistic)
    return value if math.isfinite(value) else None
