"""Parameters of the PyTorch model: initial values, loading, conversion from and to NumPy.

Mirror: mooshak_jax/params.py.
"""

from pathlib import Path

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
    """Copy a checkpoint's tensors into the tensors of `state`, by key.

    Each process reads only the rows of its own shards, one tensor at a time. Raises `InputError`
    for a key or shape that the checkpoint does not have.
    """
    with torch.no_grad():
        for key, tensor in state.items():
            if key not in source.tensors or source.tensors[key][1] != tuple(tensor.shape):
                raise InputError(f"{source.path}: tensor {key} does not fit the model")
            shard, (rows, *columns) = local_shard(tensor)
            shard.copy_(to_torch(source.read(key, rows)[slice(None), *columns]))


def numpy_dtype(dtype: torch.dtype) -> np.dtype:
    """Return the NumPy dtype of a torch dtype."""
    return to_numpy(torch.empty(0, dtype=dtype)).dtype


def to_numpy(tensor: Tensor) -> np.ndarray:
    """Return a CPU tensor as an array that shares its memory."""
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view(base.DTYPES["BF16"])
    return tensor.numpy()


def to_torch(array: np.ndarray) -> Tensor:
    """Return an array as a tensor, sharing its memory if it is contiguous."""
    array = np.ascontiguousarray(array)
    if array.dtype == base.DTYPES["BF16"]:
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def initialize(model: Model, seed: int, gain_std: float = 0.0) -> Model:
    """Fill the parameters from the counter-based initializer; return the model.

    Each process computes only its own shards, bit-identical to the same rows of the full tensor.
    """
    dtype = numpy_dtype(PARAM_DTYPE[model.dtype])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            shard, block = local_shard(parameter)
            rows, columns = (*block, slice(None))[:2]
            value = initial_weight(model.config, seed, name, rows, columns, dtype, gain_std)
            shard.copy_(torch.from_numpy(value))
    return model


def local_shard(tensor: Tensor) -> tuple[Tensor, tuple[slice, ...]]:
    """Return this process's shard of a tensor, and the block of the full tensor that it is."""
    if not isinstance(tensor, DTensor):
        return tensor, tuple(slice(0, size) for size in tensor.shape)
    # The hook by which DCP finds the chunks that it writes.
    (chunk,) = tensor.__create_chunk_list__()
    blocks = zip(chunk.offsets, chunk.sizes, strict=True)
    return tensor.to_local(), tuple(slice(start, start + size) for start, size in blocks)


@torch.no_grad()
def gather_weights(model: Model, is_main: bool) -> Checkpoint:
    """Return the weights under their canonical names, copied to the host of the first process.

    Tensors that are not sharded are not copied before they are read.
    """
    named = {name: p.detach() for name, p in model.named_parameters()}
    for name, tensor in named.items():
        if isinstance(tensor, DTensor):
            full = tensor.full_tensor()
            named[name] = full.cpu() if is_main else full.new_empty(0)
    tensors = {name: (numpy_dtype(t.dtype), tuple(t.shape)) for name, t in named.items()}

    def read(key: str, rows: slice = base.FULL_SLICE) -> np.ndarray:
        return to_numpy(named[key][rows].cpu())

    return Checkpoint(Path("(memory)"), "torch", model.config, None, tensors, read)
