"""Relative differences of numbers, curves, arrays and trees of arrays.

A difference that is not a number counts as infinite: it must exceed every tolerance.
"""

import math
from collections.abc import Mapping

import numpy as np

Arrays = dict[str, np.ndarray]
"""Canonical parameter name -> array in the canonical layout."""


def distance(measured: np.ndarray, truth: np.ndarray) -> float:
    """Return the relative difference in the Frobenius norm, computed in float64."""
    truth = truth.astype(np.float64)
    difference = np.linalg.norm((measured.astype(np.float64) - truth).ravel())
    norm = np.linalg.norm(truth.ravel())
    return _or_infinite(float(difference / norm) if norm else float(difference))


def difference(measured: float, truth: float, relative: bool = True) -> float:
    """Return the difference of two numbers, relative to `truth` or absolute."""
    apart = abs(measured - truth)
    return _or_infinite(apart / abs(truth) if relative and truth else apart)


def curve_differences(
    measured: Mapping[int, float], truth: Mapping[int, float], relative: bool
) -> dict[int, float]:
    """Return the difference of two curves at each step."""
    return {step: difference(measured[step], truth[step], relative) for step in truth}


def worst_tensor(measured: Arrays, truth: Arrays) -> tuple[str, float]:
    """Return the name and the relative difference of the tensor with the largest difference."""
    assert measured.keys() == truth.keys()
    distances = {key: distance(measured[key], truth[key]) for key in truth}
    where = max(distances, key=lambda key: distances[key])
    return where, distances[where]


def global_distance(measured: Arrays, truth: Arrays) -> float:
    """Return the relative difference of all tensors as one vector."""
    parts = [distance(measured[key], truth[key]) for key in truth]
    norms = [np.linalg.norm(truth[key].ravel()) for key in truth]
    with np.errstate(invalid="ignore"):  # An infinite difference of a tensor of norm 0.
        total = np.linalg.norm(np.multiply(parts, norms)) / np.linalg.norm(norms)
    return _or_infinite(float(total))


def _or_infinite(value: float) -> float:
    return math.inf if math.isnan(value) else value
