"""Comparison, verdict, table and page of invented runs whose figures are known by hand."""

import csv
import json
from types import SimpleNamespace

import pytest

from bilect.compare import comparison as module
from bilect.compare import figures
from bilect.compare.collect import Arm, Point
from bilect.compare.comparison import compare_runs, csv_text
from bilect.compare.page import render
from bilect.compare.verdict import cost_ratio, verdict
from bilect.report import lines

SEEDS = (0, 1, 2)
START = {"math": 6.0, "other": 8.0}


def arm(end, other=7.0, *, choosing=0.0, training=1000.0, kept=(), tokens=100, **more):
    """A straight curve from START to ``end`` at 80 tokens; the decayed model is 0.1 below."""
    losses = (START, {"math": (6 + end) / 2, "other": other}, {"math": end, "other": other})
    curve = [Point(40.0 * i, choosing, loss) for i, loss in enumerate(losses)]
    heldout = {"math": {"loss": end - 0.1, "accuracy": 0.25}, "other": {"loss": other, "accuracy": None}}
    cost = [{"seconds": 2.0, "flops": flops} for flops in (choosing, training)]
    return Arm(heldout, curve, tokens, *cost, 1.5, frozenset(kept), **more)


def runs(bliss=(4.0, 4.1, 4.3), random=(5.0, 5.2, 5.1), full=(4.9, 5.1, 5.0)):
    return [
        {
            "warm": Arm({"math": {"loss": 6.0, "accuracy": 0.0}, "other": {"loss": 8.0, "accuracy": None}}),
            "bliss": arm(b, choosing=500.0, training=1500.0, kept={"a", "b"}, kept_fraction={"<b>s</b>": 0.5}),
            "random": arm(r),
            "full": arm(f),
            "dsir": arm(b + 0.01 * i, kept={"b", "c", "d"}, kept_fraction={"<b>s</b>": 0.25}),
        }
        for i, (b, r, f) in enumerate(zip(bliss, random, full, strict=True))
    ]


def across(monkeypatch, variants, heldout=None, loss_on="math"):
    """Comparison of several variants, each given by its runs; ``heldout`` says what a variant is measured on."""
    scale = heldout or {}  # the rest of a setting, of a run: tests/compare/test_published.py
    monkeypatch.setattr(module, "setting", lambda cell: {"texts": {"heldout": scale.get(cell.variant)}})
    monkeypatch.setattr(module, "collect", lambda cell: variants[cell.variant][cell.config.seed])
    known = {"compare": SimpleNamespace(loss_on=loss_on), "selection": SimpleNamespace(keep_ratio=0.2), "device": "cpu"}
    configs = [SimpleNamespace(seed=s, **known) for s in SEEDS]
    return compare_runs([SimpleNamespace(variant=v, config=c) for v in variants for c in configs], {})


def compared(monkeypatch, seeds, loss_on="math"):
    return across(monkeypatch, {"base": seeds}, loss_on=loss_on)


def test_what_a_variant_changes_is_paired_with_the_base(monkeypatch):
    # bliss moves by 0.2, 0.3 and 0.1; random by the same in all seeds; full not at all
    other = runs(bliss=(4.2, 4.4, 4.4), random=(5.5, 5.7, 5.6))
    found = across(
        monkeypatch, {"base": runs(), "no-kl": other, "elsewhere": other}, {"elsewhere": "another tokenizer"}
    )
    arms = found["variants"]["no-kl"]["arms"]
    assert arms["bliss"]["minus_base"]["values"] == pytest.approx([0.2, 0.3, 0.1])
    assert arms["bliss"]["minus_base"]["high"] == pytest.approx(0.2 + 4.302653 * 0.1 / 3**0.5)
    assert arms["random"]["minus_base"]["values"] == pytest.approx([0.5] * 3)
    assert arms["full"]["minus_base"]["values"] == [0.0] * 3
    for name in ("base", "elsewhere"):
        assert all(f["minus_base"]["n"] == 0 for f in found["variants"][name]["arms"].values())
    rows = list(csv.DictReader(csv_text(found).splitlines()))
    by_variant = {r["variant"]: r["minus_base"] for r in rows if (r["arm"], r["seed"]) == ("bliss", "1")}
    assert by_variant["base"] == by_variant["elsewhere"] == "" and float(by_variant["no-kl"]) == pytest.approx(0.3)
    page = render(found)
    table = page[page.index("What a variant changes for bliss") :]
    assert '<th scope="row">no-kl</th>' in table and "+0.200 ± 0.248" in table
    assert "elsewhere" not in table[: table.index("</table>")] and "changes for full" not in page


