"""What the documentation says is done: every block of code runs or parses, every link leads somewhere.

A Python block that cannot run here says why in a comment above it, ``<!-- not run: REASON -->``, and is compiled.
"""

import re
import shlex
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from tests.docs.conftest import names
from tests.docs.pages import ROOT, Block, anchors, blocks, links, pages

RUN = [page for page in pages() if blocks(page, "python")]
COMMANDS = [block for page in pages() for block in blocks(page, "sh", "bash", "console")]
WRONG: Any = typer.BadParameter.__base__  # of all errors in the use of a command
SETTINGS = [block for page in pages() for block in blocks(page, "yaml")]


def label(thing: Path | Block) -> str:
    return str(thing.relative_to(ROOT)) if isinstance(thing, Path) else thing.where


@pytest.mark.parametrize("page", RUN, ids=label)
def test_python_blocks_run_in_the_order_of_the_page(page: Path, reader: Path) -> None:
    scope: dict[str, Any] = {"__name__": "page", **names()}
    for block in blocks(page, "python"):
        code = compile("\n" * block.line + block.code, block.where, "exec")  # a traceback shows the page's lines
        if block.not_run is None:
            exec(code, scope)


def commands(block: Block) -> list[list[str]]:
    """The commands of a block, a line each, without comments; a backslash joins lines."""
    lines = block.code.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def check_bilect(words: list[str]) -> None:
    """Parse a command as the program does, without carrying it out."""
    from bilect.cli.commands import app

    group: Any = typer.main.get_command(app)
    with group.context_class(group, info_name="bilect") as top:
        name, command, rest = group.resolve_command(top, words)
        command.make_context(name, rest, parent=top)


def check(words: list[str]) -> None:
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    match words:
        case ["bilect", *rest] | ["python", "-m", "bilect", *rest]:
            check_bilect(rest)
        case ["torchrun", "--nproc-per-node", _, "-m", "bilect", *rest]:
            check_bilect(rest)
        case ["torchrun", "--nproc-per-node", _, script, *_] | ["python", script, *_] if script.endswith(".py"):
            assert (ROOT / script).is_file(), f"no script {script}"
        case ["make", *rest]:
            targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
            wanted = [word for word in rest if "=" not in word]
            assert wanted and {*wanted} <= {*targets}, f"make has no target {wanted}"
        case ["pip", "install", *rest]:
            extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
            named = re.findall(r"bilect\[([\w,]+)\]", " ".join(rest))
            assert {extra for several in named for extra in several.split(",")} <= {*extras}
        case ["python", "-c", code]:
            compile(code, "command line", "exec")
        case _:
            assert words[0] in ("zstdcat", "source", "pre-commit", "cd", "ls", "pytest", "hf"), f"unknown: {words[0]}"


@pytest.mark.parametrize("block", COMMANDS, ids=label)
def test_command_lines_parse(block: Block) -> None:
    for words in commands(block) if block.not_run is None else []:
        try:
            check(words)
        except WRONG as error:
            pytest.fail(f"{block.where}: {shlex.join(words)}: {error}")


def test_an_option_that_is_not_there_is_found() -> None:
    for wrong in ("choose pool/ --target t --out o --kept 1", "select", "chose pool/"):
        with pytest.raises(WRONG):
            check_bilect(shlex.split(wrong))


def put_over(base: Any, values: Any) -> Any:
    if isinstance(base, Mapping) and isinstance(values, Mapping):
        return {**base, **{key: put_over(base.get(key), value) for key, value in values.items()}}
    return values


@pytest.mark.parametrize("block", SETTINGS, ids=label)
def test_yaml_is_settings_or_a_part_of_them(block: Block) -> None:
    from bilect.config import parse_config
    from bilect.methods import methods_of

    values = yaml.safe_load(block.code)
    if block.not_run is None:
        base = {"data": {"lower_data": [{"path": "pool/"}], "upper_data": [{"path": "target.jsonl"}]}}
        methods_of(parse_config(put_over(base, values)))


@pytest.mark.parametrize("page", pages(), ids=label)
def test_links_lead_somewhere(page: Path) -> None:
    for target in links(page):
        path, _, anchor = target.partition("#")
        place = (page.parent / path).resolve() if path else page
        assert place.exists(), f"{label(page)}: {target} is not there"
        assert place.is_relative_to(ROOT), f"{label(page)}: {target} leads out of the project"
        if anchor:
            assert anchor in anchors(place), f"{label(page)}: {target}: no such heading"


def test_every_public_name_has_its_line_and_its_example() -> None:
    import bilect

    page = ROOT / "docs" / "api.md"
    table = re.findall(r"^\| \[?`(\w+)`", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(table) == sorted(bilect.__all__)
    code = "".join(block.code for block in blocks(page, "python") if block.not_run is None)
    unused = {name for name in bilect.__all__ if name not in ("__version__", "Chosen") and f"bilect.{name}" not in code}
    assert not unused
