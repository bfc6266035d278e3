"""Read and write DCP (torch.distributed.checkpoint) files without unpickling foreign objects."""

import logging
import operator
import os
import pickle
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from numpy.lib.stride_tricks import as_strided
from torch import Tensor
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

from mooshak.checkpoints import base
from mooshak.checkpoints.base import Checkpoint
from mooshak.checkpoints.checksums import Checksums, read_ahead
from mooshak.files import DirectIOFile
from mooshak_torch.params import numpy_dtype, to_torch

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
"""Module -> the names that `.metadata` may refer to."""

# DCP warns about the missing process group, which a single process does not need. It warns in the
# thread that saves, where `catch_warnings` around the call has no effect.
warnings.filterwarnings(
    "ignore",
    message="torch.distributed is disabled, unavailable or uninitialized",
    category=UserWarning,
    module=r"torch\.distributed\.checkpoint\.",
)
logging.getLogger("torch.distributed.checkpoint").setLevel(logging.ERROR)


class DCPReader(dcp.FileSystemReader):
    """DCP's reader with a restricted unpickler for `.metadata`.

    DCP unpickles that file, and a pickle may call any function; a checkpoint may be untrusted.
    """

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the checkpoint's description.

        Raises `pickle.UnpicklingError` if `.metadata` refers to anything outside METADATA_NAMES.
        """
        with self.fs.create_stream(self._get_metadata_path(kwargs.get("rank")), "rb") as file:
            metadata: Metadata = _Unpickler(file).load()
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        self.storage_data = metadata.storage_data
        return metadata

    def read_rows(
        self, name: str, entry: TensorStorageMetadata, start: int, stop: int
    ) -> np.ndarray:
        """Return rows of a tensor, assembled from the chunks that the processes wrote.

        Raises `ValueError` if chunks are missing.
        """
        rows = np.empty((stop - start, *entry.size[1:]), numpy_dtype(entry.properties.dtype))
        missing = rows.size
        for chunk in entry.chunks:
            top, *left = chunk.offsets
            first, last = max(start, top), min(stop, top + chunk.sizes[0])
            if first < last:
                block = self._read_chunk(name, chunk, slice(first - top, last - top))
                if block.shape == rows.shape:
                    return block
                columns = map(slice, left, map(operator.add, left, chunk.sizes[1:]))
                rows[slice(first - start, last - start), *columns] = block
                missing -= block.size
        if missing:
            raise ValueError(f"{missing} elements are in no chunk")
        return rows

    def _read_chunk(self, name: str, chunk: ChunkStorageMetadata, rows: slice) -> np.ndarray:
        info = self.storage_data[MetadataIndex(name, chunk.offsets)]
        if getattr(info, "transform_descriptors", None):
            raise ValueError("it is compressed by an extension of DCP")
        file = Path(self.path) / info.relative_path
        with file.open("rb") as stream:
            # No read-ahead: this stream reads only the header, `stored_rows` the elements.
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            # On the meta device torch reads only the layout and offset of the elements.
            tensor = torch.load(self._slice_file(stream, info), "meta", weights_only=True)
        storage, dtype = tensor.untyped_storage(), numpy_dtype(tensor.dtype)
        start = info.offset + storage._checkpoint_offset
        if tensor.is_contiguous():
            start += tensor.storage_offset() * dtype.itemsize
            return base.stored_rows(file, start, dtype, tuple(tensor.shape), rows)
        elements = base.stored_rows(file, start, dtype, (len(storage) // dtype.itemsize,))
        strides = [stride * dtype.itemsize for stride in tensor.stride()]
        return as_strided(elements[tensor.storage_offset() :], tuple(tensor.shape), strides)[rows]


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        # Python 3.13 defines paths in `pathlib._local`.
        module = {"pathlib._local": "pathlib"}.get(module, module)
        if name not in METADATA_NAMES.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed in a checkpoint")
        return super().find_class(module, name)


class DCPWriter(dcp.FileSystemWriter):
    """DCP's writer in the order of the plan; DCP's own holds a part of every tensor in memory."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results, name = [], f"__0_0{DEFAULT_SUFFIX}"
        with DirectIOFile(Path(self.path) / name) as file:
            for item in plan.items:
                start = file.tell()
                try:
                    torch.save(planner.resolve_data(item), file)
                except RuntimeError:
                    # torch.save reports only an unexpected position; writing again raises the
                    # operating system's error, such as a full disk.
                    file.write(bytes(base.CHUNK_BYTES))
                    raise
                length = file.tell() - start
                results.append(WriteResult(item.index, length, _StorageInfo(name, start, length)))
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done


class ChunkedSavePlanner(SavePlanner):
    """Save plan of a checkpoint of any format, in chunks of rows that are read when written."""

    def __init__(self, source: Checkpoint):
        self.source, self.checksums = source, Checksums()
        self.blocks = read_ahead(source.tensors, source.read, self.checksums)
        self.keys = {
            key if key.startswith(base.MOMENTS) else f"params.{key}": key for key in source.tensors
        }

    def set_up_planner(
        self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False
    ) -> None:
        pass

    def create_local_plan(self) -> SavePlan:
        return SavePlan([item for name in self.keys for item in self._items(name)])

    def _items(self, name: str) -> Iterator[WriteItem]:
        dtype, shape = tensor = self.source.tensors[self.keys[name]]
        properties = TensorProperties(to_torch(np.empty(0, dtype)).dtype)
        for rows in base.row_chunks(tensor):
            offsets = torch.Size([rows.start, *(0 for _ in shape[1:])])
            chunk = ChunkStorageMetadata(offsets, torch.Size([rows.stop - rows.start, *shape[1:]]))
            data = TensorWriteData(chunk, properties, torch.Size(shape))
            yield WriteItem(MetadataIndex(name, offsets), WriteItemType.SHARD, tensor_data=data)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        plans, metadata = create_default_global_save_plan(all_plans)
        # As for a state that the trainer saves: parameter names are keys below `params`.
        nested = {name: tuple(name.split(".", 1)) for name in self.keys}
        return plans, replace(metadata, planner_data=nested)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        key, rows, array = next(self.blocks)
        assert key == self.keys[write_item.index.fqn]
        assert write_item.index.offset is not None and rows.start == write_item.index.offset[0]
        return to_torch(array)
