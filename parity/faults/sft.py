"""Patches of supervised fine-tuning: labels, denominators and segments of conversations.

Each function returns the replacements in one framework.
"""

from typing import Any

import jax
import jax.numpy as jnp
import torch

import mooshak_jax.objectives
import mooshak_torch.objectives
from mooshak.data.packing import IGNORE_INDEX, Batch
from parity.faults.model import Patch

to, jo = mooshak_torch.objectives, mooshak_jax.objectives


def late_mask(labels: Any, xp: Any) -> Any:
    """Ignore the first label of each answer."""
    before = xp.roll(labels, 1, 1) == IGNORE_INDEX
    return xp.where(before | _edge(labels, 0, xp), IGNORE_INDEX, labels)


def without_ends(labels: Any, xp: Any) -> Any:
    """Ignore the last label of each answer."""
    after = xp.roll(labels, -1, 1) == IGNORE_INDEX
    return xp.where(after | _edge(labels, labels.shape[1] - 1, xp), IGNORE_INDEX, labels)


def all_labels(labels: Any, xp: Any) -> Any:
    """Count ignored labels as token 0."""
    return xp.where(labels == IGNORE_INDEX, 0, labels)


def _edge(labels: Any, column: int, xp: Any) -> Any:
    kwargs = {"device": labels.device} if xp is torch else {}
    return (xp.arange(labels.shape[1], **kwargs) == column)[None]


def labels_torch(change: Any) -> list[Patch]:
    """Replace the labels of torch's loss by `change(labels, torch)`."""
    original = to.CausalLM.forward

    def forward(self: Any, batch: Batch) -> torch.Tensor:
        return original(self, batch._replace(labels=change(batch.labels, torch)))

    return [(to.CausalLM, "forward", forward)]


def labels_jax(change: Any) -> list[Patch]:
    """Replace the labels of JAX's loss by `change(labels, jnp)`."""
    original = jo.CausalLM.__call__

    def call(self: Any, params: Any, batch: Batch) -> jax.Array:
        return original(self, params, batch._replace(labels=change(jnp.asarray(batch.labels), jnp)))

    return [(jo.CausalLM, "__call__", call)]


def count_labels(batch: Batch) -> Any:
    """Return the number of labels of some rows."""
    return (batch.labels != IGNORE_INDEX).sum()


def local_denominator_torch(
    objective: type[to.CausalLM] = to.CausalLM, count_local: Any = count_labels
) -> list[Patch]:
    """Divide each micro-batch by its own labels, or `count_local`, and average the parts."""
    prepare, original = objective.prepare, objective.forward
    seen: list[tuple[int, int]] = []

    def remember(self: Any, batch: Batch, parallel: Any) -> int:
        count = prepare(self, batch, parallel)
        seen[:] = [(count, len(batch.tokens))]
        return count

    def forward(self: Any, batch: Batch) -> torch.Tensor:
        loss = original(self, batch)
        if not seen:
            return loss
        (count, rows), here = seen[0], count_local(batch).clamp(min=1)
        return loss / here * count * len(batch.tokens) / rows

    return [(objective, "prepare", remember), (objective, "forward", forward)]


def local_denominator_jax(
    objective: type[jo.CausalLM] = jo.CausalLM,
    method: str = "__call__",
    count_local: Any = count_labels,
) -> list[Patch]:
    """Divide each micro-batch by its own labels, or `count_local`, and average the parts.

    `method` returns the loss, or the loss and metrics.
    """
    prepare, original = objective.prepare, getattr(objective, method)
    seen: list[tuple[Any, int]] = []

    def remember(self: Any, batch: Batch) -> Any:
        count = prepare(self, batch)
        seen[:] = [(count, len(batch.tokens))]
        return count

    def call(self: Any, params: Any, batch: Batch) -> Any:
        result = original(self, params, batch)
        if not seen:
            return result
        loss, *metrics = result if isinstance(result, tuple) else (result,)
        (count, rows), here = seen[0], jnp.maximum(1, count_local(batch))
        loss = loss / here * count * len(batch.tokens) / rows
        return (loss, *metrics) if metrics else loss

    return [(objective, "prepare", remember), (objective, method, call)]
