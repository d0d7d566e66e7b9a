"""The ladder of proxies, by hand."""

import xml.etree.ElementTree as ET

import pytest

from benchmarks.ladder import figure, size, table
from bilect.compare.collect import Arm


def arms():
    def arm(loss, kept, tflops=0.0):
        return Arm({"math": {"loss": loss}}, choosing={"flops": tflops * 1e12}, kept=frozenset(kept))

    return {
        ("tiny-300k", "random", ""): {0: arm(5.0, "ab"), 1: arm(5.5, "cd")},
        ("tiny-300k", "dsir", ""): {0: arm(4.5, "ac"), 1: arm(5.0, "ac")},
        ("tiny-300k", "excess", "tiny-3m"): {0: arm(4.0, "abcd", 8.0), 1: arm(4.25, "abcd", 10.0)},
        ("tiny-300k", "excess", "tiny-800k"): {0: arm(4.25, "ab", 3.0), 1: arm(4.75, "abcdefgh", 3.0)},
        ("tiny-3m", "random", ""): {0: arm(4.0, "ab")},
        ("tiny-3m", "excess", "tiny-800k"): {0: arm(3.5, "abc", 3.0), 1: arm(3.0, "abcd", 3.0)},
    }


def test_every_choice_is_less_random_and_dsir_of_its_own_target_and_seeds():
    rows = {(row["target"], row["method"], row["proxy"]): row for row in table(arms(), "math")}
    assert [place for place in rows if place[1] == "excess"] == [
        ("tiny-300k", "excess", "tiny-800k"),
        ("tiny-300k", "excess", "tiny-3m"),
        ("tiny-3m", "excess", "tiny-800k"),
    ]
    large = rows["tiny-300k", "excess", "tiny-3m"]
    assert large["minus random"]["values"] == [-1.0, -1.25] and large["minus dsir"]["values"] == [-0.5, -0.75]
    assert large["loss"]["mean"] == 4.125 and large["tflops"] == 9.0
    other = rows["tiny-3m", "excess", "tiny-800k"]
    assert other["minus random"]["values"] == [-0.5] and other["minus dsir"]["mean"] is None  # seed 0 alone; no dsir
    assert rows["tiny-300k", "random", ""]["minus random"]["mean"] is None


def test_overlap_is_with_the_largest_proxys_choice_for_the_smallest_target():
    rows = {(row["target"], row["method"], row["proxy"]): row["overlap"] for row in table(arms(), "math")}
    assert rows["tiny-300k", "excess", "tiny-3m"] == 1.0
    assert rows["tiny-300k", "excess", "tiny-800k"] == 0.5
    assert rows["tiny-3m", "excess", "tiny-800k"] == pytest.approx((0.75 + 1.0) / 2)
    assert rows["tiny-300k", "dsir", ""] is None


def test_the_figure_has_a_line_for_every_method_and_target():
    root = ET.fromstring(figure(table(arms(), "math"), "math"))
    words = {element.text for element in root.iter() if element.tag.endswith("text")}
    assert {"excess for tiny-300k", "excess for tiny-3m", "dsir for tiny-300k"} <= words
    assert {"million parameters of the proxy", "1"} <= words
    assert not any("random for" in (word or "") for word in words)


def test_sizes_are_read_from_names():
    assert [size(name) for name in ("", "tiny-100k", "tiny-3m", "pythia-31m")] == [0.0, 1e5, 3e6, 31e6]
