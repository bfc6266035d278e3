"""Compare each framework's distance from float64 with the other's, in float32 and bfloat16.

On an accelerator also with both frameworks' distances on the CPU: float32 must be float32 there.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from mooshak.config.model import Dtype
from parity.backends import Backend
from parity.comparisons.case import STEPS, Line, ParityCase
from parity.comparisons.places import hidden, place
from parity.comparisons.training import Outline
from parity.distance import Arrays, distance, global_distance
from parity.tolerances import FLOAT32_LOGITS, RATIO, TINY


@dataclass(frozen=True)
class Results:
    """Results of one framework in one dtype."""

    operations: Arrays
    losses: np.ndarray
    gradients: Arrays
    training: Outline

    @classmethod
    def of(cls, backend: Backend, dtype: Dtype, q: ParityCase) -> "Results":
        """Compute them."""
        config = q.config(dtype)
        return cls(
            backend.operations(dtype, q.inputs_BT),
            backend.losses(config, q.batches),
            backend.forward_backward(config, q.batches[0]).gradients,
            Outline.of(backend.steps(config, q.batches)),
        )

    def distances(self, truth: "Results") -> dict[str, float]:
        """Return the distance from `truth` of every operation, and of the other results."""
        operations = {k: distance(self.operations[k], a) for k, a in truth.operations.items()}
        return operations | {
            LOSSES: distance(self.losses, truth.losses),
            GRADIENTS: global_distance(self.gradients, truth.gradients),
            PARAMETERS: global_distance(self.training.params, truth.training.params),
        }


LOSSES, GRADIENTS = f"losses of {STEPS} batches", "all gradients"
PARAMETERS = f"all parameters after {STEPS} AdamW steps"


def float64_reference(q: ParityCase) -> Results:
    """Return the results of torch in float64 on the CPU; other parts show that JAX's are equal."""
    return Results.of(q.on_cpu[0] if q.on_cpu else q.torch, "float64", q)


def precision(truth: Results, dtype: Dtype, q: ParityCase) -> Iterator[Line]:
    """Compare each framework's distance from float64 in `dtype` with the other framework's."""
    found = [Results.of(b, dtype, q).distances(truth) for b in (q.torch, q.jax)]
    on_cpu = [Results.of(b, dtype, q).distances(truth) for b in q.on_cpu or ()]
    places = []
    for i in range(2):
        a, b = found[i], found[1 - i]
        excess = (k for k in truth.operations if a[k] > RATIO * max(b[k], TINY))
        places.append(next(map(place, excess), ""))
    titles = dict(hidden(q.torch.source.model)) | {k: k for k in (LOSSES, GRADIENTS, PARAMETERS)}
    for key, title in titles.items():
        limit = FLOAT32_LOGITS if (key, dtype) == ("logits", "float32") else np.inf
        if on_cpu:
            limit = min(limit, RATIO * max(TINY, *(distances[key] for distances in on_cpu)))
        for i, framework in enumerate(("torch", "JAX")):
            own, other = found[i][key], found[1 - i][key]
            allowed = min(limit, RATIO * max(other, TINY))
            name = f"{title}, {framework} from float64"
            yield Line(name, dtype, own, allowed, other, where=places[i])
