"""Checkpoints of the torch side: DCP (torch.distributed.checkpoint), asynchronous, resharding.

The state has the canonical names: `params.{name}`, `exp_avg.{name}`, `exp_avg_sq.{name}`.
"""

import logging
import operator
import os
import pickle
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from numpy.lib.stride_tricks import as_strided
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from mooshak import huggingface, interchange
from mooshak.checkpoints import Processes, kind_of, readable
from mooshak.config import Config, Dtype
from mooshak.errors import InputError
from mooshak.extension import initial
from mooshak.files import Direct, new_directory
from mooshak.interchange import Checkpoint
from mooshak.tokenizer import Tokenizer
from mooshak_torch.model import Model, local_part
from mooshak_torch.optimizer import moments, set_step
from mooshak_torch.zero import ZeroOptimizer

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

METADATA_NAMES = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", *(str(dtype).removeprefix("torch.") for dtype in DTYPES)},
    "pathlib": {"PosixPath", "PurePosixPath"},
    "collections": {"OrderedDict"},
}
"""Module -> what `.metadata` may name from it."""

# DCP warns that there is no process group; one process needs none. It warns in the thread that it
# saves in, which `catch_warnings` around the call would miss.
warnings.filterwarnings(
    "ignore",
    message="torch.distributed is disabled, unavailable or uninitialized",
    category=UserWarning,
    module=r"torch\.distributed\.checkpoint\.",
)
logging.getLogger("torch.distributed.checkpoint").setLevel(logging.ERROR)


def start_saving(
    model: Model,
    optimizer: torch.optim.Optimizer | ZeroOptimizer,
    path: Path,
    group: dist.ProcessGroup | None = None,
) -> Callable[[], None]:
    """Take a snapshot and write it to `path` in the background; returns the function that waits.

    `group` is a process group of the saves' own: in the background they must not meet the
    collectives of the training.
    """
    state: dict[str, Any]
    if isinstance(optimizer, ZeroOptimizer):
        state = optimizer.state()
    else:
        state = {"params": dict(model.named_parameters()), **moments(model, optimizer)}
    future: Any = dcp.async_save(state, checkpoint_id=path / "dcp", process_group=group)
    return future.result


def restore(model: Model, optimizer: torch.optim.Optimizer, source: Checkpoint) -> None:
    """Fill the model and the optimizer from an open training checkpoint."""
    state: dict[str, Tensor] = dict(model.named_parameters())
    for moment, tensors in moments(model, optimizer).items():
        state |= {f"{moment}.{name}": tensor for name, tensor in tensors.items()}
    fill(state, source)
    assert source.trainer_state is not None
    set_step(optimizer, source.trainer_state["step"])


def begin(
    model: Model, config: Config, tokenizer: Tokenizer, processes: Processes | None = None
) -> None:
    """Fill the model with the weights of `init.from`, and rows for the pieces that it lacks."""
    with readable(Path(config.init.from_), "torch", processes) as source_path:
        source = initial(config, open_checkpoint(source_path), tokenizer)
        fill(dict(model.named_parameters()), source)


