"""Checkpoints of the JAX side: Orbax, asynchronous, resharding; and the table of names.

`LEAVES` says how a parameter of the Flax model is called and laid out canonically, in both
directions; nothing else in the project knows.
"""

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from jax import Array

from mooshak import huggingface, interchange
from mooshak.checkpoints import kind_of, readable
from mooshak.config import Dtype, ModelConfig
from mooshak.errors import InputError
from mooshak.files import new_directory
from mooshak.initial import initial_weight
from mooshak.interchange import Checkpoint
from mooshak_jax.model import PARAMETERS, Model

logging.getLogger("absl").setLevel(logging.ERROR)

LEAVES = {
    "kernel": ("weight", True),
    "scale": ("weight", False),
    "embedding": ("weight", False),
    "bias": ("bias", False),
}
"""Last name of a Flax parameter -> its canonical last name, and whether it is its transpose."""

Path_ = tuple[Any, ...]


def canonical_name(path: Path_) -> str:
    """Canonical name of the Flax parameter at a path of keys, e.g. layers.0.mlp.w1.weight."""
    names = [str(getattr(key, "key", key)) for key in path]
    assert names[-1] in LEAVES, names
    return ".".join([*names[:-1], LEAVES[names[-1]][0]])


def to_canonical(path: Path_, array: Any) -> Any:
    """A Flax parameter in the canonical layout; its own inverse."""
    return array.T if LEAVES[str(getattr(path[-1], "key", path[-1]))][1] else array


def abstract_params(model: ModelConfig, dtype: Dtype) -> Any:
    """Shapes and dtypes of the parameters, as a tree of dicts, without allocating any."""
    return nnx.to_pure_dict(_split(model, dtype)[1])


def graph(model: ModelConfig, dtype: Dtype) -> nnx.GraphDef:
    """The model without its parameters; `join` puts both together."""
    return _split(model, dtype)[0]


def _split(model: ModelConfig, dtype: Dtype) -> tuple[nnx.GraphDef, Any]:
    split = nnx.split(nnx.eval_shape(lambda: Model(model, dtype)), nnx.Param, ...)
    return split[0], split[1]


def join(graphdef: nnx.GraphDef, params: Any) -> Model:
    """The model from its graph and a tree of parameters."""
    return nnx.merge(graphdef, nnx.State(params))


def fill(abstract: Any, read: Callable[[str], np.ndarray]) -> Any:
    """A tree like `abstract`, its arrays read by canonical name."""

    def leaf(path: Path_, like: jax.ShapeDtypeStruct) -> Array:
        value = to_canonical(path, read(canonical_name(path)))
        if value.shape != like.shape:
            raise InputError(f"{canonical_name(path)} has shape {value.shape}, not {like.shape}")
        return jax.device_put(np.ascontiguousarray(value).astype(like.dtype))

    return jax.tree.map_with_path(leaf, abstract)


def initialize(model: ModelConfig, dtype: Dtype, seed: int, gain_std: float = 0.0) -> Any:
    """The parameters from the counter-based initialiser."""
    kind = np.dtype(PARAMETERS[dtype])
    return fill(
        abstract_params(model, dtype),
        lambda name: initial_weight(model, seed, name, dtype=kind, gain_std=gain_std),
    )


def start_saving(state: dict[str, Any], path: Path) -> Callable[[], None]:
    """Take a snapshot and write it to `path` in the background; returns the function that waits."""
    checkpointer = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler())
    checkpointer.save(path.absolute() / "orbax", args=ocp.args.PyTreeSave(_stored(state)))

    def wait() -> None:
        checkpointer.wait_until_finished()
        checkpointer.close()

    return wait


def restore(dtype: Dtype, source: Checkpoint) -> dict[str, Any]:
    """`params`, `exp_avg` and `exp_avg_sq` of an open training checkpoint."""
    abstract = abstract_params(source.model, dtype)
    state = {"params": fill(abstract, source.read)}
    for moment in interchange.MOMENTS:
        state[moment] = fill(abstract, partial(_read_moment, source, moment))
    return state


def _read_moment(source: Checkpoint, moment: str, name: str) -> np.ndarray:
    return source.read(f"{moment}.{name}")


def load(path: str | Path, dtype: Dtype) -> tuple[ModelConfig, Any]:
    """The model's description and parameters of a checkpoint of any kind."""
    with readable(Path(path), "jax") as source_path:
        source = open_checkpoint(source_path)
        return source.model, fill(abstract_params(source.model, dtype), source.read)


def open_checkpoint(path: Path) -> Checkpoint:
    """Open an Orbax, interchange or Hugging Face one. Raises `InputError` if it is not whole."""
    if (kind := kind_of(path)) != "jax":
        opener = huggingface if kind == "hf" else interchange
        return opener.open_checkpoint(path)
    model, state = interchange.read_description(path)
    directory = path.absolute() / "orbax"
    handler = ocp.PyTreeCheckpointer()
    try:
        tree = handler.metadata(directory).item_metadata.tree
    except Exception as error:
        raise InputError(f"{directory} has no readable metadata: {error}") from error
    places: dict[str, Path_] = {}
    tensors = {}
    for keys, entry in jax.tree_util.tree_leaves_with_path(tree):
        part, *rest = (str(getattr(key, "key", key)) for key in keys)
        key = canonical_name(tuple(rest)) if rest else part
        key = key if part == "params" else f"{part}.{key}"
        places[key] = (part, *rest)
        shape = tuple(entry.shape)
        transposed = bool(rest) and rest[-1] in LEAVES and LEAVES[rest[-1]][1]
        tensors[key] = (np.dtype(entry.dtype), shape[::-1] if transposed else shape)
    tensors = interchange.check_tensors(path, model, tensors)

    def read(key: str, rows: slice = interchange.EVERY) -> np.ndarray:
        item: Any = jax.ShapeDtypeStruct((), tensors[key][0])
        for name in reversed(places[key]):
            item = {name: item}
        restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
        arguments = ocp.args.PyTreeRestore(
            item=item, restore_args=restore_args, partial_restore=True
        )
        try:
            leaf = jax.tree.leaves(handler.restore(directory, args=arguments))[0]
        except Exception as error:
            raise InputError(
                f"{path}: tensor {key} cannot be read; the checkpoint is truncated"
            ) from error
        return to_canonical(places[key], leaf)[rows]

    companions = interchange.companions(path)
    return Checkpoint(path, "jax", model, state, tensors, read, companions=companions)


def write_checkpoint(path: Path, source: Checkpoint) -> None:
    """Write a checkpoint of any kind as Orbax; `path` exists only when it is complete."""
    with new_directory(path, source.n_bytes) as directory:
        interchange.write_description(
            directory, source.model, source.trainer_state, source.companions
        )
        abstract = abstract_params(source.model, "float32")
        parts = ["params", *(interchange.MOMENTS if source.has_optimizer else ())]

        def part(prefix: str) -> Any:
            def leaf(path: Path_, _: Any) -> np.ndarray:
                value = source.read(prefix + canonical_name(path))
                return np.ascontiguousarray(to_canonical(path, value))

            return jax.tree.map_with_path(leaf, abstract)

        state = {name: part("" if name == "params" else f"{name}.") for name in parts}
        ocp.PyTreeCheckpointer().save(directory.absolute() / "orbax", _stored(state))


def _stored(state: Any) -> Any:
    """The tree with string keys, as it comes back from a file."""
    if isinstance(state, dict):
        return {str(key): _stored(value) for key, value in state.items()}
    return state
