"""Parameters of the JAX model: shapes and shardings, initial values, loading.

Mirror: mooshak_torch/params.py.
"""

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import SingleDeviceSharding

from mooshak.checkpoints.base import FULL_SLICE, Checkpoint
from mooshak.config.model import Dtype, ModelConfig
from mooshak.errors import InputError
from mooshak.numerics.init_weights import initial_weight
from mooshak_jax.distributed.mesh import Parallel
from mooshak_jax.model import PARAM_DTYPE, Model
from mooshak_jax.param_names import KeyPath, canonical_tensors


def abstract_params(model: ModelConfig, dtype: Dtype, parallel: Parallel | None = None) -> Any:
    """Return shapes, dtypes and shardings of the parameters as a tree of dicts, without arrays.

    Without `parallel` they are not sharded.
    """
    layers = ("layers",) if model.scan_layers else ()

    def leaf(path: KeyPath, variable: nnx.Variable) -> jax.ShapeDtypeStruct:
        axes = variable.get_metadata()["axes"]
        axes = (*layers, *axes) if str(getattr(path[0], "key", path[0])) == "layers" else axes
        sharding = parallel and parallel.sharding(*axes)
        return jax.ShapeDtypeStruct(variable.shape, variable.dtype, sharding=sharding)

    state = _split(model, dtype)[1]
    leaves = jax.tree.map_with_path(leaf, state, is_leaf=lambda x: isinstance(x, nnx.Variable))
    return nnx.to_pure_dict(leaves)


class _HashedGraphDef(nnx.GraphDef):
    """A graph definition that keeps its hash.

    Every call of a compiled function asks for it, and Flax walks through the model: 0.2 ms.
    """

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return super().__hash__()


def make_graphdef(model: ModelConfig, dtype: Dtype, remat: str = "none") -> nnx.GraphDef:
    """Return the model without its parameters, for `merge`."""
    graphdef = _split(model, dtype, remat)[0]
    return _HashedGraphDef(graphdef.nodes, graphdef.attributes, graphdef.num_leaves)


def _split(model: ModelConfig, dtype: Dtype, remat: str = "none") -> tuple[nnx.GraphDef, Any]:
    split = nnx.split(nnx.eval_shape(lambda: Model(model, dtype, remat)), nnx.Param, ...)
    return split[0], split[1]


def merge(graphdef: nnx.GraphDef, params: Any) -> Model:
    """Return the model of a graph definition and a tree of parameters."""
    return nnx.merge(graphdef, nnx.State(params))


def split_trained(params: Any, frozen: Set[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split a tree of dicts into its trained leaves and those whose canonical names are `frozen`.

    Raises `InputError` for a leaf, of stacked layers, that is only partly frozen.
    """
    trained, rest = dict[str, Any](), dict[str, Any]()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        names = [tensor.name for tensor in canonical_tensors(path, leaf.shape)]
        is_frozen = {name in frozen for name in names}
        if len(is_frozen) > 1:
            raise InputError(f"{names[0]} is frozen, and is stored with others that are not")
        tree = rest if is_frozen.pop() else trained
        *above, last = (key.key for key in path)
        for key in above:
            tree = tree.setdefault(key, {})
        tree[last] = leaf
    return trained, rest


def join(trained: Any, frozen: Any) -> Any:
    """Return the tree of which `split_trained` returned the parts."""
    if not (isinstance(trained, dict) and isinstance(frozen, dict)):
        return trained
    shared = {key: join(trained[key], frozen[key]) for key in trained.keys() & frozen.keys()}
    return frozen | trained | shared


def without_adapters(params: Any) -> Any:
    """Return the tree of dicts without adapters: the parameters of the base."""
    names = ("lora_a", "lora_b", "dora_magnitude", "token_rows")
    if not isinstance(params, dict):
        return params
    return {key: without_adapters(one) for key, one in params.items() if key not in names}


def load_params(abstract: Any, read: Callable[[str], Any]) -> Any:
    """Return arrays with the shapes and shardings of the tree `abstract`.

    `read(name)[rows, columns]` returns a block of a canonical tensor; each process reads only the
    shards of its own devices.
    """

    def leaf(path: KeyPath, like: Any) -> Array:
        sharding = like.sharding or SingleDeviceSharding(jax.devices()[0])
        indices: Mapping[Any, Any] = sharding.addressable_devices_indices_map(like.shape)
        places = {
            device: tuple(range(size)[axis] for axis, size in zip(index, like.shape, strict=True))
            for device, index in indices.items()
        }
        # Devices with the same region of the leaf receive the same array.
        shards = {place: np.empty([*map(len, place)], like.dtype) for place in places.values()}
        for canonical in canonical_tensors(path, like.shape):
            tensor = read(canonical.name)
            for place, shard in shards.items():
                canonical.copy(tensor, shard, place)
        arrays = [jax.device_put(shards[place], device) for device, place in places.items()]
        return jax.make_array_from_single_device_arrays(like.shape, sharding, arrays)

    return jax.tree.map_with_path(leaf, abstract)


@dataclass(frozen=True)
class _Initial:
    """Initial value of a parameter; indexing computes a block of it."""

    model: ModelConfig
    seed: int
    name: str
    dtype: np.dtype
    gain_std: float

    def __getitem__(self, block: tuple[slice, ...]) -> np.ndarray:
        rows, columns = (*block, FULL_SLICE)[:2]
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
    """Return the parameters from the counter-based initializer.

    Each process computes only its own shards, bit-identical to the same rows of the full tensor.
    """
    numpy_dtype = np.dtype(PARAM_DTYPE[dtype])
    return load_params(
        abstract_params(model, dtype, parallel),
        lambda name: _Initial(model, seed, name, numpy_dtype, gain_std),
    )


def gather_weights(params: Any, model: ModelConfig) -> Checkpoint:
    """Return the weights under their canonical names, copied to the host of every process."""
    leaves, several = {}, jax.process_count() > 1
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        full = multihost_utils.process_allgather(leaf, tiled=True) if several else leaf
        array = np.asarray(full)
        for tensor in canonical_tensors(path, leaf.shape):
            leaves[tensor.name] = tensor, array
    tensors = {name: (leaf.dtype, tensor.shape) for name, (tensor, leaf) in leaves.items()}

    def read(key: str, rows: slice = FULL_SLICE) -> np.ndarray:
        tensor, leaf = leaves[key]
        return tensor.canonical(leaf)[rows]

    return Checkpoint(Path("(memory)"), "jax", model, None, tensors, read)
