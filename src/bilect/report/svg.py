"""From a matplotlib Figure to an SVG that lives inside an HTML page: themed, deterministic, nothing to load."""

from __future__ import annotations

import io
import re
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colour-blind-safe hues; for the token arms Tol's wine and indigo, and a brown. Each is written into
# the page as `var(--name, colour)`, so the page's style sheet decides what it looks like by day, by night and on paper.
COLOURS = {
    "ink": "#1c2127",
    "muted": "#646c76",
    "rule": "#dadee3",
    "paper": "#fffffe",
    "ours": "#0072b2",
    "random": "#e08a00",
    "warm": "#8f97a0",
    "full": "#009e73",
    "blade": "#882255",
    "rho1": "#332288",
    "random-token": "#6b4226",
    "worse": "#d55e00",
    "pool": "#c3c9d1",
    "other": "#cc79a7",
}
_VARIABLE = {colour: f"var(--{name}, {colour})" for name, colour in COLOURS.items()}


class Svg(str):
    """The SVG of one figure, and the figure itself, from which other formats are made."""

    name: str
    figure: Figure

    @property
    def file(self) -> str:
        """The same as a file of its own, which has to name its namespace."""
        return self.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)


SCREEN = COLOURS["paper"]  # ground of a picture that stands by itself
WIDTH = 7.6  # inches: 547 points, shown a little larger on a wide screen

_RC: dict[str, object] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a source named "$x" is a name, not a formula
    "text.usetex": False,
    "axes.unicode_minus": True,
    "font.family": ["DejaVu Sans"],
    "font.size": 8.5,
    "axes.titlesize": 9.0,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 8.0,
    "axes.labelsize": 8.5,
    "axes.facecolor": "none",
    "axes.edgecolor": COLOURS["rule"],
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": False,
    "grid.color": COLOURS["rule"],
    "grid.linewidth": 0.6,
    "text.color": COLOURS["ink"],
    "axes.labelcolor": COLOURS["muted"],
    "axes.titlecolor": COLOURS["ink"],
    "xtick.color": COLOURS["muted"],
    "ytick.color": COLOURS["muted"],
    "xtick.major.size": 0.0,
    "ytick.major.size": 0.0,
    "xtick.minor.size": 0.0,
    "ytick.minor.size": 0.0,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
}


@contextmanager
def drawing(name: str) -> Iterator[None]:
    """The house style for the figure called `name`; the caller's matplotlib settings come back afterwards."""
    import matplotlib

    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the browser has the glyphs
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({**_RC, "svg.hashsalt": f"bilect-{name}"})
        yield


def new_figure(height: float) -> Figure:
    """An empty figure of the page's width (in inches), away from pyplot's global state."""
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH, height), layout="constrained")


def label(text: object, width: int = 30) -> str:
    """One printable line of at most `width` characters."""
    line = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
    return line if len(line) <= width else line[: width - 1] + "…"


def to_svg(figure: Figure, name: str, description: str) -> Svg:
    """Serialise inside `drawing(name)`. Ids get the prefix `name`, so that figures never share one within a page."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    root = ET.fromstring(buffer.getvalue())
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        for key in list(element.attrib):
            element.attrib[key.rpartition("}")[2]] = element.attrib.pop(key)
    for parent in list(root.iter()):
        for child in [c for c in parent if c.tag in ("metadata", "style")]:
            parent.remove(child)
    _rename_ids(root, name)
    for element in root.iter():
        if "style" in element.attrib:
            element.attrib["style"] = _themed(element.attrib["style"])
        if "d" in element.attrib:  # a hundredth of a point is finer than any screen
            rounded = re.sub(r"-?\d+\.\d+", lambda match: f"{float(match[0]):.2f}", element.attrib["d"])
            element.attrib["d"] = " ".join(rounded.split())
        if element.tag not in ("text", "tspan"):
            element.text = None
        element.tail = None
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    root.attrib.update({"class": "plot", "role": "img", "aria-label": description})
    svg = Svg(ET.tostring(root, encoding="unicode"))
    svg.name, svg.figure = name, figure
    return svg


def _rename_ids(root: ET.Element, name: str) -> None:
    """Keep only the ids something refers to, and give them the figure's prefix."""
    used = set()
    for element in root.iter():
        for value in element.attrib.values():
            used.update(re.findall(r"^#(.+)$|url\(#([^)]+)\)", value))
    wanted = {a or b for a, b in used}
    for element in root.iter():
        for key, value in list(element.attrib.items()):
            if key == "id":
                if value in wanted:
                    element.attrib["id"] = f"{name}-{value}"
                else:
                    del element.attrib["id"]
            elif key == "href" and value.startswith("#"):
                element.attrib[key] = f"#{name}-{value[1:]}"
            elif "url(#" in value:
                element.attrib[key] = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", value)


def _themed(style: str) -> str:
    style = re.sub(r"#[0-9a-f]{6}\b", lambda match: _VARIABLE.get(match[0], match[0]), style)
    return re.sub(r"'DejaVu Sans'[^;]*", "var(--sans, sans-serif)", style)
