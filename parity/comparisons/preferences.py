"""Compare an objective on preference pairs: its loss and steps, on a model with adapters."""

import math
from collections.abc import Iterator, Sequence
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
from parity.comparisons.steps import compare_steps
from parity.distance import difference
from parity.tolerances import FLOAT64

DPO = DPOConfig(beta=2.0, length_normalized=True)
LORA = LoraConfig(rank=3, alpha=4.0, rslora=True, dora=True)

DENOMINATOR = "step 0: pairs of each micro-batch in the denominator, not those of the batch"


def preferences(q: ParityCase) -> Iterator[Line]:
    """Compare loss, gradients and 20 steps of DPO (arXiv:2305.18290) in float64.

    The adapters are those of DoRA, with rsLoRA's scale. Micro-batches have unequal numbers of
    pairs.
    """
    ours, theirs = (one.with_source(adapted(one.source)) for one in (q.torch, q.jax))
    config = replace(
        q.config("float64"),
        model=ours.source.model,
        data=DataConfig(format="preferences"),
        dpo=DPO,
        lora=LORA,
    )
    batches = [pairs(tokens_BS, number) for number, tokens_BS in enumerate(q.tokens_nBS)]
    found = [one.forward_backward(config, batches[0]) for one in (ours, theirs)]
    apart, where = difference(found[1].loss, found[0].loss), ""
    if not apart <= FLOAT64:
        others = [one.forward_backward(config, swapped(batches[0])) for one in (theirs, ours)]
        where = _diagnosis(found, others, count_pairs(batches[0]))
    yield Line("loss of DPO on adapters", "float64", apart, FLOAT64, where=where)
    # torch computes no gradients of frozen parameters.
    common = {name: found[1].gradients[name] for name in found[0].gradients}
    apart, worst = worst_gradient(common, found[0].gradients)
    name = "every gradient of DPO on adapters, the worst"
    yield Line(name, "float64", apart, FLOAT64, where=where or worst)
    yield compare_steps(
        (ours, theirs),
        config,
        batches,
        "of DPO on adapters",
        where,
        lambda k, *_: f"step {k}: the update" if k else DENOMINATOR,
    )


def _diagnosis(
    found: Sequence[ForwardBackward], others: Sequence[ForwardBackward], n_pairs: int
) -> str:
    """Return the mistake that explains the losses; `others` are those of the swapped answers."""
    if any(abs(one.loss / n_pairs - math.log(2)) < 1e-9 for one in found):
        return "the reference: it is the model that is trained"
    if any(difference(a.loss, b.loss) < 1e-9 for a, b in zip(found, others, strict=True)):
        return "chosen and rejected"
    return "log-probabilities of the answers"


def adapted(source: Checkpoint) -> Checkpoint:
    """Return the checkpoint with adapters that change its function."""
    result = with_adapters(source, LORA, 0, np.dtype(np.float64))

    def read(name: str, rows: slice = FULL_SLICE) -> np.ndarray:
        if not name.endswith(".lora_b.weight"):
            return result.read(name, rows)
        return initial_weight(result.model, 0, name, rows, dtype=np.float64, gain_std=0.1)

    return replace(result, read=read)


def pairs(tokens_BS: np.ndarray, number: int = 0) -> Batch[np.ndarray]:
    """Return the batch of a step: answers of unequal lengths after two tokens, then padding.

    The first row has two pairs, the others one.
    """
    B, S = tokens_BS.shape
    segments_BS = np.ones((B, S), np.int32)
    for row in range(B):
        segments_BS[row, S // 3 + row % 4 :] = 2
        segments_BS[row, S - 1 - row % 3 :] = 0
    fourths = np.arange(S) * 4 // S + 1
    segments_BS[0] = np.where(np.arange(S) < S - 1, fourths, 0)
    batch = make_batch(tokens_BS, segments_BS)
    assert batch.segments is not None and batch.positions is not None
    is_answer_BT = (batch.segments > 0) & (batch.positions >= 1)
    # The last token of a segment has no label: the next one is of another.
    labels_BT = np.where(is_answer_BT, batch.labels, np.int32(IGNORE_INDEX))
    reference_BS = np.random.default_rng(1 + number).normal(-9, 3, (B, 4))
    return batch._replace(labels=labels_BT, reference=reference_BS)


def count_pairs(batch: Batch[np.ndarray]) -> int:
    """Return the number of pairs."""
    assert batch.segments is not None
    return int(batch.segments.max(axis=1).sum()) // 2


def swapped(batch: Batch[np.ndarray]) -> Batch[np.ndarray]:
    """Return the batch with chosen and rejected exchanged."""
    assert batch.segments is not None and batch.reference is not None
    segments_BT = np.array([0, 2, 1, 4, 3], np.int32)[batch.segments]
    return batch._replace(segments=segments_BT, reference=batch.reference[:, [1, 0, 3, 2]])
