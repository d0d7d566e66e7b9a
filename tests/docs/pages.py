"""What stands in the pages of the documentation: code blocks, headings, links."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
NOT_RUN = re.compile(r"<!-- not run: (?P<reason>.+?) -->")
FENCE = re.compile(r"^(?P<fence>```+)(?P<language>\w*)\s*$")
LINK = re.compile(r"!?\[[^\]]*\]\((?P<target>[^()\s]+)\)")


@dataclass(frozen=True)
class Block:
    """A fenced block; ``not_run`` is the reason that the comment above it gives."""

    page: Path
    line: int
    language: str
    code: str
    not_run: str | None

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def pages() -> list[Path]:
    found = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")]
    return sorted(page for page in found if "site" not in page.parts)


def blocks(page: Path, *languages: str) -> list[Block]:
    return [block for block in _blocks(page) if block.language in languages]


def _blocks(page: Path) -> Iterator[Block]:
    lines = page.read_text(encoding="utf-8").splitlines()
    start, fence, language = 0, "", ""
    for number, line in enumerate(lines, 1):
        match = FENCE.match(line)
        if not fence and match:
            start, fence, language = number, match["fence"], match["language"]
        elif fence and line.strip() == fence:
            above = NOT_RUN.fullmatch(lines[start - 2].strip()) if start > 1 else None
            code = "\n".join(lines[start : number - 1]) + "\n"
            yield Block(page, start, language, code, above["reason"] if above else None)
            fence = ""
    assert not fence, f"{page}: the block that starts in line {start} has no end"


def prose(page: Path) -> str:
    """The text of a page without its blocks and without code in lines."""
    text, fence = [], ""
    for line in page.read_text(encoding="utf-8").splitlines():
        match = FENCE.match(line)
        if not fence and match:
            fence = match["fence"]
        elif fence and line.strip() == fence:
            fence = ""
        elif not fence:
            text.append(re.sub(r"(`+).+?\1", lambda code: "`" * len(code[0]), line) if "](" not in line else line)
    return "\n".join(text)


def links(page: Path) -> list[str]:
    return [match["target"] for match in LINK.finditer(prose(page)) if "://" not in match["target"]]


def anchors(page: Path) -> set[str]:
    """Of the headings, as both GitHub and Python-Markdown make them."""
    found, fence = set(), ""
    for line in page.read_text(encoding="utf-8").splitlines():
        match = FENCE.match(line)
        if not fence and match:
            fence = match["fence"]
        elif fence and line.strip() == fence:
            fence = ""
        elif not fence and (heading := re.match(r"#+ (.+)", line)):
            words = re.sub(r"[^\w\s-]", "", heading[1].replace("`", "")).strip().lower()
            found.add(re.sub(r"\s+", "-", words))
    return found