def test_a_comparison_without_variants_has_nothing_across_them(base):
    assert "What a variant changes" not in render(base)


@pytest.fixture
def base(monkeypatch):
    return compared(monkeypatch, runs())


def test_losses_and_paired_differences(base):
    arms = base["variants"]["base"]["arms"]
    assert arms["bliss"]["loss"]["values"] == pytest.approx([3.9, 4.0, 4.2])
    assert arms["bliss"]["minus_random"]["values"] == pytest.approx([-1.0, -1.1, -0.8])
    assert arms["bliss"]["minus_full"]["mean"] == pytest.approx(-(0.9 + 1.0 + 0.7) / 3)
    assert arms["random"]["minus_random"]["mean"] is None
    assert arms["bliss"]["heldout"]["other"]["loss"]["mean"] == 7.0
    assert arms["bliss"]["heldout"]["math"]["accuracy"]["mean"] == 0.25
    assert base["variants"]["base"]["best"] == "bliss"
    assert arms["dsir"]["minus_best"]["values"] == pytest.approx([0.0, 0.01, 0.02])


def test_every_held_out_set_is_paired_with_the_warm_model_and_with_random(monkeypatch):
    seeds = runs()
    for seed, (forgotten, random) in zip(seeds, ((8.5, 7.5), (8.1, 7.2), (8.3, 7.0)), strict=True):
        seed["dsir"].heldout["other"]["loss"], seed["random"].heldout["other"]["loss"] = forgotten, random
    found = compared(monkeypatch, seeds)
    arms = found["variants"]["base"]["arms"]
    other = arms["dsir"]["heldout"]["other"]
    assert other["minus_warm"]["values"] == pytest.approx([0.5, 0.1, 0.3])
    assert other["minus_random"]["values"] == pytest.approx([1.0, 0.9, 1.3])
    assert arms["dsir"]["heldout"]["math"]["minus_warm"]["values"] == pytest.approx([-2.1, -1.99, -1.78])
    assert arms["random"]["heldout"]["other"]["minus_random"]["n"] == 0
    assert arms["warm"]["heldout"]["other"]["minus_warm"]["n"] == 0
    page = render(found)
    row = page[page.index("above 0: forgotten") :]
    row = row[row.index('<td>other</td><th scope="row">dsir</th>') :]
    assert "+0.300 ± 0.497" in row[: row.index("</tr>")] and "+1.067 ± 0.517" in row[: row.index("</tr>")]


def test_without_a_deciding_set_the_mean_over_the_sets_decides(monkeypatch):
    arms = compared(monkeypatch, runs(), None)["variants"]["base"]["arms"]
    assert arms["bliss"]["loss"]["values"][0] == pytest.approx((3.9 + 7.0) / 2)


def test_speedups_by_hand(base):
    speedup = base["variants"]["base"]["arms"]["bliss"]["speedup"]
    # seed 0: random falls by 1 in 80 tokens at 10 FLOPs each; bliss by 2, at 15 each and 500 for choosing
    assert speedup["tokens"]["values"][0] == pytest.approx(2.0)
    assert speedup["flops"]["values"][0] == pytest.approx(800 / 600)
    assert speedup["flops_with_choosing"]["values"][0] == pytest.approx(800 / 1100)
    assert cost_ratio(base["variants"]["base"]["arms"], "bliss") == 2.0


