"""Checkpoints in JAX: Orbax, asynchronous, resharding.

Mirror: mooshak_torch/checkpoint.py. mooshak_jax/param_names.py maps the leaves of the state to
canonical names.
"""

import logging
import os
import re
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from mooshak.checkpoints import base, hf, safetensors
from mooshak.checkpoints.base import FULL_SLICE, Checkpoint
from mooshak.checkpoints.checksums import (
    Checksums,
    read_ahead,
    read_checksums,
    verify_on_read,
    write_checksums,
)
from mooshak.checkpoints.formats import detect_format, ensure_readable_format
from mooshak.checkpoints.init_from import init_checkpoint
from mooshak.config.mesh_checks import check_tensor_axis
from mooshak.config.model import Dtype, ModelConfig
from mooshak.config.sections import Config
from mooshak.errors import InputError
from mooshak.files import atomic_directory
from mooshak.tokenizer.base import Tokenizer
from mooshak.tokenizer.files import files_of_checkpoint
from mooshak_jax.distributed.mesh import Parallel, check_fsdp
from mooshak_jax.param_names import CanonicalTensor, canonical_tensors
from mooshak_jax.params import abstract_params, load_params, split_trained
from mooshak_jax.zarr import ZarrReader, ZarrWriter

# Orbax logs the errors that it raises, with a traceback.
logging.getLogger("absl").setLevel(logging.CRITICAL)


def start_saving(state: dict[str, Any], path: Path) -> Callable[[], None]:
    """Take a snapshot and write it to `path` in the background; return the function that waits.

    `state` has the trees `params`, `exp_avg` and `exp_avg_sq`. The returned function raises
    `OSError` where this process could not write.
    """
    # Not compressed: weights have random bits, and zstd is slower than the disk. In small chunks: a
    # conversion reads a part of an array without the rest.
    checkpointer = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler(use_compression=False))
    chunks = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=base.CHUNK_BYTES), state)
    arguments = ocp.args.PyTreeSave(_stored(state), save_args=_stored(chunks))
    checkpointer.save(path.absolute() / "orbax", args=arguments)

    def wait() -> None:
        try:
            checkpointer.wait_until_finished()
        except ValueError as error:
            # TensorStore puts the operating system's error code at the end of a long message.
            code = re.search(r"os_error_code='(\d+)'", str(error))
            if code is None:
                raise
            raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error
        checkpointer.close()

    return wait


def restore(
    model: ModelConfig,
    dtype: Dtype,
    source: Checkpoint,
    parallel: Parallel | None = None,
    frozen: Set[str] = frozenset(),
) -> dict[str, Any]:
    """Load `params`, `exp_avg` and `exp_avg_sq` of an open training checkpoint.

    Stacked layers and fused kernels are as in `model`, shardings as in `parallel`. Parameters in
    `frozen` have no moments.
    """
    abstract = abstract_params(model, dtype, parallel)
    state = {"params": load_params(abstract, source.read)}
    trained, _ = split_trained(abstract, frozen)
    for moment in base.MOMENTS:
        state[moment] = load_params(trained, partial(_read_moment, source, moment))
    return state


def _read_moment(source: Checkpoint, moment: str, name: str) -> np.ndarray:
    return source.read(f"{moment}.{name}")


def load_init_weights(config: Config, tokenizer: Tokenizer, parallel: Parallel) -> Any:
    """Load the weights of `init.from` as parameters; rows of new tokens are initialized."""
    with open_init_weights(config, tokenizer, parallel) as source:
        return load_params(abstract_params(config.model, config.train.dtype, parallel), source.read)


@contextmanager
def open_init_weights(
    config: Config, tokenizer: Tokenizer, parallel: Parallel | None = None
) -> Iterator[Checkpoint]:
    """Open the weights of `init.from`, with rows for new tokens, inside the block."""
    with ensure_readable_format(Path(config.init.from_), "jax", parallel) as source_path:
        found = base.check_range(open_checkpoint(source_path), config.train.dtype)
        yield init_checkpoint(config, found, tokenizer)


