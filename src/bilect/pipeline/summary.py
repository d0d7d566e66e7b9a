"""A run in numbers: ``summary.json`` for programs, a table and a verdict for people."""

import json
from pathlib import Path
from typing import Any

from bilect.config import Config
from bilect.methods import methods_of
from bilect.methods.contract import Method
from bilect.pipeline.context import arm_folder

__all__ = ["choosing_stages", "summarise", "verdict"]


def summarise(out: Path, config: Config, manifest: dict[str, Any]) -> dict[str, Any]:
    """The summary of a finished run.

    Held-out losses are means per token over the held-out sets, of decayed copies, after the last round; ``tokens`` of
    the arms are equal by construction. ``seconds`` and ``flops`` are per stage; ``cost`` sums up what choosing takes
    (``selection`` by the run's method, ``choosing NAME`` by a control: proxy warm-up, fit, score, select) and the
    training of each arm. ``tasks`` (where the config names some) are downstream results of the same models.

    Args:
        out: the run directory.
        config: of the run.
        manifest: content of ``run.json``.
    """
    records = manifest["stages"]
    arms, last = list(config.arms), config.rounds
    evaluations = {"warm": _read(out / "warmup" / "eval.json")}
    for arm in arms:
        evaluations[arm] = _read(out / arm_folder(config, arm, last) / "eval.json")
    rounds = []
    for number in range(1, last + 1):
        select = records[f"round {number}: select {config.method}"]
        folders = {arm: out / arm_folder(config, arm, number) for arm in arms}
        rounds.append(
            {
                "round": number,
                "heldout_loss": {arm: _mean_loss(_read(folder / "eval.json")) for arm, folder in folders.items()},
                "documents_kept": select["documents"],
                "tokens_kept": select["tokens"],
                "threshold": select["threshold"],
                "kept_share_by_source": select["kept_share_by_source"],
                "pool_share_by_source": select["pool_share_by_source"],
                "kept_fraction_by_source": select["kept_fraction_by_source"],
            }
        )
    fidelity = [_read(out / arm_folder(config, config.method, n) / "fidelity.json") for n in range(1, last + 1)
                if f"round {n}: fidelity" in records]  # fmt: skip
    losses = {name: _mean_loss(sets) for name, sets in evaluations.items()}
    summary = {
        "method": config.method,
        "heldout_loss": losses,
        "heldout": evaluations,
        "tokens": {
            "pool": records["tokenise pool"]["tokens"],
            "upper": records["tokenise upper"]["tokens"],
            "warmup_proxy": records["warm up proxy"]["tokens"],
            "warmup_target": records["warm up target"]["tokens"],
            "fit": _total(records, "tokens", f"fit {config.method}"),
            "scored": _total(records, "tokens", f"score {config.method}"),
            "selected": _total(records, "tokens", f"select {config.method}"),
            **{arm: _total(records, "tokens", f"train {arm}") for arm in arms},
        },
        "seconds": _costs(records, "seconds"),
        "flops": _costs(records, "flops"),
        "cost": {key: _sums(records, key, config) for key in ("seconds", "flops")},
        **{key: rounds[-1][key] for key in ("kept_share_by_source", "pool_share_by_source", "kept_fraction_by_source")},
        "skipped": {part: records[f"tokenise {part}"].get("skipped", {}) for part in ("pool", "held-out", "upper")},
        "fidelity": fidelity,
        "rounds": rounds,
    }
    if config.tasks.names:
        folders = {"warm": out / "warmup", **{arm: out / arm_folder(config, arm, last) for arm in arms}}
        summary["tasks"] = {arm: _read(folder / "tasks.json") for arm, folder in folders.items()}
    summary["verdict"] = verdict(losses, config.method)
    return summary


def verdict(losses: dict[str, float], method: str) -> str:
    """One honest sentence on selection against random."""
    if "random" not in losses:
        return f"Held-out loss {losses[method]:.3f}; no random control was run."
    gain = losses["random"] - losses[method]
    word = "lower" if gain > 0 else "higher"
    sentence = (
        f"At equal training tokens, selection ends at a held-out loss of {losses[method]:.3f}, "
        f"{abs(gain):.3f} nats {word} than random selection ({losses['random']:.3f})."
    )
    return sentence if gain > 0 else f"{sentence} Selection did not help on this pool and target."


def _costs(records: dict[str, Any], key: str) -> dict[str, float]:
    costs = {name: round(float(record.get(key, 0.0)), 3) for name, record in records.items()}
    return {**costs, "total": round(sum(costs.values()), 3)}


def choosing_stages(method: Method[Any]) -> tuple[str, ...]:
    """What the stages end with in which an arm chooses its documents; of all rounds."""
    if not method.scores_documents:
        return ()
    proxy = ("warm up proxy",) if method.uses_proxy else ()
    return (*proxy, *(f": {what} {method.name}" for what in ("fit", "score", "select")))


def _sums(records: dict[str, Any], key: str, config: Config) -> dict[str, float]:
    methods = methods_of(config)
    parts = {"selection": choosing_stages(methods[config.method])}
    parts |= {arm: (f": train {arm}",) for arm in methods}
    # of random no cost is told: it would be chosen without these files
    parts |= {f"choosing {arm}": ends for arm, method in methods.items()
              if arm not in (config.method, "random") and (ends := choosing_stages(method))}  # fmt: skip
    return {
        name: round(sum(_spent(r, key) for stage, r in records.items() if stage.endswith(ends)), 3)
        for name, ends in parts.items()
    }


def _spent(record: dict[str, Any], key: str) -> float:
    """A learning curve is measured within the training, and is no part of it."""
    return float(record.get(key, 0.0)) - (float(record.get("curve_seconds", 0.0)) if key == "seconds" else 0.0)


def _total(records: dict[str, Any], key: str, stage: str) -> int:
    return int(sum(r.get(key, 0) for n, r in records.items() if n.endswith(f": {stage}")))


def _mean_loss(sets: dict[str, Any]) -> float:
    return sum(s["loss"] for s in sets.values()) / len(sets)


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
