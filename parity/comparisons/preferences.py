"""Compare an objective on preference pairs, on a model with adapters."""

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from mooshak.checkpoints.adapters import with_adapters
from mooshak.checkpoints.base import FULL_SLICE, Checkpoint
from mooshak.config.dpo import DPOConfig
from mooshak.config.lora import LoraConfig
from mooshak.config.sections import DataConfig
from mooshak.data.packing import IGNORE_INDEX, Batch, make_batch
from mooshak.numerics.init_weights import initial_weight
from parity.backends import ForwardBackward
from parity.comparisons.case import Line, ParityCase
from parity.comparisons.places import worst_gradient
from parity.distance import difference
from parity.tolerances import FLOAT64

DPO = DPOConfig(beta=2.0, length_normalized=True)
LORA = LoraConfig(rank=3, alpha=4.0, dora=True)


def preferences(q: ParityCase) -> Iterator[Line]:
    """Compare loss and gradients of DPO (arXiv:2305.18290) with DoRA in float64."""
    batch, config = pairs(q), q.config("float64")
    config = replace(config, data=DataConfig(format="preferences"), dpo=DPO, lora=LORA)
    backends = [one.with_source(adapted(one.source)) for one in (q.torch, q.jax)]

    def measure(batch: Batch[np.ndarray]) -> list[ForwardBackward]:
        return [backend.forward_backward(config, batch) for backend in backends]

    ours, theirs = measure(batch)
    apart, where = difference(theirs.loss, ours.loss), ""
    if not apart <= FLOAT64:
        where, others = "log-probabilities of the answers", measure(swapped(batch))[::-1]
        if any(abs(one.loss / len(batch.tokens) - math.log(2)) < 1e-9 for one in (ours, theirs)):
            where = "the reference: it is the model that is trained"
        elif any(
            difference(one.loss, other.loss) < 1e-9
            for one, other in zip((ours, theirs), others, strict=True)
        ):
            where = "chosen and rejected"
    yield Line("loss of DPO on adapters", "float64", apart, FLOAT64, where=where)
    # torch computes no gradients of frozen parameters.
    common = {name: grad for name, grad in theirs.gradients.items() if name in ours.gradients}
    apart, where = worst_gradient(common, ours.gradients)
    yield Line(
        "every gradient of DPO on adapters, the worst", "float64", apart, FLOAT64, where=where
    )


def adapted(source: Checkpoint) -> Checkpoint:
    """Return the checkpoint with adapters that change its function."""
    result = with_adapters(source, LORA, 0, np.dtype(np.float64))

    def read(name: str, rows: slice = FULL_SLICE) -> np.ndarray:
        if not name.endswith(".lora_b.weight"):
            return result.read(name, rows)
        return initial_weight(result.model, 0, name, rows, dtype=np.float64, gain_std=0.1)

    return replace(result, read=read)


def pairs(q: ParityCase) -> Batch[np.ndarray]:
    """Return a pair per row: answers of unequal lengths after two tokens, then padding."""
    tokens_BS = q.tokens_nBS[0]
    B, S = tokens_BS.shape
    segments_BS = np.ones((B, S), np.int32)
    for row in range(B):
        segments_BS[row, S // 3 + row % 4 :] = 2
        segments_BS[row, S - 1 - row % 3 :] = 0
    batch = make_batch(tokens_BS, segments_BS)
    assert batch.segments is not None and batch.positions is not None
    is_answer_BT = (batch.segments > 0) & (batch.positions >= 1)
    # The last token of a segment has no label: the next one is of another.
    labels_BT = np.where(is_answer_BT, batch.labels, np.int32(IGNORE_INDEX))
    reference_BS = np.random.default_rng(1).normal(-9, 3, (B, 2))
    return batch._replace(labels=labels_BT, reference=reference_BS)


def swapped(batch: Batch[np.ndarray]) -> Batch[np.ndarray]:
    """Return the batch with chosen and rejected exchanged."""
    assert batch.segments is not None and batch.reference is not None
    segments_BT = np.array([0, 2, 1], np.int32)[batch.segments]
    return batch._replace(segments=segments_BT, reference=batch.reference[:, [1, 0]])
