"""Checkpoints in PyTorch: DCP (torch.distributed.checkpoint), asynchronous, resharding.

Mirror: mooshak_jax/checkpoint.py. The state has the canonical names: `params.{name}`,
`exp_avg.{name}`, `exp_avg_sq.{name}`.
"""

import pickle
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import _FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from mooshak.checkpoints import base, hf, safetensors
from mooshak.checkpoints.base import Checkpoint
from mooshak.checkpoints.checksums import read_checksums, verify_on_read, write_checksums
from mooshak.checkpoints.formats import Processes, detect_format, ensure_readable_format
from mooshak.checkpoints.init_from import init_checkpoint
from mooshak.config.model import Dtype
from mooshak.config.sections import Config
from mooshak.errors import InputError, PeerError
from mooshak.files import atomic_directory
from mooshak.tokenizer.base import Tokenizer
from mooshak.tokenizer.files import files_of_checkpoint
from mooshak_torch.dcp import ChunkedSavePlanner, DCPReader, DCPWriter
from mooshak_torch.model import Model
from mooshak_torch.optimizer import Optimizer
from mooshak_torch.params import load_params, numpy_dtype, to_numpy


def start_saving(
    state: dict[str, dict[str, Tensor]], path: Path, group: dist.ProcessGroup | None = None
) -> Callable[[], None]:
    """Take a snapshot and write it to `path` in the background; return the function that waits.

    `state` is that of `Optimizer.state`. `group` is a process group for saves only: collectives
    in the background must not mix with those of training. The returned function raises `OSError`
    where this process could not write, `PeerError` where another could not.
    """
    future: Any = dcp.async_save(
        state, storage_writer=_ShardWriter(path / "dcp"), process_group=group
    )

    def wait() -> None:
        try:
            future.result()
        except CheckpointException as error:
            rank = dist.get_rank() if group is not None else 0
            if rank in error.failures:
                raise error.failures[rank][0] from error
            raise PeerError(f"the checkpoint could not be written: {error}") from error

    return wait