def load_model(
    path: str | Path,
    dtype: Dtype,
    parallel: Parallel | None = None,
    layout: ModelConfig | None = None,
) -> tuple[ModelConfig, Any]:
    """Load the model configuration and parameters of a checkpoint of any format.

    Stacked layers and fused kernels are as in `layout`, shardings as in `parallel`. Raises
    `InputError` if the mesh does not divide the model.
    """
    with ensure_readable_format(Path(path), "jax", parallel) as source_path:
        source = base.check_range(open_checkpoint(source_path), dtype)
        model = source.model
        if layout is not None:
            model = replace(model, scan_layers=layout.scan_layers, fuse_kernels=layout.fuse_kernels)
        if parallel is not None:
            check_tensor_axis(model, parallel.sizes)
            check_fsdp(model, parallel.sizes)
        return model, load_params(abstract_params(model, dtype, parallel), source.read)


def open_checkpoint(path: Path) -> Checkpoint:
    """Open an Orbax, safetensors or Hugging Face checkpoint for reading.

    Raises `InputError` if it is incomplete.
    """
    if (format := detect_format(path)) != "jax":
        return (hf if format == "hf" else safetensors).open_checkpoint(path)
    model, state = base.read_description(path)
    directory = path / "orbax"
    try:
        arrays = ZarrReader(directory)
    except Exception as error:
        raise InputError(f"{directory} has no readable metadata: {error}") from error
    entries: dict[str, tuple[str, CanonicalTensor]] = {}
    tensors = {}
    for keys, entry in jax.tree_util.tree_leaves_with_path(arrays.tree):
        group, *names = (str(getattr(key, "key", key)) for key in keys)
        for canonical in canonical_tensors(tuple(names), tuple(entry.shape)):
            key = canonical.name if group == "params" else f"{group}.{canonical.name}"
            entries[key] = (".".join([group, *names]), canonical)
            tensors[key] = (np.dtype(entry.dtype), canonical.shape)
    tensors = base.check_tensors(path, model, tensors, trainer_state=state)
    checksums = read_checksums(path)

    def read_rows(key: str, rows: slice = FULL_SLICE) -> np.ndarray:
        name, canonical = entries[key]
        block, rows_in_block = canonical.block(rows)
        try:
            array = arrays.read(name, block)
        except Exception as error:
            raise InputError(
                f"{directory}: tensor {key} cannot be read; the checkpoint is truncated ({error})"
            ) from error
        return base.contiguous(canonical.rows(array)[rows_in_block])

    read = verify_on_read(read_rows, tensors, checksums, lambda _: directory)
    files = files_of_checkpoint(path)
    return Checkpoint(path, "jax", model, state, tensors, read, checksums, files)


def write_checkpoint(path: Path, source: Checkpoint) -> None:
    """Write a checkpoint of any format as Orbax; `path` exists only once it is complete.

    Kernels [in, out] are stored in Fortran order: the bytes are those of the canonical tensor
    [out, in], and nothing is transposed.
    """
    checksums = Checksums()
    with atomic_directory(path, source.n_bytes) as directory:
        base.write_description(
            directory, source.model, source.trainer_state, source.tokenizer_files
        )
        abstract = abstract_params(source.model, "float32")
        frozen = {
            name for name in source.tensors if f"{base.MOMENTS[0]}.{name}" not in source.tensors
        }
        moments, _ = split_trained(abstract, frozen)
        groups = dict.fromkeys(base.MOMENTS, moments) if source.has_optimizer else {}
        tree = _stored({"params": abstract, **groups})
        writer, entries = ZarrWriter(directory / "orbax", tree), {}
        for keys, like in jax.tree_util.tree_leaves_with_path(tree):
            group, *names = (key.key for key in keys)
            (canonical,) = canonical_tensors(tuple(names), like.shape)
            key = canonical.name if group == "params" else f"{group}.{canonical.name}"
            entries[key] = ".".join([group, *names]), canonical.kind == "kernel"
        for key, rows, array in read_ahead(source.tensors, source.read, checksums):
            if rows.start == 0:
                (name, transposed), chunk = entries[key], len(array)
                write = writer.create(name, *source.tensors[key], chunk, transposed)
            write(rows.start // chunk, array)
        write_checksums(directory, checksums)
        base.verify(open_checkpoint(directory))


def _stored(state: Any) -> Any:
    """Return the tree with string keys, as Orbax stores it."""
    if isinstance(state, dict):
        return {str(key): _stored(value) for key, value in state.items()}
    return state
