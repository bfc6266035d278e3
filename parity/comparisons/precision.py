"""Compare each framework's distance from float64 with the other's, in float32 and bfloat16."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from mooshak.config.model import Dtype
from parity.comparisons.case import STEPS, Line, ParityCase
from parity.comparisons.places import hidden, place
from parity.comparisons.training import Outline
from parity.distance import Arrays, distance, global_distance
from parity.tolerances import FLOAT32_LOGITS, RATIO, TINY


@dataclass(frozen=True)
class Float64Reference:
    """Results of torch in float64, which the other parts show to equal those of JAX."""

    operations: Arrays
    losses: np.ndarray
    gradients: Arrays
    training: Outline

    @classmethod
    def of(cls, q: ParityCase) -> "Float64Reference":
        """Compute them."""
        config = q.config("float64")
        return cls(
            q.torch.operations("float64", q.inputs_BT),
            q.torch.losses(config, q.batches),
            q.torch.forward_backward(config, q.batches[0]).gradients,
            Outline.of(q.torch.steps(config, q.batches)),
        )


def precision(truth: Float64Reference, dtype: Dtype, q: ParityCase) -> Iterator[Line]:
    """Compare each framework's distance from float64 in `dtype` with the other framework's."""
    backends, exact = (q.torch, q.jax), truth.operations
    found = [backend.operations(dtype, q.inputs_BT) for backend in backends]
    distances = {key: [distance(f[key], exact[key]) for f in found] for key in exact}
    places = []
    for i in range(2):
        excess = (key for key, d in distances.items() if d[i] > RATIO * max(d[1 - i], TINY))
        places.append(next(map(place, excess), ""))
    for key, name in hidden(q.torch.source.model):
        limit = FLOAT32_LOGITS if (key, dtype) == ("logits", "float32") else np.inf
        yield from _both(name, dtype, distances[key], places, limit)
    config = q.config(dtype)
    apart = [distance(backend.losses(config, q.batches), truth.losses) for backend in backends]
    yield from _both(f"losses of {STEPS} batches", dtype, apart, places)
    passes = [backend.forward_backward(config, q.batches[0]) for backend in backends]
    apart = [global_distance(one.gradients, truth.gradients) for one in passes]
    yield from _both("all gradients", dtype, apart, places)
    trained = [Outline.of(backend.steps(config, q.batches)) for backend in backends]
    apart = [global_distance(training.params, truth.training.params) for training in trained]
    yield from _both(f"all parameters after {STEPS} AdamW steps", dtype, apart, places)


def _both(
    name: str, dtype: Dtype, apart: list[float], places: list[str], limit: float = np.inf
) -> Iterator[Line]:
    for i, framework in enumerate(("torch", "JAX")):
        allowed = min(limit, RATIO * max(apart[1 - i], TINY))
        yield Line(
            f"{name}, {framework} from float64",
            dtype,
            apart[i],
            allowed,
            apart[1 - i],
            where=places[i],
        )
