"""Parameters of the JAX model: shapes and shardings, initial values, loading."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import SingleDeviceSharding

from mooshak.checkpoints.base import FULL_SLICE
from mooshak.config.model import Dtype, ModelConfig
from mooshak.numerics.init_weights import initial_weight
from mooshak_jax.distributed.mesh import Parallel
from mooshak_jax.model import PARAM_DTYPE, Model
from mooshak_jax.param_names import Path_, canonical_tensors


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


def make_graphdef(model: ModelConfig, dtype: Dtype, remat: str = "none") -> nnx.GraphDef:
    """The model without its parameters; `join` puts both together."""
    return _split(model, dtype, remat)[0]


def _split(model: ModelConfig, dtype: Dtype, remat: str = "none") -> tuple[nnx.GraphDef, Any]:
    split = nnx.split(nnx.eval_shape(lambda: Model(model, dtype, remat)), nnx.Param, ...)
    return split[0], split[1]


def merge(graphdef: nnx.GraphDef, params: Any) -> Model:
    """The model from its graph and a tree of parameters."""
    return nnx.merge(graphdef, nnx.State(params))


def load_params(abstract: Any, read: Callable[[str], Any]) -> Any:
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
        for part in canonical_tensors(path, like.shape):
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
    """The parameters from the counter-based initialiser: every process makes its shards only."""
    kind = np.dtype(PARAM_DTYPE[dtype])
    return load_params(
        abstract_params(model, dtype, parallel),
        lambda name: _Initial(model, seed, name, kind, gain_std),
    )
