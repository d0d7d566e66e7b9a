"""README.md of what leaves a run: the facts that the run knows, and what only a person can say left open."""

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["card"]


def card(
    title: str,
    lead: str,
    facts: Mapping[str, Any],
    *,
    sources: Sequence[tuple[str, int, int]] = (),
    settings: str = "",
    close: str = "",
) -> str:
    """A card in the Hub's form: Markdown under a YAML head.

    Args:
        title: first heading.
        lead: what this is, a sentence or two.
        facts: the rows of its table.
        sources: label, documents and tokens of each.
        settings: of the run, YAML.
        close: the last sentences.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("bilect.integrations.exporters", "."),
        autoescape=False,  # Markdown, not HTML: labels of sources pass through `cell`
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["cell"] = _cell
    values = {"title": title, "lead": lead, "facts": facts, "sources": sources, "settings": settings, "close": close}
    total = sum(tokens for _, _, tokens in sources)
    return environment.get_template("_card.md.j2").render(total=total, **values).rstrip() + "\n"


def _cell(value: Any) -> str:
    """Text of others within a table of Markdown."""
    text = " ".join(str(value).split())
    for sign in "\\`*_{}[]<>|#!":
        text = text.replace(sign, f"\\{sign}")
    return text
