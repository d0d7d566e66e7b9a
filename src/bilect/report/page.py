"""The page: its sections in one file that loads nothing. `template.html.j2` says how it looks."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from bilect.report import verdict, wording
from bilect.report.blocks import Section
from bilect.report.inputs import RunFiles, read_run
from bilect.report.sections import build_sections

FILE_NAME = "report.html"


def write_page(run_dir: Path) -> Path:
    """Render and put the page in place in one step, so that no reader ever sees half of it."""
    return put_in_place(run_dir / FILE_NAME, encoded(render(read_run(run_dir))))


def encoded(html: str) -> bytes:
    """The page as bytes; lone surrogates in a text become "?"."""
    return html.encode("utf-8", errors="replace")


def put_in_place(target: Path, content: bytes) -> Path:
    """Write a file whole or not at all; returns it."""
    draft = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        draft.write_bytes(content)
        os.replace(draft, target)
    finally:
        draft.unlink(missing_ok=True)
    return target


def render_template(template: str, filters: Mapping[str, Callable[..., Any]], live: str = "", **values: Any) -> str:
    """A page from a template of this package. All is escaped, except figures (``svg``), whose XML is already.

    The page carries its style and its script and forbids every other script, style sheet and request; with ``live``,
    the version of a page that is served, its script may ask its own server for the next.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("bilect", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(svg=Markup, json_data=json_data, **filters)
    files = resources.files("bilect.report")
    style, script = ((files / name).read_text(encoding="utf-8") for name in ("style.css", "page.js"))
    policy = (  # style attributes are those of the figures; no text from data ever becomes one
        f"default-src 'none'; script-src '{_hash(script)}'; style-src-elem '{_hash(style)}'; "
        f"style-src-attr 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    )
    if live:
        policy += "; connect-src 'self'"
    own = {"style": Markup(style), "script": Markup(script), "policy": Markup(policy), "live": live}
    return environment.get_template(template).render(**own, **values).strip() + "\n"


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def json_data(value: object) -> Any:
    """JSON for a script element that is never executed: no character in it can end the element or start a comment."""
    from markupsafe import Markup

    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return Markup(re.sub("[<>&\u2028\u2029\ud800-\udfff]", lambda match: f"\\u{ord(match[0]):04x}", text))


def render(run: RunFiles, live: str = "") -> str:
    """The report of a run as HTML."""
    return render_sections(run.name, "bilect report", verdict.of_run(run), build_sections(run), run.main, live)


def render_sections(
    name: str, eyebrow: str, found: verdict.Verdict, sections: Sequence[Section], main: str, live: str = ""
) -> str:
    """A page of sections under a verdict."""
    filters: dict[str, Callable[..., Any]] = {
        **{key: getattr(wording, key) for key in ("decimal", "signed", "whole", "compact", "percent")},
        "dot": lambda arm: "main" if arm == main else arm if arm in wording.LONG_ARMS else "other",
        "arm_name": wording.arm_name,
    }
    return render_template(
        "report/template.html.j2",
        filters,
        live,
        name=name,
        eyebrow=eyebrow,
        verdict=found,
        sections=sections,
    )
