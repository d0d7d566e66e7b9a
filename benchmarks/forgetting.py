"""What the arms of a comparison have learned of their target, and what they have forgotten of other text.

Prints a table of every held-out set, less the warm model and less random, from the ``comparison.json`` of a finished
comparison, and draws each arm by both: the target's loss less the warm model's, and that of another set.

    bilect compare examples/pretrained.yaml --out runs/pretrained
    python benchmarks/forgetting.py runs/pretrained/comparison.json --elsewhere general --out forgetting.svg
"""

import argparse
import json
from pathlib import Path
from typing import Any

from bilect.compare.figures import arm_inks
from bilect.compare.page import interval
from bilect.report.svg import COLOURS, drawing, new_figure, to_svg
from bilect.report.wording import markdown_table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparison", type=Path)
    parser.add_argument("--variant", default="base", help="of the comparison")
    parser.add_argument("--elsewhere", required=True, help="held-out set of what may be forgotten")
    parser.add_argument("--out", type=Path, help="figure")
    args = parser.parse_args()
    variant = json.loads(args.comparison.read_text(encoding="utf-8"))["variants"][args.variant]
    print("\n".join(table(variant)))
    if args.out is not None:
        args.out.write_text(figure(variant, args.elsewhere), encoding="utf-8")


def table(variant: dict[str, Any]) -> list[str]:
    """Markdown, the lowest loss on the set that decides first."""
    arms, target = variant["arms"], variant["loss_on"]
    others = [name for name in arms["warm"]["heldout"] if name != target]
    columns = [(name, key) for name in (target, *others) for key in ("minus_warm", "minus_random")]
    heads = [f"{name}, {key.replace('_', ' ')}" for name, key in columns]
    rows = []
    for arm in sorted(arms, key=lambda a: arms[a]["heldout"][target]["loss"]["mean"]):
        own, cost = arms[arm]["heldout"], arms[arm]["cost"]
        cells = [arm, f"{own[target]['loss']['mean']:.4f}", *(interval(own[name][key]) for name, key in columns)]
        spent = [cost["choosing"][key]["mean"] + cost["training"][key]["mean"] for key in ("seconds", "flops")]
        rows.append([*cells, f"{spent[0]:.0f}", f"{spent[1] / 1e12:.0f}"])
    return markdown_table(["arm", target, *heads, "seconds", "TFLOPs"], rows)


def figure(variant: dict[str, Any], elsewhere: str) -> str:
    """A point for each arm, a fine one for each of its seeds; the warm model is at (0, 0)."""
    target = variant["loss_on"]
    arms = {arm: f["heldout"] for arm, f in variant["arms"].items() if arm != "warm"}
    with drawing("forgetting"):
        figure = new_figure(3.6)
        axes = figure.add_subplot(xlabel=f"loss on {elsewhere} less the warm model's (right: forgotten)",
                                  ylabel=f"loss on {target} less the warm model's")  # fmt: skip
        inks = arm_inks(arms)
        for arm, own in arms.items():
            ink = COLOURS[inks[arm]]
            x, y = (own[name]["minus_warm"] for name in (elsewhere, target))
            axes.plot(x["values"], y["values"], ".", color=ink, alpha=0.5, markersize=4)
            axes.plot([x["mean"]], [y["mean"]], "o", color=ink, markersize=6)
            axes.annotate(arm, (x["mean"], y["mean"]), (6, 4), textcoords="offset points", color=COLOURS["ink"])
        axes.axhline(0, color=COLOURS["muted"], linewidth=0.8)
        axes.axvline(0, color=COLOURS["muted"], linewidth=0.8)
        axes.margins(x=0.15, y=0.1)
        return to_svg(figure, "forgetting", f"What each arm has learned of {target} and lost on {elsewhere}.").file


if __name__ == "__main__":
    main()
