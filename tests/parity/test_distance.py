"""Differences: relative, absolute, the worst of several; not a number exceeds every tolerance."""

import math

import numpy as np
import pytest

from parity import curve
from parity.comparisons.case import Line
from parity.distance import (
    curve_differences,
    difference,
    distance,
    global_distance,
    worst_tensor,
)
from parity.report import Curve

NAN = math.nan
ONES, BROKEN = np.ones(3), np.array([1.0, NAN, 1.0])


def test_differences_are_relative_or_absolute() -> None:
    assert distance(np.array([3.0, 4.5]), np.array([3.0, 4.0])) == 0.1
    assert distance(np.array([0.0, 0.5]), np.zeros(2)) == 0.5
    assert difference(5.0, 4.0) == 0.25 and difference(5.0, 4.0, relative=False) == 1.0
    assert curve_differences({1: 5.0}, {1: 4.0}, relative=True) == {1: 0.25}
    truth = {"a": np.array([3.0]), "b": np.array([4.0])}
    measured = {"a": np.array([3.0]), "b": np.array([4.5])}
    assert worst_tensor(measured, truth) == ("b", 0.125)
    assert global_distance(measured, truth) == pytest.approx(0.1)


def test_not_a_number_is_infinitely_far() -> None:
    for measured, truth in ((BROKEN, ONES), (ONES, BROKEN), (BROKEN, BROKEN)):
        assert distance(measured, truth) == math.inf
        ours, theirs = ({"first": ONES, "last": a} for a in (measured, truth))
        assert worst_tensor(ours, theirs) == ("last", math.inf)
        assert global_distance(ours, theirs) == math.inf
    for pair in ((NAN, 1.0), (1.0, NAN), (NAN, NAN), (math.inf, math.inf)):
        assert difference(*pair) == difference(*pair, relative=False) == math.inf
    found = {"torch": {1: 1.0, 2: 1.0}, "JAX": {1: 1.0, 2: NAN}}
    assert curve.worst(found, ("torch", "JAX"), relative=True) == (math.inf, 2)
    changed = Curve({1: 1.0}, {2: 1.0, 3: NAN}, {2: 1.0, 3: 1.0}, relative=False, allowed=1e-5)
    assert not changed.passed and (changed.worst_step, changed.worst) == (3, math.inf)


@pytest.mark.parametrize(
    ("measured", "allowed", "negative_control", "passed"),
    [
        (1e-13, 1e-12, None, True),
        (1e-13, 1e-12, 1e-3, True),
        (1e-11, 1e-12, 1e-3, False),
        (NAN, 1e-12, None, False),
        (math.inf, math.inf, None, False),
        (1e-13, 1e-12, 1e-12, False),  # A line that does not notice a fault proves nothing.
        (0.0, 0.0, 0.0, False),
    ],
)
def test_line_passes_if_allowed_and_not_blind(
    measured: float, allowed: float, negative_control: float | None, passed: bool
) -> None:
    line = Line("logits", "float64", measured, allowed, negative_control=negative_control)
    assert line.passed == passed


def test_curve_with_a_blind_control_fails() -> None:
    line = curve.Line("float64", "torch", "JAX", 1e-16, 3, 1e-12, 1e-16, negative_control=1e-3)
    blind = curve.Line("float64", "torch", "JAX", 1e-16, 3, 1e-12, 1e-16, negative_control=1e-12)
    assert line.passed and not blind.passed
