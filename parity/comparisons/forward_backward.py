"""Compare hidden states, logits, losses, log-probabilities and gradients in float64."""

from collections.abc import Iterator

import numpy as np

from mooshak.data.packing import IGNORE_INDEX, Batch
from parity.comparisons.case import STEPS, Line, ParityCase
from parity.comparisons.places import hidden, place, worst_gradient
from parity.distance import distance, worst_tensor
from parity.tolerances import FLOAT64


def forward(q: ParityCase) -> Iterator[Line]:
    """Compare logits and the hidden states of every layer in float64."""
    ours = q.torch.operations("float64", q.inputs_BT)
    theirs = q.jax.operations("float64", q.inputs_BT)
    distances = {
        key: distance(theirs[key], value)
        if key in theirs and theirs[key].shape == value.shape
        else np.inf
        for key, value in ours.items()
    }
    where = next((place(key) for key, d in distances.items() if not d <= FLOAT64), "")
    for key, name in hidden(q.torch.source.model):
        yield Line(name, "float64", distances[key], FLOAT64, where=where)


def loss(q: ParityCase) -> Iterator[Line]:
    """Compare the loss of every batch in float64."""
    config = q.config("float64")
    ours, theirs = (backend.losses(config, q.batches) for backend in (q.torch, q.jax))
    measured = distance(theirs, ours)
    where = "" if measured <= FLOAT64 else "loss"
    yield Line(f"losses of {STEPS} batches", "float64", measured, FLOAT64, where=where)


def padding(q: ParityCase) -> Iterator[Line]:
    """Compare the loss of a batch in which three labels in ten are padding, in float64."""
    batch = _padded(q, np.random.default_rng(1).random(q.inputs_BT.shape) < 0.3)
    config = q.config("float64")
    ours, theirs = (backend.losses(config, [batch]) for backend in (q.torch, q.jax))
    measured = distance(theirs, ours)
    where = "" if measured <= FLOAT64 else "loss of labels that are padding"
    yield Line("loss of a padded batch", "float64", measured, FLOAT64, where=where)


def log_probs(q: ParityCase) -> Iterator[Line]:
    """Compare log-probabilities per token and their gradients in float64.

    Three labels in ten are padding. The upstream gradient differs from token to token: normal, and
    zero for every fifth.
    """
    random = np.random.default_rng(1)
    batch = _padded(q, random.random(q.inputs_BT.shape) < 0.3)
    weights_BT = random.normal(size=q.inputs_BT.shape)
    weights_BT *= random.random(weights_BT.shape) < 0.8
    (ours, our_gradients), (theirs, their_gradients) = (
        backend.log_probs("float64", batch, weights_BT) for backend in (q.torch, q.jax)
    )
    measured = distance(theirs, ours)
    where = "" if measured <= FLOAT64 else "log-probabilities"
    yield Line("log-probabilities per token", "float64", measured, FLOAT64, where=where)
    where, measured = worst_tensor(their_gradients, our_gradients)
    name = "gradients of weighted log-probabilities, the worst"
    yield Line(name, "float64", measured, FLOAT64, where=where)


def gradients(q: ParityCase) -> Iterator[Line]:
    """Compare every gradient of the first batch in float64."""
    config = q.config("float64")
    ours, theirs = (backend.forward_backward(config, q.batches[0]) for backend in (q.torch, q.jax))
    measured, where = worst_gradient(theirs.gradients, ours.gradients)
    yield Line("every gradient, the worst", "float64", measured, FLOAT64, where=where)


def _padded(q: ParityCase, padding_BT: np.ndarray) -> Batch[np.ndarray]:
    """Return the first batch with some labels ignored."""
    batch = q.batches[0]
    return batch._replace(labels=np.where(padding_BT, np.int32(IGNORE_INDEX), batch.labels))
