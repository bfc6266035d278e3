"""Logical axes of arrays and the mesh axes that shard them: one table, `LOGICAL_AXIS_RULES`."""

import math
from collections.abc import Iterable
from typing import Any

import jax
from jax import Array
from jax.sharding import PartitionSpec

LOGICAL_AXIS_RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "replica": ("data",),  # Of a batch whose columns are cut over fsdp: the embedding's.
    "sequence": ("tensor",),  # Of activations between the attention and MLP blocks.
    "embed": ("fsdp",),  # Of parameters; the residual stream is whole.
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
}
"""Logical axis -> the mesh axes that cut it. Every other axis (layers, gains) stays whole."""

Axes = tuple[str | None, ...]
"""The logical axes of an array, None where one has no name."""


def constrain(x: Array, *axes: str | None) -> Array:
    """Cut an array by its logical axes; nothing happens outside of `Parallel.activate`.

    An axis that its mesh axes do not divide stays whole.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    kept = [a if a and shards(a, size) > 1 else None for a, size in zip(axes, x.shape, strict=True)]
    return jax.lax.with_sharding_constraint(x, partition_spec(kept))


def gather(w: Array, dtype: Any, axes: Axes) -> Array:
    """A parameter as a product needs it: in the compute dtype, and no longer cut over `fsdp`.

    The cast stands before the transfer, which moves half the bytes in bfloat16. Not to be
    differentiated: the gradient would be in that dtype, too.
    """
    return constrain(w.astype(dtype), *(None if axis == "embed" else axis for axis in axes))


def shards(axis: str, size: int) -> int:
    """Into how many parts a logical axis of that size is cut, inside of `Parallel.activate`.

    An axis that its mesh axes do not divide (a sequence, the rows of one prompt) stays whole, and
    so does everything outside.
    """
    mesh = jax.sharding.get_abstract_mesh()
    parts = 1 if mesh.empty else math.prod(mesh.shape[name] for name in LOGICAL_AXIS_RULES[axis])
    return parts if size % parts == 0 else 1


def partition_spec(axes: Iterable[str | None]) -> PartitionSpec:
    return PartitionSpec(*(LOGICAL_AXIS_RULES.get(axis or "") for axis in axes))
