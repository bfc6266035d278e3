"""Checkpoints of every format as one structure, and the files that all formats share.

A `Checkpoint` has the names and shapes of its tensors and a function that reads one of them, by
rows: no checkpoint is loaded into memory at once. Keys are `{name}` for a parameter and
`exp_avg.{name}`, `exp_avg_sq.{name}` for its moments. `config.json` describes the model, and
`trainer_state.json` a training state.
"""

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn, Protocol

import ml_dtypes
import numpy as np

from mooshak.config.lora import frozen_parameters
from mooshak.config.model import ModelConfig, model_from_json, model_to_json
from mooshak.errors import InputError
from mooshak.files import read_uncached

FORMAT_VERSION = 1
MOMENTS = ("exp_avg", "exp_avg_sq")
CHUNK_BYTES = 1 << 24
"""Bytes of a tensor that are copied at once; small enough for the allocator to reuse them."""
FULL_SLICE = slice(None)
DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}

Tensors = Mapping[str, tuple[np.dtype, tuple[int, ...]]]
"""key -> dtype and shape, in the canonical layout."""


class ReadTensor(Protocol):
    """A function that reads a tensor, or rows of it, in the canonical layout."""

    def __call__(self, key: str, rows: slice = FULL_SLICE, /) -> np.ndarray: ...


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of any format, open for reading."""

    path: Path
    format: str
    """torch, jax, safetensors or hf."""
    model: ModelConfig
    trainer_state: dict[str, Any] | None
    """`trainer_state.json`; None if there are only weights."""
    tensors: Tensors
    read: ReadTensor
    checksums: Mapping[str, str] = field(default_factory=dict)
    """key -> hash of the bytes of a tensor, for tensors that were stored with one."""
    tokenizer_files: Mapping[str, Path] = field(default_factory=dict)
    """Name -> file of the tokenizer, its settings and chat template, which are copied with the
    weights."""
    label: Callable[[str], str] = lambda key: key
    """Function that returns how a tensor is called in messages: by the file's own name."""

    @property
    def has_optimizer(self) -> bool:
        return any(key.startswith(MOMENTS) for key in self.tensors)

    @property
    def n_bytes(self) -> int:
        return sum(map(size_of, self.tensors.values()))


def size_of(tensor: tuple[np.dtype, tuple[int, ...]]) -> int:
    """Return the bytes of a tensor of this dtype and shape."""
    dtype, shape = tensor
    return math.prod(shape) * dtype.itemsize