def test_overlap_and_curve(base):
    variant = base["variants"]["base"]
    assert variant["overlap"]["bliss"] == {"bliss": 1.0, "dsir": 0.25}
    assert [p["tokens"] for p in variant["arms"]["bliss"]["curve"]] == [0.0, 40.0, 80.0]
    assert variant["arms"]["bliss"]["curve"][-1]["mean"] == pytest.approx((4.0 + 4.1 + 4.3) / 3)


def test_verdicts(base, monkeypatch):
    sentences = base["variants"]["base"]["verdict"]
    assert "Lowest on math is bliss: 4.033, 0.967" in sentences[0] and "below random" in sentences[0]
    assert "dsir" in sentences[1] and "Not told apart" in sentences[1]
    assert sentences[2].startswith("It comes down to random's final loss with 1.")  # 1100 / 800 in seed 0
    assert "times as many FLOPs, choosing included (1." in sentences[2] and "times fewer without" in sentences[2]
    assert "Cheapest of these is dsir: 1.00 times random's FLOPs, against 2.00." in sentences[3]
    noisy = compared(monkeypatch, runs(bliss=(4.8, 5.4, 4.9), full=(5.0, 5.3, 5.2)))["variants"]["base"]
    assert noisy["verdict"] == verdict(noisy) and "not told apart" in noisy["verdict"][0]
    nothing = compared(monkeypatch, runs(random=(3.0, 3.1, 3.0)))["variants"]["base"]["verdict"]
    assert nothing == ["No arm is below random on math (2.933); told apart, and higher: bliss, full, dsir."]
    close = compared(monkeypatch, runs(full=(3.9, 4.2, 4.2), random=(5.0, 5.2, 5.1), bliss=(4.0, 4.1, 4.3)))
    assert not any("does not pay" in s for s in close["variants"]["base"]["verdict"])
    all_of_it = compared(monkeypatch, runs(full=(3.0, 3.1, 3.0)))["variants"]["base"]["verdict"]
    assert all_of_it[0].startswith("Lowest on math is full") and "does not pay" in all_of_it[-1]


def test_a_row_per_arm_and_seed(base):
    rows = list(csv.DictReader(csv_text(base).splitlines()))
    assert len(rows) == 5 * 3
    row = next(r for r in rows if r["arm"] == "bliss" and r["seed"] == "2")
    assert float(row["loss"]) == pytest.approx(4.2) and float(row["minus_random"]) == pytest.approx(-0.8)
    assert float(row["choosing_flops"]) == 500.0 and row["variant"] == "base"
    assert next(r for r in rows if r["arm"] == "random")["minus_random"] == ""


def test_the_page_shows_every_arm_and_escapes_names(base):
    page = render(json.loads(json.dumps(base, allow_nan=False)))
    for name in ("bliss", "random", "full", "dsir", "warm"):
        assert f'<th scope="row">{name}</th>' in page
    assert "<b>s</b>" not in page and "&lt;b&gt;s" in page
    assert "−0.967 ± 0.379" in page  # 4.302653 times the standard error of -1, -1.1 and -0.8
    assert page.count("<script") <= 1 and "script-src 'sha256-" in page  # the page's own script, and no other, may run
    assert "http://" not in page.replace("http://www.w3.org", "")


def test_an_arm_has_its_colour_in_the_curves_too(base, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "lines_figure", lambda name, panels, text: drawn.extend(panels))
    figures.curves_figure("curves", {arm: f for arm, f in base["variants"]["base"]["arms"].items() if arm != "warm"})
    assert [panel.inks for panel in drawn] == [{"bliss": "ours", "random": "random", "full": "full"}] * 2


def test_lines_without_a_colour_take_those_that_are_left():
    inks = {"excess": "ours", "random": "random", "full": "full"}
    styles = lines._styles(["random", "excess", "full", "dsir", *map(str, range(11))], inks)
    assert {name: styles[name] for name in inks} == {name: (ink, "-") for name, ink in inks.items()}
    assert styles["dsir"] == ("other", "-") and len(set(map(str, styles.values()))) == len(styles)
