"""How numbers and the verdict are put into words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from bilect.report.inputs import Json, mapping, number

DASH = "–"
LONG_ARMS = {
    "warm": "warm start",
    "excess": "bilect (excess)",
    "bliss": "bilect (BLISS)",
    "blade": "BLADE tokens",
    "rho1": "RHO-1",
    "random-token": "random tokens",
    "random": "random",
    "full": "full pool",
}
OWN = ("excess", "bliss")  # whose choice is called bilect's
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_HYPHENS = str.maketrans({"\N{MINUS SIGN}": "-", "\N{EN DASH}": "-", "\N{EM DASH}": "-"})


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a table in Markdown, whose minus signs and dashes are hyphens: it is copied into other text."""
    first, *others = (f"| {' | '.join(cells)} |".translate(_HYPHENS) for cells in (head, *rows))
    return [first, "|---" * len(head) + "|", *others]


def arm_name(arm: str) -> str:
    """What an arm is called on the page."""
    return LONG_ARMS.get(arm) or shown_name(arm, 80)


def decimal(value: object, digits: int = 4) -> str:
    """Fixed decimals with a true minus sign; a dash for what is not a finite number."""
    plain = number(value)
    return DASH if plain is None else f"{plain:,.{digits}f}".replace("-", "−")


def signed(value: object, digits: int = 4) -> str:
    """A difference: the sign always shown."""
    plain = number(value)
    return DASH if plain is None else f"{plain:+,.{digits}f}".replace("-", "−")


def measured(value: object, stderr: object) -> str:
    """A value with its standard error, where there is one: 0.250 ± 0.013, 31.3 ± 1.2."""
    plain = number(value)
    digits = 3 if plain is not None and abs(plain) < 10 else 1
    shown, error = decimal(value, digits), decimal(stderr, digits)
    return shown if error == DASH else f"{shown} ± {error}"


def whole(value: object) -> str:
    """A count, in groups of three."""
    plain = number(value)
    return DASH if plain is None else f"{plain:,.0f}".replace("-", "−")


def compact(value: object) -> str:
    """Whole numbers whole, others to four significant digits."""
    plain = number(value)
    if plain is None:
        return DASH
    return whole(plain) if plain == int(plain) and abs(plain) < 1e15 else f"{plain:.4g}".replace("-", "−")


def percent(value: object) -> str:
    """A share as a percentage with one decimal."""
    plain = number(value)
    return DASH if plain is None else f"{plain:.1%}".replace("-", "−")


def power(value: object) -> str:
    """1.23 × 10¹⁵, for FLOPs."""
    plain = number(value)
    if plain is None:
        return DASH
    if abs(plain) < 1e4:
        return compact(plain)
    mantissa, _, exponent = f"{plain:.2e}".partition("e")
    return f"{mantissa} × 10{str(int(exponent)).translate(_SUPERSCRIPT)}".replace("-", "−")


def duration(value: object) -> str:
    """Seconds as 1 h 02 min, 3 min 12 s or 4.2 s."""
    plain = number(value)
    if plain is None or plain < 0:
        return DASH
    if plain < 59.95:
        return f"{plain:.1f} s"
    minutes, seconds = divmod(round(plain), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"


def tokens_of(arm: str, tokens: object) -> float | None:
    """Tokens the arm trained on, wherever the summary's `tokens` keeps a number under the arm's name."""
    level = [mapping(tokens)]
    while level:
        for group in level:
            if (found := number(group.get(arm))) is not None:
                return found
        level = [mapping(item) for group in level for item in group.values() if isinstance(item, dict)]
    return None


def shown_name(name: object, limit: int = 160) -> str:
    """A source, a reason: control characters visible, not too long."""
    text = str(name)
    return visible(text if len(text) <= limit else text[: limit - 1] + "…")


def visible(text: str) -> str:
    """Control characters as a visible sign: they have no place in HTML."""
    return "".join(c if c.isprintable() or c in "\n\t\u00a0\u200b" else "\ufffd" for c in text.replace("\r\n", "\n"))


def fidelity(rows: list[Json]) -> str:
    """What the last round's rank correlations mean, in one sentence."""
    loss = number(rows[-1].get("loss_rank_correlation")) if rows else None
    change = number(rows[-1].get("change_rank_correlation")) if rows else None
    parts = [
        f"{what} {_strength(value)} ({decimal(value, 2)})"
        for what, value in (
            ("which documents are hard", loss),
            ("which documents were learnt during the round", change),
        )
        if value is not None
    ]
    return f"In the last round proxy and target agree on {' and on '.join(parts)}." if parts else ""


def _strength(value: float) -> str:
    if value >= 0.7:
        return "closely"
    if value >= 0.4:
        return "in part"
    return "hardly" if value >= 0.1 else "not at all"
