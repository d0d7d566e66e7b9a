"""The table of what is learned and forgotten, by hand."""

import xml.etree.ElementTree as ET

from benchmarks.forgetting import figure, table
from bilect.compare.statistics import estimate


def variant():
    def arm(math, general, seconds):
        def loss(values, warm, random):
            pairs = [("loss", values), *((f"minus_{name}", [None if at is None else v - at for v in values])
                                         for name, at in (("warm", warm), ("random", random)))]  # fmt: skip
            return {key: estimate(found) for key, found in pairs}

        of_warm, of_random = math == [2.0, 2.0], math == [1.75, 1.85]
        sets = {
            "general": loss(general, None if of_warm else 3.0, None if of_random else 2.5),
            "math": loss(math, None if of_warm else 2.0, None if of_random else 1.8),
        }
        part = {"seconds": estimate([seconds] * 2), "flops": estimate([seconds * 1e12] * 2)}
        return {"heldout": sets, "cost": {"choosing": part, "training": part}}

    arms = {
        "warm": arm([2.0, 2.0], [3.0, 3.0], 0.0),
        "excess": arm([1.5, 1.6], [3.5, 3.5], 20.0),
        "random": arm([1.75, 1.85], [2.5, 2.5], 10.0),
    }
    return {"loss_on": "math", "arms": arms}


def test_the_set_that_decides_is_first_and_every_set_is_less_warm_and_random():
    head, rule, *rows = table(variant())
    assert head == (
        "| arm | math | math, minus warm | math, minus random | general, minus warm | general, minus random "
        "| seconds | TFLOPs |"
    )
    assert rule.count("---") == head.count("|") - 1
    assert rows == [
        "| excess | 1.5500 | -0.450 ± 0.635 | -0.250 ± 0.635 | +0.500 ± 0.000 | +1.000 ± 0.000 | 40 | 40 |",
        "| random | 1.8000 | -0.200 ± 0.635 | - | -0.500 ± 0.000 | - | 20 | 20 |",
        "| warm | 2.0000 | - | +0.200 ± 0.000 | - | +0.500 ± 0.000 | 0 | 0 |",
    ]


def test_the_figure_names_every_arm_but_the_warm_model():
    root = ET.fromstring(figure(variant(), "general"))
    words = [element.text for element in root.iter() if element.tag.endswith("text")]
    assert {"excess", "random"} <= {*words} and "warm" not in words
    assert "loss on general less the warm model's (right: forgotten)" in words
