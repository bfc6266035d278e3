"""The one table between parameters of the Flax model and canonical tensors, in both directions.

`KINDS`, `FUSED` and `canonical_tensors` define the canonical name and layout of every leaf; nothing
else in the project knows.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from mooshak.checkpoints import base
from mooshak.checkpoints.base import FULL_SLICE
from mooshak.errors import InputError

KINDS = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}
"""Last name of a leaf of the Flax model -> the canonical one.

A kernel is `[in, *out]`, where the canonical weight is `[out, in]`. `out` is one axis or several,
in which biases lie too.
"""

FUSED: dict[str, dict[str, tuple[slice, ...]]] = {
    # [G, R + 2, K]: R = H / G heads of queries, then their key, then their value.
    "wqkv": {
        "wq": (FULL_SLICE, slice(None, -2)),
        "wk": (FULL_SLICE, slice(-2, -1)),
        "wv": (FULL_SLICE, slice(-1, None)),
    },
    # [2, F].
    "w13": {"w1": (slice(0, 1),), "w3": (slice(1, 2),)},
}
"""A module of several canonical ones (fuse_kernels) -> which part of `out` each of them is.

Every other module is the canonical one of its name. The layers are numbered, or stacked along a
first axis (scan_layers).
"""

Path_ = tuple[Any, ...]
Region = tuple[range, ...]
"""A part of an array: the indices along every axis."""


@dataclass(frozen=True)
class CanonicalTensor:
    """A canonical tensor as a part of a leaf."""

    name: str
    kind: str
    """One of `KINDS`."""
    stacked: bool
    """The first axis of the leaf counts layers."""
    region: Region
    """Which part of the leaf it is."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the canonical tensor."""
        sizes = tuple(map(len, self.region[self.stacked :]))
        if self.kind == "kernel":
            return math.prod(sizes[1:]), sizes[0]
        return sizes if self.kind == "embedding" else (math.prod(sizes),)

    def canonical(self, leaf: Any) -> Any:
        """The tensor in the canonical layout, out of the leaf."""
        return self.rows(leaf[_slices(self.region)])

    def rows(self, block: Any) -> Any:
        """Rows of the tensor in the canonical layout, out of the block of the leaf with them."""
        if self.kind == "kernel":
            return block.reshape(self.shape[1], -1).T
        return block.reshape(-1, *self.shape[1:])

    def block(self, rows: slice) -> tuple[tuple[slice, ...], slice]:
        """The smallest block of the leaf with some rows of the tensor, and where they are in it."""
        axis = self.stacked + (self.kind == "kernel")
        sizes = [len(indices) for indices in self.region[axis:]]
        sizes = sizes[:1] if self.kind == "embedding" else sizes
        # Of several axes of `out`, the first long one is cut.
        long = next((i for i, size in enumerate(sizes) if size > 1), 0)
        step = math.prod(sizes[long + 1 :])
        start, stop, _ = rows.indices(self.shape[0])
        first, last = start // step, -(-stop // step)
        cuts = list(_slices(self.region))
        offset = cuts[axis + long].start
        cuts[axis + long] = slice(offset + first, offset + last)
        return tuple(cuts), slice(start - first * step, stop - first * step)

    def copy(self, tensor: Any, shard: np.ndarray, place: Region) -> None:
        """Fill what this tensor covers of a shard, whose place in the leaf is given.

        `tensor[rows, columns]`, or `tensor[rows]`, is a block in the canonical layout.
        """
        both = tuple(
            range(max(ours.start, theirs.start), min(ours.stop, theirs.stop))
            for ours, theirs in zip(self.region, place, strict=True)
        )
        if not all(both):
            return
        target = shard[_slices(both, place)]
        block = _slices(both, self.region)[self.stacked :]
        if self.kind == "embedding":
            target[...] = tensor[block].reshape(target.shape)
            return
        columns = block[: self.kind == "kernel"]
        # The axes of `out` are one in the canonical layout; only the first long one is ever cut.
        out = block[len(columns) :]
        sizes = [len(axis) for axis in self.region[self.stacked + len(columns) :]]
        corners = [cut.start for cut in out], [cut.stop - 1 for cut in out]
        first, last = (int(np.ravel_multi_index(corner, sizes)) for corner in corners)
        value = tensor[slice(first, last + 1), *columns].T
        target[...] = base.contiguous(value).reshape(target.shape)


def canonical_tensors(path: Path_, shape: tuple[int, ...]) -> list[CanonicalTensor]:
    """The canonical tensors that a leaf of the Flax model holds, e.g. layers.0.mlp.w1.weight.

    Raises `InputError` for a leaf that is none of the model's.
    """
    names = [str(getattr(key, "key", key)) for key in path]
    if len(names) < 2 or names[-1] not in KINDS:
        raise InputError(f"{'.'.join(names)} is no parameter of the model")
    *modules, module, kind = names
    stacked = names[0] == "layers" and not names[1].isdecimal()
    result = []
    for layer in range(shape[0]) if stacked else (0,):
        within = ["layers", str(layer), *modules[1:]] if stacked else modules
        for name, out in FUSED.get(module, {module: ()}).items():
            cuts = [slice(layer, layer + 1)] if stacked else []
            cuts += [FULL_SLICE, *out] if kind == "kernel" else [*out]
            cuts += [FULL_SLICE] * (len(shape) - len(cuts))
            region = tuple(range(size)[cut] for cut, size in zip(cuts, shape, strict=True))
            name = ".".join([*within, name, KINDS[kind]])
            result.append(CanonicalTensor(name, kind, stacked, region))
    return result


def _slices(region: Region, within: Region | None = None) -> tuple[slice, ...]:
    """What picks a region out of an array, which is the region `within` of a larger one."""
    starts = [0] * len(region) if within is None else [axis.start for axis in within]
    return tuple(slice(r.start - at, r.stop - at) for r, at in zip(region, starts, strict=True))
