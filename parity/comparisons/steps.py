"""Compare the optimizer steps of an objective in both frameworks, in lockstep."""

from collections.abc import Callable, Sequence

import numpy as np

from mooshak.config.sections import Config
from mooshak.data.packing import Batch
from parity.backends import Backend, Step
from parity.comparisons.case import STEPS, Line
from parity.distance import difference, worst_tensor
from parity.tolerances import FLOAT64

Diagnose = Callable[[int, Step, Step], str]
"""Function of the number of the first step whose losses differ and both its results, which returns
the place of the mistake."""


def compare_steps(
    backends: Sequence[Backend],
    config: Config,
    batches: Sequence[Batch[np.ndarray]],
    objective: str,
    where: str,
    diagnose: Diagnose,
) -> Line:
    """Compare losses, norms and parameters of torch's and JAX's steps on the batches in float64.

    `where` is the place of a mistake that is known already.
    """
    worst, fault = 0.0, where
    ours_and_theirs = (backend.steps(config, batches) for backend in backends)
    for k, (ours, theirs) in enumerate(zip(*ours_and_theirs, strict=True)):
        apart = difference(theirs.loss, ours.loss)
        if not fault and not apart <= FLOAT64:
            fault = diagnose(k, ours, theirs)
        parameters = worst_tensor(theirs.params, ours.params)[1]
        worst = max(worst, apart, difference(theirs.norm, ours.norm), parameters)
    name = f"losses, norms and parameters of {STEPS} steps {objective}, the worst"
    return Line(name, "float64", worst, FLOAT64, where=fault)
