"""Relative differences between arrays and trees of arrays."""

import numpy as np

from parity.backends import Arrays


def distance(measured: np.ndarray, truth: np.ndarray) -> float:
    """Return the relative difference in the Frobenius norm, computed in float64."""
    truth = truth.astype(np.float64)
    difference = np.linalg.norm((measured.astype(np.float64) - truth).ravel())
    norm = np.linalg.norm(truth.ravel())
    return float(difference / norm) if norm else float(difference)


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
    return float(np.linalg.norm(np.multiply(parts, norms)) / np.linalg.norm(norms))
