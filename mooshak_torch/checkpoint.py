"""Checkpoints of the torch side: DCP (torch.distributed.checkpoint), asynchronous, resharding.

The state has the canonical names: `params.{name}`, `exp_avg.{name}`, `exp_avg_sq.{name}`.
"""

import logging
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from mooshak import interchange
from mooshak.checkpoints import kind_of, readable
from mooshak.config import Dtype
from mooshak.errors import InputError
from mooshak.interchange import Checkpoint
from mooshak_torch.model import Model
from mooshak_torch.optimizer import moments, set_step

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
    optimizer: torch.optim.Optimizer,
    path: Path,
    group: dist.ProcessGroup | None = None,
) -> Callable[[], None]:
    """Take a snapshot and write it to `path` in the background; returns the function that waits.

    `group` is a process group of the saves' own: in the background they must not meet the
    collectives of the training.
    """
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


def load(path: str | Path, dtype: Dtype) -> Model:
    """The model of a checkpoint of any kind, without the optimizer."""
    with readable(Path(path), "torch") as source_path:
        source = open_checkpoint(source_path)
        model = Model(source.model, dtype)
        fill(dict(model.named_parameters()), source)
    return model


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a DCP checkpoint or an interchange directory. Raises `InputError` if it is not whole."""
    if kind_of(path) == "safetensors":
        return interchange.open_checkpoint(path)
    model, state = interchange.read_description(path)
    reader = Reader(path / "dcp")
    try:
        metadata = reader.read_metadata().state_dict_metadata
    except Exception as error:
        raise InputError(f"{path / 'dcp'} has no readable .metadata: {error}") from error
    tensors = {
        key.removeprefix("params."): (_numpy_dtype(entry.properties.dtype), tuple(entry.size))
        for key, entry in metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    tensors = interchange.check_tensors(path, model, tensors)

    def read(key: str) -> np.ndarray:
        name = key if key.startswith(interchange.MOMENTS) else f"params.{key}"
        entry = metadata[name]
        assert isinstance(entry, TensorStorageMetadata)
        tensor = torch.empty(entry.size, dtype=entry.properties.dtype)
        try:
            dcp.load({name: tensor}, storage_reader=reader, no_dist=True)
        except (Exception, CheckpointException) as error:
            raise InputError(
                f"{path}: tensor {key} cannot be read; the checkpoint is truncated"
            ) from error
        return _to_numpy(tensor)

    return Checkpoint(path, "torch", model, state, tensors, read)


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
        return metadata


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        # Python 3.13 keeps its paths in a module of their own.
        module = {"pathlib._local": "pathlib"}.get(module, module)
        if name not in METADATA_NAMES.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name} does not belong into a checkpoint")
        return super().find_class(module, name)


def write_checkpoint(path: Path, source: Checkpoint) -> None:
    """Write a checkpoint of any kind as DCP; `path` exists only when it is complete."""
    with interchange.new_directory(path) as directory:
        interchange.write_description(directory, source.model, source.trainer_state)
        state = {
            (key if key.startswith(interchange.MOMENTS) else f"params.{key}"): _to_torch(
                source.read(key)
            )
            for key in source.tensors
        }
        dcp.save(state, checkpoint_id=directory / "dcp", no_dist=True)


def fill(state: dict[str, Tensor], source: Checkpoint) -> None:
    """Copy the checkpoint's tensors into those of `state`, which has the same keys."""
    with torch.no_grad():
        for key, tensor in state.items():
            if key not in source.tensors or source.tensors[key][1] != tuple(tensor.shape):
                raise InputError(f"{source.path}: tensor {key} is not the model's")
            tensor.copy_(_to_torch(source.read(key)))


def _numpy_dtype(dtype: torch.dtype) -> np.dtype:
    return _to_numpy(torch.empty(0, dtype=dtype)).dtype


def _to_numpy(tensor: Tensor) -> np.ndarray:
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view(interchange.DTYPES["BF16"])
    return tensor.numpy()


def _to_torch(array: np.ndarray) -> Tensor:
    if array.dtype == interchange.DTYPES["BF16"]:
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(np.ascontiguousarray(array))
