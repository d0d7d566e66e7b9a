"""The verdict: one sentence on selection against random, and how sure it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from bilect.report.heldout import DocumentLosses, document_losses
from bilect.report.inputs import Json, RunFiles, mapping, number
from bilect.report.wording import OWN, arm_name, decimal, signed, tokens_of, whole

__all__ = ["Verdict", "of_run", "paired_interval", "sentence"]

FEW_SETS = 5  # below, an interval over sets says nothing
DRAWS = 1000


@dataclass(frozen=True)
class Verdict:
    """better | worse | equal | unknown | chosen, the sentence, and what qualifies it."""

    kind: str
    sentence: str
    notes: Sequence[str] = field(default_factory=list)


def of_run(run: RunFiles) -> Verdict:
    """The verdict on a run, or what it chose if it trained nothing."""
    if run.only_chose:
        return Verdict("chosen", _chosen(run), ["Nothing was trained here: whether the choice helps is not known yet."])
    subject = "bilect’s" if run.main in OWN else f"{arm_name(run.main)}’s"
    kind, said = sentence(run.losses, mapping(run.summary.get("tokens")), run.main, subject)
    return Verdict(kind, said, [] if kind == "unknown" else [_uncertainty(run)])


def sentence(losses: Mapping[str, float], tokens: Json, main: str, subject: str) -> tuple[str, str]:
    """(better | worse | equal | unknown, the sentence): the main arm's held-out loss against random selection's."""
    if main not in losses or "random" not in losses:
        absent = " and ".join(
            word for arm, word in ((main, subject), ("random", "random selection’s")) if arm not in losses
        )
        return "unknown", f"No verdict: {absent} held-out loss is missing."
    ours, random = losses[main], losses["random"]
    difference = ours - random
    our_tokens, their_tokens = tokens_of(main, tokens), tokens_of("random", tokens)
    if our_tokens is None or their_tokens is None:
        terms = "how many tokens each trained on was not recorded"
    elif abs(our_tokens - their_tokens) <= 0.01 * max(our_tokens, their_tokens):
        terms = "at equal training tokens"
    else:
        terms = f"but not at equal tokens: {whole(our_tokens)} against {whole(their_tokens)}"
    numbers = f"{decimal(ours)} against {decimal(random)} nats per token"
    who = subject.removesuffix("’s")
    if abs(difference) < 5e-5:
        return "equal", f"{who} made no difference: its held-out loss equals random selection’s, {numbers}, {terms}."
    rest = f"than random selection’s: {numbers}, {terms}."
    if difference < 0:
        return "better", f"{subject} held-out loss is {abs(difference):.4f} lower (better) {rest}"
    return "worse", f"{who} did not help: its held-out loss is {abs(difference):.4f} higher (worse) {rest}"


def _chosen(run: RunFiles) -> str:
    last = max((r for r in run.rounds if r.selection), key=lambda r: r.number, default=None)
    if last is None or last.selection is None:
        return f"{arm_name(run.main)} scored documents; none were chosen yet."
    found = last.selection
    share = found.kept_tokens / max(found.tokens, 1)
    return (
        f"{arm_name(run.main)} chose {whole(found.kept)} of {whole(found.documents)} documents, "
        f"{share:.1%} of the tokens."
    )


def _uncertainty(run: RunFiles) -> str:
    """What is known of the sampling error; of other seeds, one run knows nothing."""
    seeds = (
        "One run with one seed: differences of this kind vary from seed to seed; repeat the run with other seeds "
        "before relying on this one."
    )
    number_of = max((r.number for r in run.rounds), default=1)
    ours, random = (document_losses(run, arm, number_of) for arm in (run.main, "random"))
    if ours is not None and random is not None and (pair := DocumentLosses.paired(ours, random)) is not None:
        difference, weight, groups = pair
        low, high = paired_interval(difference, weight, groups)
        return (
            f"Over the {whole(len(difference))} held-out documents the difference is {signed(low)} to {signed(high)} "
            f"with 95% confidence (paired bootstrap). {seeds}"
        )
    sets = _by_set(run)
    if len(sets) >= FEW_SETS:
        low, high = paired_interval(np.array(list(sets.values())))
        return (
            f"Over the {len(sets)} held-out sets the mean difference is {signed(low)} to {signed(high)} with 95% "
            f"confidence (paired bootstrap over sets). {seeds}"
        )
    return seeds


def _by_set(run: RunFiles) -> dict[str, float]:
    heldout = mapping(run.summary.get("heldout"))
    ours, random = mapping(heldout.get(run.main)), mapping(heldout.get("random"))
    pairs = {s: (number(mapping(ours[s]).get("loss")), number(mapping(random.get(s)).get("loss"))) for s in ours}
    return {s: a - b for s, (a, b) in pairs.items() if a is not None and b is not None}


def paired_interval(
    difference_N: np.ndarray, weight_N: np.ndarray | None = None, group_N: np.ndarray | None = None
) -> tuple[float, float]:
    """95% percentile interval of the mean over groups of the weighted mean difference within each.

    Items are resampled within their group; a group (a held-out set) is given, its items (documents) are a sample.

    Args:
        difference_N: paired differences, ours minus theirs, nats per token.
        weight_N: predicted tokens of each item; 1 by default.
        group_N: group of each item, 0..G-1; one group by default.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.
    """
    weight_N = np.ones(len(difference_N)) if weight_N is None else weight_N
    group_N = np.zeros(len(difference_N), dtype=np.int64) if group_N is None else group_N
    generator, total = np.random.default_rng(0), np.zeros(DRAWS)
    groups = np.unique(group_N)
    for g in groups:
        d, w = difference_N[group_N == g], weight_N[group_N == g]
        for draw in range(DRAWS):
            rows = generator.integers(0, len(d), len(d))
            total[draw] += float(d[rows] @ w[rows]) / max(float(w[rows].sum()), 1e-12) / len(groups)
    low, high = np.quantile(total, (0.025, 0.975))
    return float(low), float(high)