def load(path: str | Path, dtype: Dtype) -> Model:
    """The model of a checkpoint of any kind, without the optimizer."""
    with readable(Path(path), "torch") as source_path:
        source = open_checkpoint(source_path)
        model = Model(source.model, dtype)
        fill(dict(model.named_parameters()), source)
    return model


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a DCP, interchange or Hugging Face one. Raises `InputError` if it is not whole."""
    if (kind := kind_of(path)) == "safetensors":
        return interchange.open_checkpoint(path)
    if kind == "hf":
        pickled = None if huggingface.has_safetensors(path) else _pickled(path)
        return huggingface.open_checkpoint(path, pickled)
    model, state = interchange.read_description(path)
    directory = path / "dcp"
    reader = Reader(directory)
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
        key: (_numpy_dtype(entry.properties.dtype), tuple(entry.size))
        for key, (_, entry) in entries.items()
    }
    tensors = interchange.check_tensors(path, model, tensors)
    checksums = interchange.read_checksums(path)

    def rows_of(key: str, rows: slice = interchange.EVERY) -> np.ndarray:
        name, entry = entries[key]
        start, stop, _ = rows.indices(entry.size[0])
        try:
            return reader.read_rows(name, entry, start, stop)
        except Exception as error:
            raise InputError(
                f"{directory}: tensor {key} cannot be read; the checkpoint is truncated ({error})"
            ) from error

    companions = interchange.companions(path)
    read = interchange.checked(rows_of, tensors, checksums, lambda _: directory)
    return Checkpoint(path, "torch", model, state, tensors, read, checksums, companions)


def _pickled(path: Path) -> huggingface.Stored:
    """The tensors of `pytorch_model.bin`, or of the shards that its index lists.

    Torch makes nothing but tensors of them (`weights_only`), and maps them from the file.
    """
    tensors: dict[str, Tensor] = {}
    for file in huggingface.pickle_files(path):
        try:
            # Before torch 1.6 it was no ZIP file, and those are not mapped.
            mmap = zipfile.is_zipfile(file)
            found = torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
        except (pickle.UnpicklingError, RuntimeError, OSError, EOFError) as error:
            reason = str(error).split(". ")[0]
            raise InputError(
                f"{file} does not hold tensors alone, or is cut short: {reason}"
            ) from error
        if not isinstance(found, dict):
            raise InputError(f"{file} holds no tensors by name")
        for key, tensor in found.items():
            if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
                what = getattr(tensor, "dtype", type(tensor).__name__)
                raise InputError(f"{file}: {key} is no tensor of floating-point numbers ({what})")
        tensors |= found
    described = {key: (_numpy_dtype(t.dtype), tuple(t.shape)) for key, t in tensors.items()}

    def read(key: str, rows: slice = interchange.EVERY) -> np.ndarray:
        return _to_numpy(tensors[key][rows])

    return huggingface.Stored(described, read, {})


class Reader(dcp.FileSystemReader):
    """DCP's reader, which makes nothing but descriptions of tensors from `.metadata`.

    DCP unpickles that file, and a pickle may call anything; a checkpoint is a stranger's file.
    """

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """What the checkpoint holds. Raises `pickle.UnpicklingError` if it names anything else."""
        with self.fs.create_stream(self._get_metadata_path(kwargs.get("rank")), "rb") as file:
            metadata: Metadata = _Unpickler(file).load()
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        self.storage_data = metadata.storage_data
        return metadata

    def read_rows(
        self, name: str, entry: TensorStorageMetadata, start: int, stop: int
    ) -> np.ndarray:
        """Rows of a tensor, out of the chunks that the processes have written of it."""
        rows = np.empty((stop - start, *entry.size[1:]), _numpy_dtype(entry.properties.dtype))
        missing = rows.size
        for chunk in entry.chunks:
            top, *left = chunk.offsets
            first, last = max(start, top), min(stop, top + chunk.sizes[0])
            if first < last:
                part = self._rows(name, chunk, slice(first - top, last - top))
                if part.shape == rows.shape:
                    return part
                columns = map(slice, left, map(operator.add, left, chunk.sizes[1:]))
                rows[slice(first - start, last - start), *columns] = part
                missing -= part.size
        if missing:
            raise ValueError(f"{missing} elements are in no chunk")
        return rows

    def _rows(self, name: str, chunk: ChunkStorageMetadata, rows: slice) -> np.ndarray:
        info = self.storage_data[MetadataIndex(name, chunk.offsets)]
        if getattr(info, "transform_descriptors", None):
            raise ValueError("it is compressed by an extension of DCP")
        file = Path(self.path) / info.relative_path
        with file.open("rb") as stream:
            # The elements themselves are read elsewhere.
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            # On the meta device nothing is read but where the elements stand, and how.
            tensor = torch.load(self._slice_file(stream, info), "meta", weights_only=True)
        storage, dtype = tensor.untyped_storage(), _numpy_dtype(tensor.dtype)
        start = info.offset + storage._checkpoint_offset
        if tensor.is_contiguous():
            start += tensor.storage_offset() * dtype.itemsize
            return interchange.stored_rows(file, start, dtype, tuple(tensor.shape), rows)
        elements = interchange.stored_rows(file, start, dtype, (len(storage) // dtype.itemsize,))
        strides = [stride * dtype.itemsize for stride in tensor.stride()]
        return as_strided(elements[tensor.storage_offset() :], tuple(tensor.shape), strides)[rows]


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        # Python 3.13 keeps its paths in a module of their own.
        module = {"pathlib._local": "pathlib"}.get(module, module)
        if name not in METADATA_NAMES.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name} does not belong into a checkpoint")
        return super().find_class(module, name)


def write_checkpoint(path: Path, source: Checkpoint) -> None:
    """Write a checkpoint of any kind as DCP; `path` exists only when it is complete."""
    with new_directory(path, source.n_bytes) as directory:
        interchange.write_description(
            directory, source.model, source.trainer_state, source.companions
        )
        planner, writer = _SavePlanner(source), _Writer(directory / "dcp", sync_files=False)
        sums = torch.serialization.get_crc32_options()
        torch.serialization.set_crc32_options(False)  # Slower than the disk, and never looked at.
        try:
            dcp.save({}, storage_writer=writer, planner=planner, no_dist=True)
        except CheckpointException as error:
            raise error.failures[0][0] from error
        finally:
            torch.serialization.set_crc32_options(sums)
        interchange.write_checksums(directory, planner.checksums)
        interchange.verify(open_checkpoint(directory))


class _Writer(dcp.FileSystemWriter):
    """DCP's writer in the order of the plan; its own keeps some of every tensor in memory."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results, name = [], f"__0_0{DEFAULT_SUFFIX}"
        with Direct(Path(self.path) / name) as file:
            for item in plan.items:
                start = file.tell()
                try:
                    torch.save(planner.resolve_data(item), file)
                except RuntimeError:
                    # Torch says no more than that the file ends elsewhere; a full disk says so.
                    file.write(bytes(interchange.BLOCK))
                    raise
                length = file.tell() - start
                place = _StorageInfo(name, start, length)
                results.append(WriteResult(item.index, length, place))
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done