class _ShardWriter(_FileSystemWriter):
    """DCP's writer that raises the operating system's error, which torch.save hides."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        try:
            return super().write_data(plan, planner)
        except (OSError, RuntimeError) as error:
            cause = error if isinstance(error, OSError) else error.__context__
            if not isinstance(cause, OSError):
                raise
            raise OSError(cause.errno, cause.strerror, str(self.path)) from error


def restore(optimizer: Optimizer, source: Checkpoint) -> None:
    """Load the model and the optimizer from an open training checkpoint, in place."""
    tensors = optimizer.state()
    state = tensors.pop("params")
    for moment, by_name in tensors.items():
        state |= {f"{moment}.{name}": tensor for name, tensor in by_name.items()}
    load_params(state, source)
    assert source.trainer_state is not None
    optimizer.set_step(source.trainer_state["step"])


def load_init_weights(
    model: Model, config: Config, tokenizer: Tokenizer, parallel: Processes | None = None
) -> None:
    """Load the weights of `init.from` into the model; rows of new tokens are initialized."""
    with open_init_weights(config, tokenizer, parallel) as source:
        load_params(dict(model.named_parameters()), source)


@contextmanager
def open_init_weights(
    config: Config, tokenizer: Tokenizer, parallel: Processes | None = None
) -> Iterator[Checkpoint]:
    """Open the weights of `init.from`, with rows for new tokens, inside the block."""
    with ensure_readable_format(Path(config.init.from_), "torch", parallel) as source_path:
        found = base.check_range(open_checkpoint(source_path), config.train.dtype)
        yield init_checkpoint(config, found, tokenizer)


def load_model(path: str | Path, dtype: Dtype) -> Model:
    """Return the model of a checkpoint of any format, without the optimizer."""
    with ensure_readable_format(Path(path), "torch") as source_path:
        source = base.check_range(open_checkpoint(source_path), dtype)
        model = Model(source.model, dtype)
        load_params(dict(model.named_parameters()), source)
    return model


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a DCP, safetensors or Hugging Face checkpoint for reading.

    Raises `InputError` if it is incomplete.
    """
    if (format := detect_format(path)) == "safetensors":
        return safetensors.open_checkpoint(path)
    if format == "hf":
        pickled = None if hf.has_safetensors(path) else _open_pickled(path)
        return hf.open_checkpoint(path, pickled)
    model, state = base.read_description(path)
    directory = path / "dcp"
    reader = DCPReader(directory)
    try:
        metadata = reader.read_metadata().state_dict_metadata
    except Exception as error:
        raise InputError(f"{directory} has no readable .metadata: {error}") from error
    entries = {
        key.removeprefix("params."): (key, entry)
        for key, entry in metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    tensors = {
        key: (numpy_dtype(entry.properties.dtype), tuple(entry.size))
        for key, (_, entry) in entries.items()
    }
    tensors = base.check_tensors(path, model, tensors, trainer_state=state)
    checksums = read_checksums(path)

    def read_rows(key: str, rows: slice = base.FULL_SLICE) -> np.ndarray:
        name, entry = entries[key]
        start, stop, _ = rows.indices(entry.size[0])
        try:
            return reader.read_rows(name, entry, start, stop)
        except Exception as error:
            raise InputError(
                f"{directory}: tensor {key} cannot be read; the checkpoint is truncated ({error})"
            ) from error

    files = files_of_checkpoint(path)
    read = verify_on_read(read_rows, tensors, checksums, lambda _: directory)
    return Checkpoint(path, "torch", model, state, tensors, read, checksums, files)


def _open_pickled(path: Path) -> hf.HFTensors:
    """Open the tensors of `pytorch_model.bin`, or of the shards that its index lists.

    Only tensors are unpickled (`weights_only`), memory-mapped where possible.
    """
    tensors: dict[str, Tensor] = {}
    for file in hf.pickle_files(path):
        try:
            # Files written before torch 1.6 are not ZIP archives and cannot be mapped.
            mmap = zipfile.is_zipfile(file)
            found = torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
        except (pickle.UnpicklingError, RuntimeError, OSError, EOFError) as error:
            reason = str(error).split(". ")[0]
            raise InputError(
                f"{file} is truncated, or has other objects than tensors: {reason}"
            ) from error
        if not isinstance(found, dict):
            raise InputError(f"{file} is not a dictionary of tensors")
        for key, tensor in found.items():
            if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
                found_type = getattr(tensor, "dtype", type(tensor).__name__)
                raise InputError(f"{file}: {key} is not a floating-point tensor ({found_type})")
        tensors |= found
    described = {key: (numpy_dtype(t.dtype), tuple(t.shape)) for key, t in tensors.items()}

    def read(key: str, rows: slice = base.FULL_SLICE) -> np.ndarray:
        return to_numpy(tensors[key][rows])

    return hf.HFTensors(described, read, {})


def write_checkpoint(path: Path, source: Checkpoint) -> None:
    """Write a checkpoint of any format as DCP; `path` exists only once it is complete."""
    with atomic_directory(path, source.n_bytes) as directory:
        base.write_description(
            directory, source.model, source.trainer_state, source.tokenizer_files
        )
        planner, writer = ChunkedSavePlanner(source), DCPWriter(directory / "dcp", sync_files=False)
        crc32 = torch.serialization.get_crc32_options()
        torch.serialization.set_crc32_options(False)  # Slower than the disk, and never verified.
        try:
            dcp.save({}, storage_writer=writer, planner=planner, no_dist=True)
        except CheckpointException as error:
            raise error.failures[0][0] from error
        finally:
            torch.serialization.set_crc32_options(crc32)
        write_checksums(directory, planner.checksums)
        base.verify(open_checkpoint(directory))
