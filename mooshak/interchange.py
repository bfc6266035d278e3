"""The interchange format: a directory that both frameworks, and other programs, read and write.

`config.json` + `model.safetensors` (or shards with an index), and for a training state
`optimizer.safetensors` + `trainer_state.json`. Tensors pass through one at a time.

Every kind of checkpoint is read as a `Checkpoint`: names, shapes, and a function that reads one
tensor. Keys: `{name}` for a parameter, `exp_avg.{name}`, `exp_avg_sq.{name}` for the moments.
"""

import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from mooshak.config import ModelConfig, model_from_json, model_to_json
from mooshak.errors import InputError

FORMAT_VERSION = 1
MOMENTS = ("exp_avg", "exp_avg_sq")
DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of any kind, open for reading."""

    path: Path
    kind: str
    """torch, jax or safetensors."""
    model: ModelConfig
    trainer_state: dict[str, Any] | None
    """`trainer_state.json`; None where there are only weights."""
    tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]]
    """key -> dtype and shape, in the canonical layout."""
    read: Callable[[str], np.ndarray]
    """Reads one tensor, in the canonical layout."""

    @property
    def has_optimizer(self) -> bool:
        return any(key.startswith(MOMENTS) for key in self.tensors)


def check_tensors(
    path: Path, model: ModelConfig, tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]]
) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    """The tensors in the model's order, moments last.

    Raises `InputError` unless they are exactly those of the model, moments all or none.
    """
    shapes = model.parameter_shapes()
    expected = dict(shapes)
    if any(key.startswith(MOMENTS) for key in tensors):
        expected |= {f"{moment}.{name}": shapes[name] for moment in MOMENTS for name in shapes}
    for key, shape in expected.items():
        if key not in tensors:
            raise InputError(
                f"{path}: tensor {key} is missing; this is not the model of config.json"
            )
        if tensors[key][1] != shape:
            raise InputError(
                f"{path}: tensor {key} has shape {list(tensors[key][1])}, config.json says "
                f"{list(shape)}; this is a checkpoint of another model"
            )
    if left_over := sorted(set(tensors) - set(expected)):
        raise InputError(f"{path}: tensor {left_over[0]} belongs to no parameter of the model")
    return {key: tensors[key] for key in expected}


def read_description(path: Path) -> tuple[ModelConfig, dict[str, Any] | None]:
    """`config.json` and `trainer_state.json` (None where absent) of a checkpoint directory."""
    config = path / "config.json"
    if not config.is_file():
        raise InputError(f"{path} is not a checkpoint: it has no config.json")
    return model_from_json(config.read_bytes(), str(config)), read_trainer_state(path)


def read_trainer_state(path: Path) -> dict[str, Any] | None:
    """`trainer_state.json` of a checkpoint directory, None where there are only weights.

    Raises `InputError` for one that is cut short, or of another version of Mooshak.
    """
    file = path / "trainer_state.json"
    if not file.is_file():
        return None
    try:
        state = json.loads(file.read_bytes())
    except ValueError as error:
        raise InputError(f"{file} is not JSON: {error}; the checkpoint is not whole") from error
    if not isinstance(state, dict) or not isinstance(state.get("step"), int):
        raise InputError(f"{file} has no step; it does not describe a training state")
    if state.get("format_version") != FORMAT_VERSION:
        raise InputError(
            f"{file}: format_version {state.get('format_version')} is not {FORMAT_VERSION}; "
            "it was written by another version of Mooshak"
        )
    return state


def write_description(path: Path, model: ModelConfig, trainer_state: dict[str, Any] | None) -> None:
    """Write `config.json` and, where there is a state, `trainer_state.json`."""
    (path / "config.json").write_text(model_to_json(model))
    if trainer_state is not None:
        text = json.dumps(trainer_state, indent=2, ensure_ascii=False) + "\n"
        (path / "trainer_state.json").write_text(text)


def open_checkpoint(path: Path) -> Checkpoint:
    """Open an interchange directory. Raises `InputError` for anything that is not whole."""
    model, state = read_description(path)
    where: dict[str, Path] = {}
    tensors: dict[str, tuple[np.dtype, tuple[int, ...]]] = {}
    for file in [*_weight_files(path), *path.glob("optimizer.safetensors")]:
        for key, described in _header(file).items():
            where[key], tensors[key] = file, described
    tensors = check_tensors(path, model, tensors)

    def read(key: str) -> np.ndarray:
        with safe_open(where[key], framework="numpy") as file:
            return file.get_tensor(key)

    return Checkpoint(path, "safetensors", model, state, tensors, read)


def write_checkpoint(path: Path, source: Checkpoint) -> None:
    """Write a checkpoint as an interchange directory; `path` exists only when it is complete."""
    tensors = check_tensors(source.path, source.model, source.tensors)
    with new_directory(path) as directory:
        write_description(directory, source.model, source.trainer_state)
        weights = {k: v for k, v in tensors.items() if not k.startswith(MOMENTS)}
        moments = {k: v for k, v in tensors.items() if k.startswith(MOMENTS)}
        _write_safetensors(directory / "model.safetensors", weights, source.read)
        if moments:
            _write_safetensors(directory / "optimizer.safetensors", moments, source.read)


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A directory to fill, which gets its name `path` only when the block ends without an error.

    Raises `InputError` when `path` exists: nothing is ever overwritten.
    """
    if path.exists():
        raise InputError(f"{path} exists already; remove it or choose another destination")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.writing-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _weight_files(path: Path) -> list[Path]:
    index = path / "model.safetensors.index.json"
    if not index.is_file():
        return [path / "model.safetensors"]
    try:
        names = set(json.loads(index.read_text())["weight_map"].values())
    except (ValueError, KeyError, AttributeError) as error:
        raise InputError(f"{index} is not an index of shards: {error!r}") from error
    return [path / name for name in sorted(names)]


def _header(file: Path) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    if not file.is_file():
        raise InputError(f"{file} is missing; the checkpoint is not whole")
    try:
        with safe_open(file, framework="numpy") as tensors:
            names = tensors.keys()
            views = {name: tensors.get_slice(name) for name in names}
            described = {k: (v.get_dtype(), tuple(v.get_shape())) for k, v in views.items()}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file} is truncated or is not safetensors ({error})") from error
    for key, (dtype, _) in described.items():
        if dtype not in DTYPES:
            raise InputError(f"{file}: tensor {key} has dtype {dtype}; known: {', '.join(DTYPES)}")
    return {key: (DTYPES[dtype], shape) for key, (dtype, shape) in described.items()}


def _write_safetensors(
    file: Path,
    tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]],
    read: Callable[[str], np.ndarray],
) -> None:
    """Write a safetensors file tensor by tensor (the library's own writer wants all at once)."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for key, (dtype, shape) in tensors.items():
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        data_offsets = [offset, offset + size]
        header[key] = {"dtype": names[dtype], "shape": list(shape), "data_offsets": data_offsets}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for key, (dtype, shape) in tensors.items():
            array = read(key)
            assert array.dtype == dtype and array.shape == shape, key
            out.write(np.ascontiguousarray(array).view(np.uint8).data)
        out.flush()
        os.fsync(out.fileno())
