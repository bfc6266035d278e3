"""Checkpoints of the JAX side: Orbax, asynchronous, resharding; and the table of names.

`KINDS`, `FUSED` and `parts` say how a parameter of the Flax model is called and laid out
canonically, in both directions; nothing else in the project knows.
"""

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from jax import Array
from jax.sharding import SingleDeviceSharding

from mooshak import huggingface, interchange
from mooshak.checkpoints import kind_of, readable
from mooshak.config import Config, Dtype, ModelConfig
from mooshak.errors import InputError
from mooshak.extension import initial
from mooshak.files import new_directory
from mooshak.initial import initial_weight
from mooshak.interchange import EVERY, Checkpoint
from mooshak.tokenizer import Tokenizer
from mooshak_jax.arrays import Arrays, Writer
from mooshak_jax.model import PARAMETERS, Model
from mooshak_jax.parallel import Parallel

logging.getLogger("absl").setLevel(logging.ERROR)

KINDS = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}
"""Last name of a leaf of the Flax model -> the canonical one.

A kernel is `[in, *out]`, where the canonical weight is `[out, in]`. `out` is one axis or several,
in which biases lie too.
"""

FUSED: dict[str, dict[str, tuple[slice, ...]]] = {
    # [G, R + 2, K]: R = H / G heads of queries, then their key, then their value.
    "wqkv": {
        "wq": (EVERY, slice(None, -2)),
        "wk": (EVERY, slice(-2, -1)),
        "wv": (EVERY, slice(-1, None)),
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
class Part:
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
        target[...] = interchange.contiguous(value).reshape(target.shape)


def parts(path: Path_, shape: tuple[int, ...]) -> list[Part]:
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
            cuts += [EVERY, *out] if kind == "kernel" else [*out]
            cuts += [EVERY] * (len(shape) - len(cuts))
            region = tuple(range(size)[cut] for cut, size in zip(cuts, shape, strict=True))
            name = ".".join([*within, name, KINDS[kind]])
            result.append(Part(name, kind, stacked, region))
    return result


def _slices(region: Region, within: Region | None = None) -> tuple[slice, ...]:
    """What picks a region out of an array, which is the region `within` of a larger one."""
    starts = [0] * len(region) if within is None else [axis.start for axis in within]
    return tuple(slice(r.start - at, r.stop - at) for r, at in zip(region, starts, strict=True))


def abstract_params(model: ModelConfig, dtype: Dtype, parallel: Parallel | None = None) -> Any:
    """Shapes, dtypes and shardings of the parameters, as a tree of dicts, without allocating any.

    Without `parallel` they are whole on one device.
    """
    layers = ("layers",) if model.scan_layers else ()

    def leaf(path: Path_, variable: nnx.Variable) -> jax.ShapeDtypeStruct:
        axes = variable.get_metadata()["axes"]
        axes = (*layers, *axes) if str(getattr(path[0], "key", path[0])) == "layers" else axes
        sharding = parallel and parallel.sharding(*axes)
        return jax.ShapeDtypeStruct(variable.shape, variable.dtype, sharding=sharding)

    state = _split(model, dtype)[1]
    leaves = jax.tree.map_with_path(leaf, state, is_leaf=lambda x: isinstance(x, nnx.Variable))
    return nnx.to_pure_dict(leaves)


def graph(model: ModelConfig, dtype: Dtype, remat: str = "none") -> nnx.GraphDef:
    """The model without its parameters; `join` puts both together."""
    return _split(model, dtype, remat)[0]


def _split(model: ModelConfig, dtype: Dtype, remat: str = "none") -> tuple[nnx.GraphDef, Any]:
    split = nnx.split(nnx.eval_shape(lambda: Model(model, dtype, remat)), nnx.Param, ...)
    return split[0], split[1]


def join(graphdef: nnx.GraphDef, params: Any) -> Model:
    """The model from its graph and a tree of parameters."""
    return nnx.merge(graphdef, nnx.State(params))


def fill(abstract: Any, read: Callable[[str], Any]) -> Any:
    """A tree like `abstract`, each device of this process given its shard of every leaf.

    `read(name)[rows, columns]` is a block of a canonical tensor.
    """

    def leaf(path: Path_, like: Any) -> Array:
        sharding = like.sharding or SingleDeviceSharding(jax.devices()[0])
        indices: Mapping[Any, Any] = sharding.addressable_devices_indices_map(like.shape)
        places = {
            device: tuple(range(size)[cut] for cut, size in zip(cuts, like.shape, strict=True))
            for device, cuts in indices.items()
        }
        # Devices that hold the same part of the leaf are given the same array.
        shards = {place: np.empty([*map(len, place)], like.dtype) for place in places.values()}
        for part in parts(path, like.shape):
            tensor = read(part.name)
            for place, shard in shards.items():
                part.copy(tensor, shard, place)
        arrays = [jax.device_put(shards[place], device) for device, place in places.items()]
        return jax.make_array_from_single_device_arrays(like.shape, sharding, arrays)

    return jax.tree.map_with_path(leaf, abstract)


@dataclass(frozen=True)
class _Initial:
    """The initial value of a parameter; a block of it is made when it is asked for."""

    model: ModelConfig
    seed: int
    name: str
    dtype: np.dtype
    gain_std: float

    def __getitem__(self, block: tuple[slice, ...]) -> np.ndarray:
        rows, columns = (*block, EVERY)[:2]
        return initial_weight(
            self.model, self.seed, self.name, rows, columns, self.dtype, self.gain_std
        )


def initialize(
    model: ModelConfig,
    dtype: Dtype,
    seed: int,
    gain_std: float = 0.0,
    parallel: Parallel | None = None,
) -> Any:
    """The parameters from the counter-based initialiser: every process makes its shards only."""
    kind = np.dtype(PARAMETERS[dtype])
    return fill(
        abstract_params(model, dtype, parallel),
        lambda name: _Initial(model, seed, name, kind, gain_std),
    )


def start_saving(state: dict[str, Any], path: Path) -> Callable[[], None]:
    """Take a snapshot and write it to `path` in the background; returns the function that waits."""
    # The bits of weights are noise: zstd is slower than the disk. Small chunks are for conversions,
    # which need not hold a whole array to read a part of it.
    checkpointer = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler(use_compression=False))
    chunks = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=interchange.BLOCK), state)
    arguments = ocp.args.PyTreeSave(_stored(state), save_args=_stored(chunks))
    checkpointer.save(path.absolute() / "orbax", args=arguments)

    def wait() -> None:
        checkpointer.wait_until_finished()
        checkpointer.close()

    return wait


