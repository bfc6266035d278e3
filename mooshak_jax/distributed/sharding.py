"""Logical axes of arrays and the mesh axes that shard them: one table, `LOGICAL_AXIS_RULES`."""

import math
from collections.abc import Iterable
from typing import Any

import jax
from jax import Array
from jax.sharding import PartitionSpec

LOGICAL_AXIS_RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "replica": ("data",),  # Rows of the embedding's output, whose columns are sharded over fsdp.
    "sequence": ("tensor",),  # Time axis of activations between attention and MLP.
    "embed": ("fsdp",),  # Model width of parameters; in the residual stream it is not sharded.
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
}
"""Logical axis -> the mesh axes that shard it. Other axes (layers, gains) are not sharded."""

Axes = tuple[str | None, ...]
"""Logical axes of an array; None for an axis that is not sharded."""


def constrain(x: Array, *axes: str | None) -> Array:
    """Return the array, sharded by its logical axes inside `Parallel.activate`.

    An axis that is not divisible by its mesh axes is not sharded.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    divisible = [
        axis if axis and shards(axis, size) > 1 else None
        for axis, size in zip(axes, x.shape, strict=True)
    ]
    return jax.lax.with_sharding_constraint(x, partition_spec(divisible))


def gather(w: Array, dtype: Any, axes: Axes) -> Array:
    """Return a parameter in the compute dtype, all-gathered over `fsdp`.

    Cast before the transfer, which halves its bytes in bfloat16. Do not differentiate through it:
    the gradient would have the compute dtype.
    """
    return constrain(w.astype(dtype), *(None if axis == "embed" else axis for axis in axes))


def shards(axis: str, size: int) -> int:
    """Return the number of shards of a logical axis of this size, inside `Parallel.activate`.

    It is 1 outside, and for an axis that is not divisible by its mesh axes (such as a short
    sequence, or the rows of one prompt).
    """
    mesh = jax.sharding.get_abstract_mesh()
    n = 1 if mesh.empty else math.prod(mesh.shape[name] for name in LOGICAL_AXIS_RULES[axis])
    return n if size % n == 0 else 1


def partition_spec(axes: Iterable[str | None]) -> PartitionSpec:
    """Return the mesh axes of an array with these logical axes."""
    return PartitionSpec(*(LOGICAL_AXIS_RULES.get(axis or "") for axis in axes))