def cast(array: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """Return the array in another dtype. Raises `InputError` if a finite value becomes infinite.

    `name` is that of the tensor, for the message.
    """
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore"):
        result = array.astype(dtype)
    if array.dtype.itemsize > dtype.itemsize or dtype == np.float16:
        lost = np.isinf(result) & np.isfinite(array)
        if lost.any():
            _refuse(array[lost][0], dtype, name)
    return result


def check_range(checkpoint: Checkpoint, dtype: str) -> Checkpoint:
    """Return the checkpoint for a computation in `dtype`.

    Its `read` raises `InputError` for a finite weight that `dtype` does not hold.
    """
    limit = np.dtype(dtype if dtype != "bfloat16" else ml_dtypes.bfloat16)
    exponent = ml_dtypes.finfo(limit).maxexp
    if all(ml_dtypes.finfo(stored).maxexp <= exponent for stored, _ in checkpoint.tensors.values()):
        return checkpoint

    def read(key: str, rows: slice = FULL_SLICE) -> np.ndarray:
        array = checkpoint.read(key, rows)
        with np.errstate(invalid="ignore"):
            lost = np.isfinite(array) & (np.abs(array) > float(ml_dtypes.finfo(limit).max))
        if lost.any():
            _refuse(array[lost][0], limit, checkpoint.label(key))
        return array

    return replace(checkpoint, read=read)


def _refuse(value: Any, dtype: np.dtype, name: str) -> NoReturn:
    raise InputError(
        f"tensor {name} has the value {float(value):.6g}, which {dtype.name} does not hold (at "
        f"most {float(ml_dtypes.finfo(dtype).max):.6g}); choose another dtype"
    )


def row_chunks(tensor: tuple[np.dtype, tuple[int, ...]]) -> Iterator[slice]:
    """Split a tensor of this dtype and shape by rows into chunks of at most `CHUNK_BYTES`.

    The chunks are as equal as possible: the last chunk of an Orbax array occupies the same space as
    the others.
    """
    n_rows = tensor[1][0]
    most = max(1, CHUNK_BYTES * n_rows // size_of(tensor))
    step = math.ceil(n_rows / math.ceil(n_rows / most))
    return (slice(start, min(start + step, n_rows)) for start in range(0, n_rows, step))


def contiguous(array: np.ndarray) -> np.ndarray:
    """Return the array in C order; a transposed matrix is copied in strips that fit into the cache.

    NumPy copies it along one of its axes, which is ten times slower.
    """
    if array.flags.c_contiguous or array.ndim != 2 or not array.T.flags.c_contiguous:
        return np.ascontiguousarray(array)
    result, (rows, columns) = np.empty(array.shape, array.dtype), STRIP
    for row in range(0, len(array), rows):
        for column in range(0, array.shape[1], columns):
            here = slice(row, row + rows), slice(column, column + columns)
            result[here] = array[here]
    return result


STRIP = (4096, 16)
"""Rows and columns copied at once: writes are 64 bytes, a cache line."""


def check_tensors(
    path: Path,
    model: ModelConfig,
    tensors: Tensors,
    label: Callable[[str], str] = lambda key: key,
    trainer_state: Mapping[str, Any] | None = None,
) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    """Return the tensors in the order of the model, moments last.

    `label` returns the name of a tensor in messages. Raises `InputError` unless they are exactly
    those of the model, with the moments of all parameters that `trainer_state` does not freeze, or
    none.
    """
    shapes = model.parameter_shapes()
    frozen = frozen_parameters(shapes, model.lora, **(trainer_state or {}).get("freeze", {}))
    expected = dict(shapes)
    if any(key.startswith(MOMENTS) for key in tensors):
        expected |= {
            f"{moment}.{name}": shapes[name]
            for moment in MOMENTS
            for name in shapes
            if name not in frozen
        }
    for key, shape in expected.items():
        if key not in tensors:
            raise InputError(
                f"{path}: tensor {label(key)} is missing; this is not the model of config.json"
            )
        if tensors[key][1] != shape:
            raise InputError(
                f"{path}: tensor {label(key)} has shape {list(tensors[key][1])}, config.json says "
                f"{list(shape)}; this is a checkpoint of another model"
            )
    if left_over := sorted(set(tensors) - set(expected)):
        raise InputError(f"{path}: tensor {left_over[0]} belongs to no parameter of the model")
    return {key: tensors[key] for key in expected}


def read_description(path: Path) -> tuple[ModelConfig, dict[str, Any] | None]:
    """Read `config.json` and `trainer_state.json` (None if absent) of a checkpoint directory."""
    config = path / "config.json"
    if not config.is_file():
        raise InputError(f"{path} is not a checkpoint: it has no config.json")
    return model_from_json(config.read_bytes(), str(config)), read_trainer_state(path)


def read_trainer_state(path: Path) -> dict[str, Any] | None:
    """Read `trainer_state.json` of a checkpoint directory; None if there are only weights.

    Raises `InputError` for a truncated file, or one of another version of Mooshak.
    """
    file = path / "trainer_state.json"
    if not file.is_file():
        return None
    try:
        state = json.loads(file.read_bytes())
    except ValueError as error:
        raise InputError(f"{file} is not JSON: {error}; the checkpoint is incomplete") from error
    if not isinstance(state, dict) or not isinstance(state.get("step"), int):
        raise InputError(f"{file} has no step; it does not describe a training state")
    if state.get("format_version") != FORMAT_VERSION:
        raise InputError(
            f"{file}: format_version {state.get('format_version')} is not {FORMAT_VERSION}; "
            "it was written by another version of Mooshak"
        )
    return state


def write_description(
    path: Path,
    model: ModelConfig,
    trainer_state: dict[str, Any] | None,
    tokenizer_files: Mapping[str, Path] | None = None,
) -> None:
    """Write `config.json`, `trainer_state.json` for a training state, and the tokenizer files."""
    for name, file in (tokenizer_files or {}).items():
        shutil.copyfile(file, path / name)
    (path / "config.json").write_text(model_to_json(model), "utf-8")
    if trainer_state is not None:
        text = json.dumps(trainer_state, indent=2, ensure_ascii=False) + "\n"
        (path / "trainer_state.json").write_text(text, "utf-8")


def stored_rows(
    file: Path, start: int, dtype: np.dtype, shape: tuple[int, ...], rows: slice = FULL_SLICE
) -> np.ndarray:
    """Read rows of an array that is stored in a part of a file.

    More than `CHUNK_BYTES` are memory-mapped, copy-on-write. Raises `InputError` if the file ends
    before the array.
    """
    width = math.prod(shape[1:]) * dtype.itemsize
    first, stop, _ = rows.indices(shape[0])
    start, shape = start + first * width, (stop - first, *shape[1:])
    size = shape[0] * width
    try:
        if size > CHUNK_BYTES:
            raw = np.memmap(file, np.uint8, mode="c", offset=start, shape=(size,)).view(np.ndarray)
        else:
            raw = np.empty(size, np.uint8)
            with read_uncached(file) as stream:
                stream.seek(start)
                if stream.readinto(raw.data) < size:
                    raise ValueError(f"it ends before byte {start + size}")
    except (OSError, ValueError) as error:
        raise InputError(f"{file} is truncated ({error}); the checkpoint is incomplete") from error
    return raw.view(dtype).reshape(shape)


def verify(checkpoint: Checkpoint) -> None:
    """Read all tensors once, which verifies checksums. Raises `InputError` for a damaged tensor."""

    def read(key: str) -> None:
        for rows in row_chunks(checkpoint.tensors[key]):
            checkpoint.read(key, rows)

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(read, checkpoint.tensors))
