"""Means, intervals and speed-ups against closed forms."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bilect.compare.statistics import estimate, reached, speedup


def test_mean_standard_error_and_interval_by_hand():
    found = estimate([1.0, 2.0, 4.0])
    se = math.sqrt(7 / 3 / 3)  # variance (16 + 1 + 25) / 9 / 2 = 7/3
    assert found["mean"] == pytest.approx(7 / 3) and found["se"] == pytest.approx(se)
    assert found["high"] - found["mean"] == pytest.approx(4.302653 * se, rel=1e-6)  # Student, 2 degrees of freedom
    assert found["mean"] - found["low"] == pytest.approx(4.302653 * se, rel=1e-6)
    assert found["n"] == 3 and found["values"] == [1.0, 2.0, 4.0]


def test_seeds_without_a_value_do_not_count():
    assert estimate([None, 3.0, math.nan, 5.0])["mean"] == 4.0
    assert estimate([3.0]) == {"mean": 3.0, "se": None, "low": None, "high": None, "n": 1, "values": [3.0]}
    assert estimate([None, None])["mean"] is None


CURVE = [(0.0, 5.0), (10.0, 4.0), (20.0, 4.5), (30.0, 3.0)]


def test_where_a_curve_first_is_low_enough():
    assert reached(CURVE, 4.25) == 7.5  # the first time, although the curve rises again
    assert reached(CURVE, 3.3) == pytest.approx(20 + 10 * 1.2 / 1.5)
    assert reached(CURVE, 2.9) is None and reached(CURVE, 5.0) is None


def test_speedup_is_to_where_the_control_first_is_at_its_own_end():
    control = [(0.0, 5.0), (40.0, 4.25), (80.0, 4.5), (120.0, 4.25)]
    assert speedup(CURVE, control) == 40 / 7.5
    assert speedup(control, control) == 1.0  # not 120 / 40: what the control wastes is nobody's gain
    assert speedup([(50.0, 5.0), (100.0, 4.0)], control) == 40 / (50 + 50 * 0.75)  # 50 spent on choosing
    assert speedup(control, [(0.0, 5.0), (10.0, 1.0)]) is None and speedup(control, [(0.0, 5.0), (9.0, 5.5)]) is None


@given(slope=st.floats(0.1, 10), at=st.floats(0.01, 0.99), n=st.integers(2, 20))
def test_a_straight_line_is_reached_where_it_says(slope, at, n):
    line = [(i / n, 3 - slope * i / n) for i in range(n + 1)]
    assert reached(line, 3 - slope * at) == pytest.approx(at, rel=1e-6)
