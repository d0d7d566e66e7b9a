"""The answer in words: which method, how much it gains, and whether that is worth its cost."""

from collections.abc import Mapping
from typing import Any

__all__ = ["cost_ratio", "verdict"]


def verdict(variant: Mapping[str, Any]) -> list[str]:
    """Sentences on one variant of a comparison; intervals are those of single comparisons, at 95%."""
    arms, best = variant["arms"], variant["best"]
    where = f"on {variant['loss_on']}" if variant["loss_on"] else "over all held-out sets"
    gain = arms[best]["minus_random"]
    helps = [a for a, f in arms.items() if a not in ("warm", "random", "full") and _below(f["minus_random"])]
    if best == "random":
        worse = [a for a, f in arms.items() if a not in ("warm", "random") and _above(f["minus_random"])]
        told = f"; told apart, and higher: {', '.join(worse)}" if worse else ""
        return [f"No arm is below random {where} ({arms['random']['loss']['mean']:.3f}){told}."]
    if not _below(gain):
        known = f"; {', '.join(helps)} is, and lower" if helps else ""
        return [f"Random ends at {arms['random']['loss']['mean']:.3f} {where}; the lowest arm, {best}, is not told "
                f"apart from it by {gain['n']} seeds{known}."]  # fmt: skip
    sentences = [f"Lowest {where} is {best}: {arms[best]['loss']['mean']:.3f}, {_amount(gain)} below random"
                 + ("." if best == "full" else f" and {_against(arms[best]['minus_full'])} full.")]  # fmt: skip
    close = [a for a, f in arms.items() if a not in ("warm", best) and (f["minus_best"]["low"] or 0) <= 0]
    if close:
        sentences.append(f"Not told apart from it: {', '.join(close)}.")
    if best == "full":
        if all(a in ("random", "full") for a in close):
            sentences.append("Where all of the pool does best, choosing from it does not pay.")
        return sentences
    speed = arms[best]["speedup"]
    with_choosing, without = speed["flops_with_choosing"], speed["flops"]
    if gain["n"] == with_choosing["n"]:
        apart = f" ({_times(without['mean'])} without)" if arms[best]["cost"]["choosing"]["flops"]["mean"] else ""
        sentences.append(f"It comes down to random's final loss with {_times(with_choosing['mean'])} FLOPs, "
                         f"choosing included{apart}.")  # fmt: skip
    cheap = min((a for a in [best, *close] if a not in ("full", "random")), key=lambda a: cost_ratio(arms, a))
    if cheap != best:
        sentences.append(f"Cheapest of these is {cheap}: {cost_ratio(arms, cheap):.2f} times random's FLOPs, "
                         f"against {cost_ratio(arms, best):.2f}.")  # fmt: skip
    return sentences


def cost_ratio(arms: Mapping[str, Any], arm: str, key: str = "flops") -> float:
    """Choosing and training of an arm over the training of random."""
    cost = arms[arm]["cost"]
    spent = float(cost["choosing"][key]["mean"] + cost["training"][key]["mean"])
    return spent / float(arms["random"]["cost"]["training"][key]["mean"])


def _below(difference: Mapping[str, Any]) -> bool:
    return difference["high"] is not None and difference["high"] < 0


def _times(ratio: float) -> str:
    return f"{ratio:.2f} times fewer" if ratio > 1 else f"{1 / ratio:.2f} times as many"


def _above(difference: Mapping[str, Any]) -> bool:
    return difference["low"] is not None and difference["low"] > 0


def _amount(difference: Mapping[str, Any]) -> str:
    return f"{-difference['mean']:.3f} ({-difference['high']:.3f} to {-difference['low']:.3f})"


def _against(difference: Mapping[str, Any]) -> str:
    if difference["mean"] < 0:
        return f"{_amount(difference)} below"
    return f"{difference['mean']:.3f} ({difference['low']:.3f} to {difference['high']:.3f}) above"
