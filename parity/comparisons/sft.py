"""Compare supervised fine-tuning: packed conversations, in both frameworks and padded one a row."""

from collections.abc import Iterator, Mapping

import numpy as np

from mooshak.data.packing import IGNORE_INDEX, Batch
from mooshak.data.samples import Sample, make_rows
from parity.backends import Backend, ForwardBackward
from parity.backends.base import count_labels
from parity.comparisons.case import Line, ParityCase
from parity.comparisons.places import worst_gradient
from parity.comparisons.steps import compare_steps
from parity.distance import difference
from parity.tolerances import FLOAT64


def sft(q: ParityCase) -> Iterator[Line]:
    """Compare loss, every gradient and 20 steps on packed conversations in float64.

    Rows have unequal numbers of labels, the steps two micro-batches.
    """
    config = q.config("float64")
    packed = make_rows(conversation_rows(q.tokens_nBS[0]), config.T)
    ours, theirs = (backend.forward_backward(config, packed) for backend in (q.torch, q.jax))
    apart = difference(theirs.loss, ours.loss)
    where = "" if apart <= FLOAT64 else _diagnosis(q, packed, ours, theirs)
    yield Line("loss of conversations", "float64", apart, FLOAT64, where=where)
    apart, worst = worst_gradient(theirs.gradients, ours.gradients)
    name = "every gradient of conversations, the worst"
    yield Line(name, "float64", apart, FLOAT64, where=where or worst)
    batches = [make_rows(conversation_rows(tokens_BS), config.T) for tokens_BS in q.tokens_nBS]
    yield compare_steps(
        (q.torch, q.jax),
        config,
        batches,
        "on conversations",
        where,
        lambda k, *_: _denominator(q, batches[k], k),
    )


def sft_packing(q: ParityCase) -> Iterator[Line]:
    """Compare packed conversations with one in a row, padded on the left, in each framework."""
    config = q.config("float64")
    rows = conversation_rows(q.tokens_nBS[0])
    packed = make_rows(rows, config.T)
    padded = make_rows([[sample] for row in rows for sample in row], config.T, pad_left=True)
    for framework, backend in (("torch", q.torch), ("JAX", q.jax)):
        here, alone = (backend.forward_backward(config, batch) for batch in (packed, padded))
        apart = difference(here.loss, alone.loss)
        apart = max(apart, worst_gradient(here.gradients, alone.gradients)[0])
        where = "" if apart <= FLOAT64 else f"conversations of a row see each other in {framework}"
        name = f"loss and gradients of packed from padded conversations, {framework}"
        yield Line(name, "float64", apart, FLOAT64, where=where)


def conversation_rows(tokens_BS: np.ndarray) -> list[list[Sample]]:
    """Return rows of one to three conversations with labels at their ends, and room for padding."""
    rows = []
    T = tokens_BS.shape[1] - 1
    for number, tokens_S in enumerate(tokens_BS):
        sizes = [T // 4, T // 3 + number % 3]
        sizes.append(T - sum(sizes) - 1 - number % 4)
        row, start = [], 0
        for size in sizes[: 1 if number % 4 == 3 else 3]:
            tokens = tokens_S[start : start + size + 1].copy()
            labels = np.where(np.arange(size + 1) > size // 2, tokens, np.int32(IGNORE_INDEX))
            row.append(Sample(tokens, labels))
            start += size
        rows.append(row)
    return rows


def _denominator(q: ParityCase, batch: Batch[np.ndarray], k: int) -> str:
    """Return the place of a loss that differs where the sums over the batch do not."""
    parts = q.config("float64").train.gradient_accumulation_steps
    counts = [count_labels(part) for part in batch.chunk(parts)]
    if parts > 1 and len(set(counts)) > 1:
        return f"step {k}: denominator of micro-batches with {counts} labels, not of the batch"
    return f"step {k}: the loss"


def _diagnosis(
    q: ParityCase, batch: Batch[np.ndarray], ours: ForwardBackward, theirs: ForwardBackward
) -> str:
    """Return the mistake whose loss in one framework is that of the other."""
    config = q.config("float64")
    # A fault acts on the variants too, but its own variant in the sound framework has its loss.
    checks: tuple[tuple[str, Backend, float], ...] = (
        ("JAX", q.torch, theirs.loss),
        ("torch", q.jax, ours.loss),
    )
    for framework, sound, loss in checks:
        for name, variant in _mistakes(batch).items():
            if difference(sound.forward_backward(config, variant).loss, loss) <= FLOAT64:
                return f"{name} in {framework}"
    return "loss of conversations"


def _mistakes(batch: Batch[np.ndarray]) -> Mapping[str, Batch[np.ndarray]]:
    """Return batches with the labels of typical mistakes."""
    ignored, no = batch.labels == IGNORE_INDEX, np.int32(IGNORE_INDEX)
    assert batch.segments is not None
    return {
        "mask of the answers one token late": replace_labels(batch, late_mask(batch.labels)),
        "end tokens have no label": replace_labels(batch, without_ends(batch.labels)),
        "prompts and padding count": replace_labels(batch, np.where(ignored, 0, batch.labels)),
        "conversations of a row see each other": batch._replace(
            segments=np.zeros_like(batch.segments)
        ),
        "no label counts": replace_labels(batch, np.full_like(batch.labels, no)),
    }


def replace_labels(batch: Batch[np.ndarray], labels_BT: np.ndarray) -> Batch[np.ndarray]:
    """Return a batch with other labels, int32."""
    return batch._replace(labels=labels_BT.astype(np.int32))


def late_mask(labels_BT: np.ndarray) -> np.ndarray:
    """Return labels without the first one of each answer: the mask is one token late."""
    before_BT = np.pad(labels_BT, ((0, 0), (1, 0)), constant_values=IGNORE_INDEX)[:, :-1]
    return np.where(before_BT == IGNORE_INDEX, IGNORE_INDEX, labels_BT)


def without_ends(labels_BT: np.ndarray) -> np.ndarray:
    """Return labels without the last one of each answer, its end token."""
    after_BT = np.pad(labels_BT, ((0, 0), (0, 1)), constant_values=IGNORE_INDEX)[:, 1:]
    return np.where(after_BT == IGNORE_INDEX, IGNORE_INDEX, labels_BT)