class _SavePlanner(SavePlanner):
    """Writes a checkpoint of any kind some rows at a time, which are read when their turn comes."""

    def __init__(self, source: Checkpoint):
        self.source, self.checksums = source, interchange.Checksums()
        self.blocks = interchange.stream(source.tensors, source.read, self.checksums)
        self.keys = {
            key if key.startswith(interchange.MOMENTS) else f"params.{key}": key
            for key in source.tensors
        }

    def set_up_planner(
        self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False
    ) -> None:
        pass

    def create_local_plan(self) -> SavePlan:
        return SavePlan([item for name in self.keys for item in self._items(name)])

    def _items(self, name: str) -> Iterator[WriteItem]:
        dtype, shape = tensor = self.source.tensors[self.keys[name]]
        properties = TensorProperties(_to_torch(np.empty(0, dtype)).dtype)
        for rows in interchange.blocks(tensor):
            offsets = torch.Size([rows.start, *(0 for _ in shape[1:])])
            chunk = ChunkStorageMetadata(offsets, torch.Size([rows.stop - rows.start, *shape[1:]]))
            data = TensorWriteData(chunk, properties, torch.Size(shape))
            yield WriteItem(MetadataIndex(name, offsets), WriteItemType.SHARD, tensor_data=data)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        plans, metadata = create_default_global_save_plan(all_plans)
        # As in a state that the trainer saves: the names of parameters are keys below `params`.
        nested = {name: tuple(name.split(".", 1)) for name in self.keys}
        return plans, replace(metadata, planner_data=nested)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        key, rows, array = next(self.blocks)
        assert key == self.keys[write_item.index.fqn]
        assert write_item.index.offset is not None and rows.start == write_item.index.offset[0]
        return _to_torch(array)


def fill(state: dict[str, Tensor], source: Checkpoint) -> None:
    """Copy the checkpoint's tensors into those of `state`, which has the same keys.

    A process reads the rows of its own part of each, one tensor at a time.
    """
    with torch.no_grad():
        for key, tensor in state.items():
            if key not in source.tensors or source.tensors[key][1] != tuple(tensor.shape):
                raise InputError(f"{source.path}: tensor {key} is not the model's")
            part, where = local_part(tensor)
            rows, columns = where[0], where[1:]
            part.copy_(_to_torch(source.read(key, rows)[slice(None), *columns]))


def _numpy_dtype(dtype: torch.dtype) -> np.dtype:
    return _to_numpy(torch.empty(0, dtype=dtype)).dtype


def _to_numpy(tensor: Tensor) -> np.ndarray:
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view(interchange.DTYPES["BF16"])
    return tensor.numpy()


def _to_torch(array: np.ndarray) -> Tensor:
    array = np.ascontiguousarray(array)
    if array.dtype == interchange.DTYPES["BF16"]:
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)
