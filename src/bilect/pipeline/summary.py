"""A run in numbers: ``summary.json`` for programs, a table and a verdict for people."""

import json
from pathlib import Path
from typing import Any

from bilect.config import Config

__all__ = ["summarise", "verdict"]


def summarise(out: Path, config: Config, manifest: dict[str, Any]) -> dict[str, Any]:
    """The summary of a finished run.

    Held-out losses are means per token over the held-out sets, of decayed copies, after the last round; ``tokens`` of
    the arms are equal by construction. ``seconds`` and ``flops`` are per stage; ``cost`` sums up what choosing takes
    (``selection``: proxy warm-up, fit, score, select) and the training of each arm. ``tasks`` (where the config names
    some) are the results on downstream tasks, of the same models.

    Args:
        out: the run directory.
        config: of the run.
        manifest: content of ``run.json``.
    """
    records = manifest["stages"]
    arms = ["bliss", *config.controls]
    last = config.rounds
    evaluations = {"warm": _read(out / "warmup" / "eval.json")}
    for arm in arms:
        evaluations[arm] = _read(_folder(out, arm, last) / "eval.json")
    rounds = []
    for number in range(1, last + 1):
        select = records[f"round {number}: select"]
        rounds.append(
            {
                "round": number,
                "heldout_loss": {arm: _mean_loss(_read(_folder(out, arm, number) / "eval.json")) for arm in arms},
                "documents_kept": select["documents"],
                "tokens_kept": select["tokens"],
                "threshold": select["threshold"],
                "kept_share_by_source": select["kept_share_by_source"],
                "pool_share_by_source": select["pool_share_by_source"],
                "kept_fraction_by_source": select["kept_fraction_by_source"],
            }
        )
    fidelity = [_read(out / f"round-{n}" / "fidelity.json") for n in range(1, last + 1)]
    losses = {name: _mean_loss(sets) for name, sets in evaluations.items()}
    summary = {
        "heldout_loss": losses,
        "heldout": evaluations,
        "tokens": {
            "pool": records["tokenise pool"]["tokens"],
            "upper": records["tokenise upper"]["tokens"],
            "warmup_proxy": records["warm up proxy"]["tokens"],
            "warmup_target": records["warm up target"]["tokens"],
            "fit": _total(records, "tokens", "fit"),
            "scored": _total(records, "tokens", "score"),
            "selected": _total(records, "tokens", "select"),
            **{arm: _total(records, "tokens", f"train {arm}") for arm in arms},
        },
        "seconds": _costs(records, "seconds"),
        "flops": _costs(records, "flops"),
        "cost": {key: _sums(records, key, arms) for key in ("seconds", "flops")},
        **{key: rounds[-1][key] for key in ("kept_share_by_source", "pool_share_by_source", "kept_fraction_by_source")},
        "skipped": {part: records[f"tokenise {part}"].get("skipped", {}) for part in ("pool", "held-out", "upper")},
        "fidelity": fidelity,
        "rounds": rounds,
    }
    if config.tasks.names:
        folders = {"warm": out / "warmup", **{arm: _folder(out, arm, last) for arm in arms}}
        summary["tasks"] = {arm: _read(folder / "tasks.json") for arm, folder in folders.items()}
    summary["verdict"] = verdict(losses)
    return summary


def verdict(losses: dict[str, float]) -> str:
    """One honest sentence on selection against random."""
    if "random" not in losses:
        return f"Held-out loss {losses['bliss']:.3f}; no random control was run."
    gain = losses["random"] - losses["bliss"]
    word = "lower" if gain > 0 else "higher"
    sentence = (
        f"At equal training tokens, selection ends at a held-out loss of {losses['bliss']:.3f}, "
        f"{abs(gain):.3f} nats {word} than random selection ({losses['random']:.3f})."
    )
    return sentence if gain > 0 else f"{sentence} Selection did not help on this pool and target."


def _costs(records: dict[str, Any], key: str) -> dict[str, float]:
    costs = {name: round(float(record.get(key, 0.0)), 3) for name, record in records.items()}
    return {**costs, "total": round(sum(costs.values()), 3)}


def _sums(records: dict[str, Any], key: str, arms: list[str]) -> dict[str, float]:
    parts: dict[str, tuple[str, ...]] = {"selection": ("warm up proxy", ": fit", ": score", ": select")}
    parts |= {arm: (f": train {arm}",) for arm in arms}
    for arm in arms:
        if chosen := [r for stage, r in records.items() if stage.endswith(f": choose {arm}")]:
            proxy = ("warm up proxy",) if chosen[0].get("uses_proxy") else ()
            parts[f"choosing {arm}"] = (*proxy, f": choose {arm}")
    return {
        name: round(sum(_spent(r, key) for stage, r in records.items() if stage.endswith(ends)), 3)
        for name, ends in parts.items()
    }


def _spent(record: dict[str, Any], key: str) -> float:
    """A learning curve is measured within the training, and is no part of it."""
    return float(record.get(key, 0.0)) - (float(record.get("curve_seconds", 0.0)) if key == "seconds" else 0.0)


def _total(records: dict[str, Any], key: str, stage: str) -> int:
    return int(sum(r[key] for n, r in records.items() if n.endswith(f": {stage}")))


def _folder(out: Path, arm: str, number: int) -> Path:
    return out / f"round-{number}" if arm == "bliss" else out / "controls" / arm / f"round-{number}"


def _mean_loss(sets: dict[str, Any]) -> float:
    return sum(s["loss"] for s in sets.values()) / len(sets)


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