def restore(
    model: ModelConfig, dtype: Dtype, source: Checkpoint, parallel: Parallel | None = None
) -> dict[str, Any]:
    """`params`, `exp_avg` and `exp_avg_sq` of an open training checkpoint, laid out as `model`."""
    abstract = abstract_params(model, dtype, parallel)
    state = {"params": fill(abstract, source.read)}
    for moment in interchange.MOMENTS:
        state[moment] = fill(abstract, partial(_read_moment, source, moment))
    return state


def _read_moment(source: Checkpoint, moment: str, name: str) -> np.ndarray:
    return source.read(f"{moment}.{name}")


def begin(config: Config, tokenizer: Tokenizer, parallel: Parallel) -> Any:
    """The parameters with the weights of `init.from`, and rows for the pieces that it lacks."""
    with readable(Path(config.init.from_), "jax", parallel) as source_path:
        source = initial(config, open_checkpoint(source_path), tokenizer)
        return fill(abstract_params(config.model, config.train.dtype, parallel), source.read)


def load(
    path: str | Path,
    dtype: Dtype,
    parallel: Parallel | None = None,
    layout: ModelConfig | None = None,
) -> tuple[ModelConfig, Any]:
    """The model's description and parameters of a checkpoint of any kind, laid out as `layout`."""
    with readable(Path(path), "jax", parallel) as source_path:
        source = open_checkpoint(source_path)
        model = source.model
        if layout is not None:
            model = replace(model, scan_layers=layout.scan_layers, fuse_kernels=layout.fuse_kernels)
        return model, fill(abstract_params(model, dtype, parallel), source.read)


def open_checkpoint(path: Path) -> Checkpoint:
    """Open an Orbax, interchange or Hugging Face one. Raises `InputError` if it is not whole."""
    if (kind := kind_of(path)) != "jax":
        opener = huggingface if kind == "hf" else interchange
        return opener.open_checkpoint(path)
    model, state = interchange.read_description(path)
    directory = path / "orbax"
    try:
        arrays = Arrays(directory)
    except Exception as error:
        raise InputError(f"{directory} has no readable metadata: {error}") from error
    places: dict[str, tuple[str, Part]] = {}
    tensors = {}
    for keys, entry in jax.tree_util.tree_leaves_with_path(arrays.tree):
        kind, *names = (str(getattr(key, "key", key)) for key in keys)
        for part in parts(tuple(names), tuple(entry.shape)):
            key = part.name if kind == "params" else f"{kind}.{part.name}"
            places[key] = (".".join([kind, *names]), part)
            tensors[key] = (np.dtype(entry.dtype), part.shape)
    tensors = interchange.check_tensors(path, model, tensors)
    checksums = interchange.read_checksums(path)

    def rows_of(key: str, rows: slice = EVERY) -> np.ndarray:
        name, part = places[key]
        block, those = part.block(rows)
        try:
            array = arrays.read(name, block)
        except Exception as error:
            raise InputError(
                f"{directory}: tensor {key} cannot be read; the checkpoint is truncated ({error})"
            ) from error
        return interchange.contiguous(part.rows(array)[those])

    read = interchange.checked(rows_of, tensors, checksums, lambda _: directory)
    companions = interchange.companions(path)
    return Checkpoint(path, "jax", model, state, tensors, read, checksums, companions)


def write_checkpoint(path: Path, source: Checkpoint) -> None:
    """Write a checkpoint of any kind as Orbax; `path` exists only when it is complete.

    A kernel is stored in Fortran order, `[in, out]` by columns: the bytes are the canonical
    tensor's, and nothing is transposed on the way.
    """
    checksums = interchange.Checksums()
    with new_directory(path, source.n_bytes) as directory:
        interchange.write_description(
            directory, source.model, source.trainer_state, source.companions
        )
        abstract = abstract_params(source.model, "float32")
        kinds = ["params", *(interchange.MOMENTS if source.has_optimizer else ())]
        tree = _stored(dict.fromkeys(kinds, abstract))
        writer, places = Writer(directory / "orbax", tree), {}
        for keys, like in jax.tree_util.tree_leaves_with_path(tree):
            kind, *names = (key.key for key in keys)
            (part,) = parts(tuple(names), like.shape)
            key = part.name if kind == "params" else f"{kind}.{part.name}"
            places[key] = ".".join([kind, *names]), part.kind == "kernel"
        for key, rows, array in interchange.stream(source.tensors, source.read, checksums):
            if rows.start == 0:
                (name, transposed), chunk = places[key], len(array)
                write = writer.create(name, *source.tensors[key], chunk, transposed)
            write(rows.start // chunk, array)
        interchange.write_checksums(directory, checksums)
        interchange.verify(open_checkpoint(directory))


def _stored(state: Any) -> Any:
    """The tree with string keys, as it comes back from a file."""
    if isinstance(state, dict):
        return {str(key): _stored(value) for key, value in state.items()}
    return state
