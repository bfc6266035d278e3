"""The interchange format: a directory that both frameworks, and other programs, read and write.

`config.json` + `model.safetensors` (or shards with an index), and for a training state
`optimizer.safetensors` + `trainer_state.json`. Tensors pass through some rows at a time.

Every kind of checkpoint is read as a `Checkpoint`: names, shapes, and a function that reads one
tensor. Keys: `{name}` for a parameter, `exp_avg.{name}`, `exp_avg_sq.{name}` for the moments.
"""

import json
import math
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np
import xxhash
from safetensors import SafetensorError, safe_open

from mooshak.config import ModelConfig, model_from_json, model_to_json
from mooshak.errors import InputError
from mooshak.files import Direct, new_directory, read_uncached

FORMAT_VERSION = 1
MOMENTS = ("exp_avg", "exp_avg_sq")
BLOCK = 1 << 24
"""Bytes of a tensor that are copied at once: few enough for the allocator to use them again."""
HASH = "xxh3_64"
CHECKSUMS = "checksums.json"
"""Of a DCP or an Orbax checkpoint; safetensors hold theirs in the metadata."""
EVERY = slice(None)
HF_CONFIG = "hf_config.json"
"""Their `config.json`, of a checkpoint that came from Hugging Face."""
COMPANIONS = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    HF_CONFIG,
)
"""Files that come along with the weights, whatever the kind of the checkpoint becomes."""
DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}

Tensors = Mapping[str, tuple[np.dtype, tuple[int, ...]]]
"""key -> dtype and shape, in the canonical layout."""


class Read(Protocol):
    """Reads one tensor, or some rows of it, in the canonical layout."""

    def __call__(self, key: str, rows: slice = EVERY, /) -> np.ndarray: ...


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of any kind, open for reading."""

    path: Path
    kind: str
    """torch, jax, safetensors or hf."""
    model: ModelConfig
    trainer_state: dict[str, Any] | None
    """`trainer_state.json`; None where there are only weights."""
    tensors: Tensors
    read: Read
    checksums: Mapping[str, str] = field(default_factory=dict)
    """key -> hash of the tensor's bytes, of the tensors that it was stored with."""
    companions: Mapping[str, Path] = field(default_factory=dict)
    """Name -> file, of those in `COMPANIONS` that there are."""

    @property
    def has_optimizer(self) -> bool:
        return any(key.startswith(MOMENTS) for key in self.tensors)

    @property
    def n_bytes(self) -> int:
        return sum(map(size_of, self.tensors.values()))


def size_of(tensor: tuple[np.dtype, tuple[int, ...]]) -> int:
    """Bytes of a tensor of this dtype and shape."""
    dtype, shape = tensor
    return math.prod(shape) * dtype.itemsize


