"""Mapping between parameters of the Flax model and canonical tensors, in both directions.

`KINDS`, `FUSED` and `canonical_tensors` are the only definition of the canonical name and layout of
every leaf.
Shapes: G key/value heads, R = H / G + 2, K head width, F MLP width.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from mooshak.checkpoints import base
from mooshak.checkpoints.base import FULL_SLICE
from mooshak.errors import InputError

KINDS = {
    "kernel": "weight",
    "scale": "weight",
    "embedding": "weight",
    "bias": "bias",
    "dora_magnitude": "dora_magnitude",
    "token_rows": "token_rows",
}
"""Last name of a leaf of the Flax model -> last name of the canonical tensor.

A kernel is [in, *out], the canonical weight [out, in]. `out` is one axis or several; a bias has the
same axes.
"""

FUSED: dict[str, dict[str, tuple[slice, ...]]] = {
    # [G, R, K]: for each key head its H / G query heads, the key, the value.
    "wqkv": {
        "wq": (FULL_SLICE, slice(None, -2)),
        "wk": (FULL_SLICE, slice(-2, -1)),
        "wv": (FULL_SLICE, slice(-1, None)),
    },
    # [2, F].
    "w13": {"w1": (slice(0, 1),), "w3": (slice(1, 2),)},
}
"""Fused module (fuse_kernels) -> canonical modules, each with its slice of the axes `out`.

Every other module has its canonical name. Layers are numbered, or stacked along a first axis
(scan_layers).
"""

TABLES = ("embedding", "token_rows")
"""Leaves of two axes that have the canonical layout."""

KeyPath = tuple[Any, ...]
Region = tuple[range, ...]
"""Region of an array: the indices along every axis."""


@dataclass(frozen=True)
class CanonicalTensor:
    """Canonical tensor as a region of a leaf."""

    name: str
    kind: str
    """One of `KINDS`."""
    stacked: bool
    """True: the first axis of the leaf is the layer."""
    region: Region
    """Region of the leaf with this tensor."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the canonical tensor."""
        sizes = tuple(map(len, self.region[self.stacked :]))
        if self.kind == "kernel":
            return math.prod(sizes[1:]), sizes[0]
        return sizes if self.kind in TABLES else (math.prod(sizes),)

    def canonical(self, leaf: Any) -> Any:
        """Return the tensor in the canonical layout, from the full leaf."""
        return self.rows(leaf[_slices(self.region)])

    def rows(self, block: Any) -> Any:
        """Return rows in the canonical layout, from the `block` of the leaf that holds them."""
        if self.kind == "kernel":
            return block.reshape(self.shape[1], -1).T
        return block.reshape(-1, *self.shape[1:])

    def block(self, rows: slice) -> tuple[tuple[slice, ...], slice]:
        """Return the smallest block of the leaf with these rows, and their slice of its rows."""
        axis = self.stacked + (self.kind == "kernel")
        sizes = [len(indices) for indices in self.region[axis:]]
        sizes = sizes[:1] if self.kind in TABLES else sizes
        # Of several axes of `out`, the first with more than one element is sliced.
        long = next((i for i, size in enumerate(sizes) if size > 1), 0)
        step = math.prod(sizes[long + 1 :])
        start, stop, _ = rows.indices(self.shape[0])
        first, last = start // step, -(-stop // step)
        index = list(_slices(self.region))
        offset = index[axis + long].start
        index[axis + long] = slice(offset + first, offset + last)
        return tuple(index), slice(start - first * step, stop - first * step)

    def copy(self, tensor: Any, shard: np.ndarray, place: Region) -> None:
        """Copy this tensor into a shard of the leaf, whose region is `place`, where they overlap.

        `tensor[rows, columns]`, or `tensor[rows]`, returns a block in the canonical layout.
        """
        overlap = tuple(
            range(max(own.start, other.start), min(own.stop, other.stop))
            for own, other in zip(self.region, place, strict=True)
        )
        if not all(overlap):
            return
        target = shard[_slices(overlap, place)]
        block = _slices(overlap, self.region)[self.stacked :]
        if self.kind in TABLES:
            target[...] = tensor[block].reshape(target.shape)
            return
        columns = block[: self.kind == "kernel"]
        # The axes `out` are one axis in the canonical layout. Shardings split only the first of
        # them with more than one element, so the block is a range of rows.
        out = block[len(columns) :]
        sizes = [len(axis) for axis in self.region[self.stacked + len(columns) :]]
        corners = [axis.start for axis in out], [axis.stop - 1 for axis in out]
        first, last = (int(np.ravel_multi_index(corner, sizes)) for corner in corners)
        value = tensor[slice(first, last + 1), *columns].T
        target[...] = base.contiguous(value).reshape(target.shape)


def canonical_tensors(path: KeyPath, shape: tuple[int, ...]) -> list[CanonicalTensor]:
    """Return the canonical tensors in a leaf of the Flax model, e.g. layers.0.mlp.w1.weight.

    Raises `InputError` for a leaf that is not the model's.
    """
    names = [str(getattr(key, "key", key)) for key in path]
    if len(names) < 2 or names[-1] not in KINDS:
        raise InputError(f"{'.'.join(names)} is not a parameter of the model")
    *modules, module, kind = names
    stacked = names[0] == "layers" and not names[1].isdecimal()
    result = []
    for layer in range(shape[0]) if stacked else (0,):
        within = ["layers", str(layer), *modules[1:]] if stacked else modules
        for name, out in FUSED.get(module, {module: ()}).items():
            index = [slice(layer, layer + 1)] if stacked else []
            index += [FULL_SLICE, *out] if kind == "kernel" else [*out]
            index += [FULL_SLICE] * (len(shape) - len(index))
            region = tuple(range(size)[axis] for axis, size in zip(index, shape, strict=True))
            name = ".".join([*within, name, KINDS[kind]])
            result.append(CanonicalTensor(name, kind, stacked, region))
    return result


def _slices(region: Region, within: Region | None = None) -> tuple[slice, ...]:
    """Return the index of a region in an array that is itself the region `within` of a larger."""
    starts = [0] * len(region) if within is None else [axis.start for axis in within]
    return tuple(slice(r.start - at, r.stop - at) for r, at in zip(region, starts, strict=True))
