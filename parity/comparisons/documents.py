"""Compare packed documents: both frameworks, and each document alone."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from mooshak.data.packing import Batch
from parity.backends import ForwardBackward
from parity.comparisons.case import Line, ParityCase
from parity.comparisons.places import worst_gradient
from parity.distance import difference, distance
from parity.tolerances import FLOAT64


def document_mask(q: ParityCase) -> Iterator[Line]:
    """Compare logits, loss and every gradient of packed documents in float64."""
    config, batch = q.config("float64"), q.packed[0]
    ours, theirs = (backend.forward_backward(config, batch) for backend in (q.torch, q.jax))
    yield from _packed_lines("packed documents", theirs, ours, batch)


def packing(q: ParityCase) -> Iterator[Line]:
    """Compare packed documents with each document alone in float64, in each framework."""
    config, batch = q.config("float64"), q.packed[0]
    for framework, backend in (("torch", q.torch), ("JAX", q.jax)):
        packed = backend.forward_backward(config, batch)
        logits_BTV, loss, grads = np.full_like(packed.logits, np.nan), 0.0, dict[str, Any]()
        for places, documents in _documents(batch):
            found = backend.forward_backward(config, documents)
            for place_, logits_TV in zip(places, found.logits, strict=True):
                logits_BTV[place_] = logits_TV
            loss += found.loss
            grads = {name: grads.get(name, 0.0) + grad for name, grad in found.gradients.items()}
        alone = ForwardBackward(logits_BTV, loss, grads)
        name = f"packed documents from each document alone, {framework}"
        yield from _packed_lines(name, packed, alone, batch)


def _documents(
    batch: Batch[np.ndarray],
) -> Iterator[tuple[list[tuple[int, slice]], Batch[np.ndarray]]]:
    """Yield the documents of each length: their places in a batch, and unpacked, one per row."""
    assert batch.segments is not None
    by_length: dict[int, list[tuple[int, slice]]] = {}
    for row, segments_T in enumerate(batch.segments):
        starts = np.flatnonzero(np.diff(segments_T, prepend=0))
        for start, end in zip(starts, [*starts[1:], len(segments_T)], strict=True):
            by_length.setdefault(end - start, []).append((row, slice(start, end)))
    for places in by_length.values():
        tokens_BT, labels_BT = (
            np.stack([array[place] for place in places]) for array in (batch.tokens, batch.labels)
        )
        yield places, Batch(tokens_BT, labels_BT)


def _packed_lines(
    name: str, measured: ForwardBackward, truth: ForwardBackward, batch: Batch[np.ndarray]
) -> Iterator[Line]:
    """Yield the lines of logits, loss and gradients of a packed batch."""
    apart = distance(measured.logits, truth.logits)
    where = ""
    if not apart <= FLOAT64:
        assert batch.segments is not None and batch.positions is not None
        norm_BT = np.linalg.norm(truth.logits, axis=-1)
        apart_BT = np.linalg.norm(measured.logits - truth.logits, axis=-1)
        row, t = np.argwhere(~(apart_BT <= FLOAT64 * norm_BT))[0]
        document, token = batch.segments[row, t], batch.positions[row, t]
        where = f"row {row}, document {document}, token {token}"
    yield Line(f"logits of {name}", "float64", apart, FLOAT64, where=where)
    apart = difference(measured.loss, truth.loss)
    where = "" if apart <= FLOAT64 else "loss of packed documents"
    yield Line(f"loss of {name}", "float64", apart, FLOAT64, where=where)
    apart, where = worst_gradient(measured.gradients, truth.gradients)
    yield Line(f"every gradient of {name}, the worst", "float64", apart, FLOAT64, where=where)
