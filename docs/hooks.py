"""What the site is given while it is built: commands, settings, public results, the JSON Schema, formulas as MathML."""

import json
import re
from pathlib import Path
from typing import Any

import typer
from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from pydantic import BaseModel

OUTSIDE = re.compile(r"(?<!!)\[(?P<text>[^\]]+)\]\((?P<to>(?:\.\./)+[\w./-]*)\)")
LOADED = re.compile(r"<(?:script|link|img|iframe)\b[^>]*?\b(?:src|href)=\"(?:https?:)?//[^\"]+", re.IGNORECASE)
FORMULA = re.compile(r"\$\$(?P<block>.+?)\$\$|(?<![\\$`\w])\$(?P<line>[^$\n]+?)\$(?![\w`])", re.DOTALL)
RESULTS = "<!-- tables of results/public/*.json -->"
FUNCTION = re.compile(r"`(?P<name>bilect(?:\.\w+){2,})`")


def on_files(files: Files, config: Any) -> Files:
    """Pages that are made from the code."""
    from bilect.config import Config

    schema = json.dumps(Config.model_json_schema(), indent=1) + "\n"
    generated = {
        "bilect.schema.json": schema,
        "reference/commands.md": _commands(),
        "reference/settings.md": _settings(Config),
    }
    for path, content in generated.items():
        files.append(File.generated(config, path, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """Formulas as MathML, functions as links, results as tables; links to files of the repository become text."""
    if RESULTS in markdown:
        markdown = markdown.replace(RESULTS, _results(Path(config.docs_dir)))
    if page.file.src_uri == "equations.md":
        markdown = FORMULA.sub(_mathml, FUNCTION.sub(r"[\g<0>][\g<name>]", markdown))
    return OUTSIDE.sub(lambda link: link[0] if _in_docs(page, link["to"]) else link["text"], markdown)


def _results(docs: Path) -> str:
    """Tables of the comparisons that people have added.

    Raises:
        PluginError: a file there is none, in one line.
    """
    from bilect.compare.published import read_published, tables
    from bilect.errors import BilectError

    folder = "results/public"
    try:
        return tables(read_published(docs / folder), folder)
    except BilectError as error:
        raise PluginError(f"{folder}: {error}") from error


def _in_docs(page: Any, to: str) -> bool:
    """Whether a relative link stays within the folder of the pages."""
    depth = page.file.src_uri.count("/")
    return to.count("../") <= depth


def on_post_build(config: Any, **_: Any) -> None:
    """Nothing of the site comes from elsewhere."""
    for page in Path(config.site_dir).rglob("*.html"):
        if found := LOADED.search(page.read_text(encoding="utf-8")):
            raise PluginError(f"{page} would load something from elsewhere: {found[0]}")


def _mathml(match: re.Match[str]) -> str:
    return convert(match["block"] or match["line"], display="block" if match["block"] else "inline")


def _commands() -> str:
    """``--help`` of every command."""
    from bilect.cli.commands import app

    group: Any = typer.main.get_command(app)
    parts = ["# Commands", "Each command says the same with `--help`. `python -m bilect` is the same program."]
    for name, command in group.commands.items():
        parts += [f"## bilect {name}", command.help or ""]
        rows = ["| | |", "|---|---|"]
        for parameter in command.params:
            option = parameter.param_type_name == "option"
            shown = parameter.opts if option else [(parameter.metavar or parameter.name).upper()]
            names = ", ".join(f"`{name}`" for name in shown)
            meaning = (getattr(parameter, "help", None) or "") + " Required." * bool(option and parameter.required)
            rows.append(f"| {names} | {_cell(meaning)} |")
        parts.append("\n".join(rows))
    return "\n\n".join(parts) + "\n"


def _settings(model: type[BaseModel]) -> str:
    """Every setting with its default and meaning, group by group."""
    parts = [
        "# All settings",
        "`bilect init` writes them into a file, with comments. Editors take [the JSON Schema](../bilect.schema.json): "
        "see [settings](../howto/settings.md).",
    ]
    groups: list[tuple[str, type[BaseModel]]] = [("Top level", model)]
    while groups:
        title, group = groups.pop(0)
        parts += [f"## {title}", (group.__doc__ or "").replace("``", "`")]
        rows = ["| setting | default | meaning |", "|---|---|---|"]
        for name, field in group.model_fields.items():
            inner = [a for a in (field.annotation, *getattr(field.annotation, "__args__", ())) if _is_group(a)]
            if inner and not any(inner[0] is known for _, known in groups):
                groups.append((name if group is model else f"{title}.{name}", inner[0]))
            default = "" if inner or field.is_required() else f"`{_plain(field.default)}`"
            rows.append(f"| `{name}` | {_cell(default)} | {_cell(field.description or '')} |")
        parts.append("\n".join(rows))
    return "\n\n".join(parts) + "\n"


def _is_group(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _plain(value: Any) -> str:
    return "null" if value is None else json.dumps(value, default=str)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