def blocks(tensor: tuple[np.dtype, tuple[int, ...]]) -> Iterator[slice]:
    """Cuts a tensor of this dtype and shape by rows into equal parts of at most `BLOCK` bytes.

    As equal as can be: the last chunk of an Orbax array is as long as the others, however full.
    """
    n_rows = tensor[1][0]
    most = max(1, BLOCK * n_rows // size_of(tensor))
    step = math.ceil(n_rows / math.ceil(n_rows / most))
    return (slice(start, min(start + step, n_rows)) for start in range(0, n_rows, step))


def contiguous(array: np.ndarray) -> np.ndarray:
    """The array in C order, itself if it is; a matrix is transposed in strips that stay in cache.

    NumPy goes along one of the two, which is ten times slower.
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
"""Rows and columns that are transposed at once: 64 bytes, a line of the cache, are written."""


def check_tensors(
    path: Path, model: ModelConfig, tensors: Tensors
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


def companions(path: Path) -> dict[str, Path]:
    """The files of a checkpoint directory that come along with its weights."""
    return {name: path / name for name in COMPANIONS if (path / name).is_file()}


def write_description(
    path: Path,
    model: ModelConfig,
    trainer_state: dict[str, Any] | None,
    companions: Mapping[str, Path] | None = None,
) -> None:
    """Write `config.json`, where there is a state `trainer_state.json`, and what comes along."""
    for name, file in (companions or {}).items():
        shutil.copyfile(file, path / name)
    (path / "config.json").write_text(model_to_json(model))
    if trainer_state is not None:
        text = json.dumps(trainer_state, indent=2, ensure_ascii=False) + "\n"
        (path / "trainer_state.json").write_text(text)


def open_checkpoint(path: Path) -> Checkpoint:
    """Open an interchange directory. Raises `InputError` for anything that is not whole."""
    model, state = read_description(path)
    stored = stored_tensors(path, "model", required=True) | stored_tensors(
        path, "optimizer", required=False
    )
    described = {key: (entry.dtype, entry.shape) for key, entry in stored.items()}
    tensors = check_tensors(path, model, described)
    checksums = {key: entry.checksum for key, entry in stored.items() if entry.checksum}

    def rows_of(key: str, rows: slice = EVERY) -> np.ndarray:
        entry = stored[key]
        return stored_rows(entry.file, entry.start, entry.dtype, entry.shape, rows)

    read = checked(rows_of, tensors, checksums, lambda key: stored[key].file)
    along = companions(path)
    return Checkpoint(path, "safetensors", model, state, tensors, read, checksums, along)


def write_checkpoint(path: Path, source: Checkpoint, shard_size: int | None = None) -> None:
    """Write a checkpoint as an interchange directory; `path` exists only when it is complete.

    Files of more than `shard_size` bytes are cut between tensors.
    """
    tensors = check_tensors(source.path, source.model, source.tensors)
    with new_directory(path, source.n_bytes) as directory:
        write_description(directory, source.model, source.trainer_state, source.companions)
        weights = {k: v for k, v in tensors.items() if not k.startswith(MOMENTS)}
        moments = {k: v for k, v in tensors.items() if k.startswith(MOMENTS)}
        for name, part in (("model", weights), ("optimizer", moments)):
            write_tensors(directory, name, part, source.read, shard_size)
        verify(open_checkpoint(directory))


def write_tensors(
    directory: Path, name: str, tensors: Tensors, read: Read, shard_size: int | None = None
) -> None:
    """Write `{name}.safetensors`, or shards of at most `shard_size` bytes and their index."""
    shards = list(_shards(tensors, shard_size))
    files = [
        f"{name}-{i:05}-of-{len(shards):05}.safetensors"
        if len(shards) > 1
        else f"{name}.safetensors"
        for i in range(1, len(shards) + 1)
    ]
    for file, shard in zip(files, shards, strict=True):
        _write_safetensors(directory / file, shard, read)
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(map(size_of, tensors.values()))},
            "weight_map": {k: f for f, s in zip(files, shards, strict=True) for k in s},
        }
        text = json.dumps(index, indent=2) + "\n"
        (directory / f"{name}.safetensors.index.json").write_text(text)


def stored_rows(
    file: Path, start: int, dtype: np.dtype, shape: tuple[int, ...], rows: slice = EVERY
) -> np.ndarray:
    """Rows of an array that is a part of a file.

    More of them than a block are mapped: their pages come and go, and changes stay here. Raises
    `InputError` where the file ends before the array.
    """
    width = math.prod(shape[1:]) * dtype.itemsize
    first, stop, _ = rows.indices(shape[0])
    start, shape = start + first * width, (stop - first, *shape[1:])
    size = shape[0] * width
    try:
        if size > BLOCK:
            raw = np.memmap(file, np.uint8, mode="c", offset=start, shape=(size,)).view(np.ndarray)
        else:
            raw = np.empty(size, np.uint8)
            with read_uncached(file) as stream:
                stream.seek(start)
                if stream.readinto(raw.data) < size:
                    raise ValueError(f"it ends before byte {start + size}")
    except (OSError, ValueError) as error:
        raise InputError(f"{file} is truncated ({error}); the checkpoint is not whole") from error
    return raw.view(dtype).reshape(shape)


class Checksums(dict[str, str]):
    """key -> hash of the bytes of a tensor in the canonical layout, whose rows come in order."""

    def __init__(self) -> None:
        super().__init__()
        self._open: dict[str, tuple[int, xxhash.xxh3_64]] = {}

    def add(self, key: str, shape: tuple[int, ...], rows: slice, array: np.ndarray) -> None:
        """Take in some rows; those that do not follow on the last ones count for nothing."""
        first, end, _ = rows.indices(shape[0])
        if first == 0:
            self._open[key] = (0, xxhash.xxh3_64())
        row, hashed = self._open.pop(key, (-1, None))
        if hashed is None or row != first:
            return
        hashed.update(np.ascontiguousarray(array).view(np.uint8).data)
        if end == shape[0]:
            self[key] = hashed.hexdigest()
        else:
            self._open[key] = (end, hashed)


def checked(
    read: Read, tensors: Tensors, checksums: Mapping[str, str], where: Callable[[str], Path]
) -> Read:
    """`read`, which compares every tensor that is read whole, or by rows in order.

    It raises `InputError` naming the file, which `where(key)` is, and the tensor.
    """
    if not checksums:
        return read
    found = Checksums()

    def reading(key: str, rows: slice = EVERY) -> np.ndarray:
        array = read(key, rows)
        found.add(key, tensors[key][1], rows, array)
        checksum = found.pop(key, None)
        if checksum is not None and checksum != checksums.get(key, checksum):
            raise InputError(
                f"{where(key)}: tensor {key} is damaged: its checksum is {checksum}, it was "
                f"written with {checksums[key]}"
            )
        return array

    return reading


def write_checksums(path: Path, checksums: Mapping[str, str]) -> None:
    """Write the checksums of a checkpoint whose format has no place for them."""
    (path / CHECKSUMS).write_text(json.dumps({HASH: checksums}, indent=2) + "\n")


def read_checksums(path: Path) -> dict[str, str]:
    """The checksums beside a DCP or Orbax checkpoint; none where there are none."""
    file = path / CHECKSUMS
    if not file.is_file():
        return {}
    try:
        return dict(json.loads(file.read_bytes()).get(HASH, {}))
    except (ValueError, AttributeError, TypeError) as error:
        raise InputError(f"{file} is not a list of checksums ({error!r})") from error


def stream(
    tensors: Tensors, read: Read, checksums: Checksums
) -> Iterator[tuple[str, slice, np.ndarray]]:
    """Key, rows and values of every block of the tensors, in order; takes their checksums.

    A thread reads the next block while one is in use.
    """

    def following() -> Iterator[tuple[str, slice, np.ndarray]]:
        for key, tensor in tensors.items():
            for rows in blocks(tensor):
                array = np.ascontiguousarray(read(key, rows))
                checksums.add(key, tensor[1], rows, array)
                yield key, rows, array

    items = following()
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = thread.submit(next, items, None)
            yield item


def verify(checkpoint: Checkpoint) -> None:
    """Read everything once. Raises `InputError` where a tensor is not what was written."""

    def read(key: str) -> None:
        for rows in blocks(checkpoint.tensors[key]):
            checkpoint.read(key, rows)

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(read, checkpoint.tensors))


@dataclass(frozen=True)
class Stored:
    """Where a safetensors file holds a tensor."""

    file: Path
    start: int
    dtype: np.dtype
    shape: tuple[int, ...]
    checksum: str | None


def stored_tensors(path: Path, name: str, required: bool) -> dict[str, Stored]:
    """The tensors of `{name}.safetensors`, or of the shards that its index lists."""
    index, single = path / f"{name}.safetensors.index.json", path / f"{name}.safetensors"
    if not index.is_file():
        return _header(single) if required or single.is_file() else {}
    try:
        files = {
            key: path / str(file)
            for key, file in json.loads(index.read_text())["weight_map"].items()
        }
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise InputError(f"{index} is not an index of shards: {error!r}") from error
    stored: dict[str, Stored] = {}
    for file in sorted(set(files.values())):
        if not file.is_file():
            key = next(key for key in files if files[key] == file)
            raise InputError(f"{file} is missing, which holds tensor {key} and others")
        stored |= _header(file)
    for key, file in files.items():
        if key not in stored or stored[key].file != file:
            raise InputError(f"{file} lacks tensor {key}, which {index.name} says it holds")
    return stored


def _header(file: Path) -> dict[str, Stored]:
    """What a safetensors file holds. Raises `InputError` for one that is not whole."""
    if not file.is_file():
        raise InputError(f"{file} is missing; the checkpoint is not whole")
    try:
        with safe_open(file, framework="numpy"), file.open("rb") as stream:
            # The library has found the file whole; only the offsets it keeps to itself.
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{file} is truncated or is not safetensors ({error})") from error
    metadata = header.pop("__metadata__", {})
    for key, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise InputError(
                f"{file}: tensor {key} has dtype {entry['dtype']}; known: {', '.join(DTYPES)}"
            )
    return {
        key: Stored(
            file,
            8 + length + entry["data_offsets"][0],
            DTYPES[entry["dtype"]],
            tuple(entry["shape"]),
            metadata.get(f"{HASH}:{key}"),
        )
        for key, entry in header.items()
    }


def _shards(
    tensors: Tensors, limit: int | None
) -> Iterator[dict[str, tuple[np.dtype, tuple[int, ...]]]]:
    """The tensors in order, cut where a file would have more than `limit` bytes."""
    shard: dict[str, tuple[np.dtype, tuple[int, ...]]] = {}
    for key, tensor in tensors.items():
        if limit and shard and sum(map(size_of, (*shard.values(), tensor))) > limit:
            yield shard
            shard = {}
        shard[key] = tensor
    if shard:
        yield shard


def _write_safetensors(file: Path, tensors: Tensors, read: Read) -> None:
    """Write a safetensors file some rows at a time (the library's own writer wants all at once)."""
    checksums = Checksums()
    with Direct(file) as out:
        # The header comes first and holds the checksums, which are known last.
        blank = dict.fromkeys(tensors, xxhash.xxh3_64().hexdigest())
        out.write(_header_bytes(tensors, blank))
        for key, _, array in stream(tensors, read, checksums):
            dtype, shape = tensors[key]
            assert array.dtype == dtype and array.shape[1:] == shape[1:], key
            out.write(array.view(np.uint8).data)
        out.seek(0)
        out.write(_header_bytes(tensors, checksums))


def _header_bytes(tensors: Tensors, checksums: Mapping[str, str]) -> bytes:
    names = {dtype: name for name, dtype in DTYPES.items()}
    metadata = {"format": "pt", **{f"{HASH}:{key}": checksums[key] for key in tensors}}
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for key, tensor in tensors.items():
        start, end = end, end + size_of(tensor)
        dtype, shape = names[tensor[0]], list(tensor[1])
        header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
