"""Parameters of the PyTorch model: initial values, loading, conversion from and to NumPy."""

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from mooshak.checkpoints import base
from mooshak.checkpoints.base import Checkpoint
from mooshak.errors import InputError
from mooshak.numerics.init_weights import initial_weight
from mooshak_torch.model import PARAM_DTYPE, Model


def load_params(state: dict[str, Tensor], source: Checkpoint) -> None:
    """Copy the checkpoint's tensors into those of `state`, which has the same keys.

    A process reads the rows of its own part of each, one tensor at a time.
    """
    with torch.no_grad():
        for key, tensor in state.items():
            if key not in source.tensors or source.tensors[key][1] != tuple(tensor.shape):
                raise InputError(f"{source.path}: tensor {key} is not the model's")
            part, where = local_part(tensor)
            rows, columns = where[0], where[1:]
            part.copy_(to_torch(source.read(key, rows)[slice(None), *columns]))


def numpy_dtype(dtype: torch.dtype) -> np.dtype:
    return to_numpy(torch.empty(0, dtype=dtype)).dtype


def to_numpy(tensor: Tensor) -> np.ndarray:
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view(base.DTYPES["BF16"])
    return tensor.numpy()


def to_torch(array: np.ndarray) -> Tensor:
    array = np.ascontiguousarray(array)
    if array.dtype == base.DTYPES["BF16"]:
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def initialize(model: Model, seed: int, gain_std: float = 0.0) -> Model:
    """Fill the parameters from the counter-based initialiser; returns the model.

    A process makes its own shards only, with the bits that they have in the whole.
    """
    dtype = torch.empty(0, dtype=PARAM_DTYPE[model.dtype]).numpy().dtype
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            part, where = local_part(parameter)
            rows, columns = (*where, slice(None))[:2]
            value = initial_weight(model.config, seed, name, rows, columns, dtype, gain_std)
            part.copy_(torch.from_numpy(value))
    return model


def local_part(tensor: Tensor) -> tuple[Tensor, tuple[slice, ...]]:
    """The part of a tensor that this process holds, and the block of the whole that it is."""
    if not isinstance(tensor, DTensor):
        return tensor, tuple(slice(0, size) for size in tensor.shape)
    # What DCP writes of it; public in all but its name.
    (chunk,) = tensor.__create_chunk_list__()
    blocks = zip(chunk.offsets, chunk.sizes, strict=True)
    return tensor.to_local(), tuple(slice(start, start + size) for start, size in blocks)
