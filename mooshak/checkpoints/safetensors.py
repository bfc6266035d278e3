"""Read and write the interchange format: safetensors files, sharded or not, in chunks.

`config.json` and `model.safetensors`, or shards with an index; for a training state also
`optimizer.safetensors` and `trainer_state.json`.
"""

import json
import struct
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from safetensors import SafetensorError, safe_open

from mooshak.checkpoints.base import (
    DTYPES,
    FULL_SLICE,
    MOMENTS,
    Checkpoint,
    ReadTensor,
    Tensors,
    check_tensors,
    read_description,
    size_of,
    stored_rows,
    verify,
    write_description,
)
from mooshak.checkpoints.checksums import HASH, Checksums, read_ahead, verify_on_read
from mooshak.errors import InputError
from mooshak.files import DirectIOFile, atomic_directory
from mooshak.tokenizer.files import files_of_checkpoint


def open_checkpoint(path: Path) -> Checkpoint:
    """Open an interchange directory. Raises `InputError` if anything is missing or truncated."""
    model, state = read_description(path)
    stored = read_entries(path, "model", required=True) | read_entries(
        path, "optimizer", required=False
    )
    described = {key: (entry.dtype, entry.shape) for key, entry in stored.items()}
    tensors = check_tensors(path, model, described, trainer_state=state)
    checksums = {key: entry.checksum for key, entry in stored.items() if entry.checksum}
    read = verify_on_read(entry_reader(stored), tensors, checksums, lambda key: stored[key].file)
    files = files_of_checkpoint(path)
    return Checkpoint(path, "safetensors", model, state, tensors, read, checksums, files)


def write_checkpoint(path: Path, source: Checkpoint, shard_size: int | None = None) -> None:
    """Write a checkpoint as an interchange directory; `path` exists only when it is complete.

    Files of more than `shard_size` bytes are split between tensors.
    """
    tensors = check_tensors(
        source.path, source.model, source.tensors, trainer_state=source.trainer_state
    )
    with atomic_directory(path, source.n_bytes) as directory:
        write_description(directory, source.model, source.trainer_state, source.tokenizer_files)
        weights = {k: v for k, v in tensors.items() if not k.startswith(MOMENTS)}
        moments = {k: v for k, v in tensors.items() if k.startswith(MOMENTS)}
        for name, part in (("model", weights), ("optimizer", moments)):
            write_tensors(directory, name, part, source.read, shard_size)
        verify(open_checkpoint(directory))


def write_tensors(
    directory: Path, name: str, tensors: Tensors, read: ReadTensor, shard_size: int | None = None
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
        (directory / f"{name}.safetensors.index.json").write_text(text, "utf-8")


@dataclass(frozen=True)
class SafetensorsEntry:
    """Location of a tensor in a safetensors file."""

    file: Path
    start: int
    dtype: np.dtype
    shape: tuple[int, ...]
    checksum: str | None


def read_entries(
    path: Path, name: str, required: bool, optional: Collection[str] = ()
) -> dict[str, SafetensorsEntry]:
    """Read the entries of `{name}.safetensors`, or else of the shards in its index: key -> entry.

    The index may list tensors in `optional` that no shard holds.
    """
    index, single = path / f"{name}.safetensors.index.json", path / f"{name}.safetensors"
    if single.is_file() or not index.is_file():  # As in transformers, a single file wins.
        return _header(single) if required or single.is_file() else {}
    try:
        files = {
            key: path / str(file)
            for key, file in json.loads(index.read_text("utf-8"))["weight_map"].items()
        }
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise InputError(f"{index} is not an index of shards: {error!r}") from error
    stored: dict[str, SafetensorsEntry] = {}
    for file in sorted(set(files.values())):
        if not file.is_file():
            key = next(key for key in files if files[key] == file)
            raise InputError(f"{file} is missing, with tensor {key} and others")
        # Of a tensor in several shards, that of the index.
        stored |= {k: e for k, e in _header(file).items() if files.get(k, file) == file}
    for key, file in files.items():
        if key not in stored and key not in optional:
            raise InputError(f"{file} lacks tensor {key}, which {index.name} lists")
    return stored


def entry_reader(stored: Mapping[str, SafetensorsEntry]) -> ReadTensor:
    """Return a function that reads the tensors of some entries."""

    def read(key: str, rows: slice = FULL_SLICE) -> np.ndarray:
        entry = stored[key]
        return stored_rows(entry.file, entry.start, entry.dtype, entry.shape, rows)

    return read


def _header(file: Path) -> dict[str, SafetensorsEntry]:
    """Read the entries of a safetensors file. Raises `InputError` if it is missing or truncated."""
    if not file.is_file():
        raise InputError(f"{file} is missing; the checkpoint is incomplete")
    try:
        with safe_open(file, framework="numpy"), file.open("rb") as stream:
            # The library has checked the file; it does not expose the offsets.
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
        key: SafetensorsEntry(
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
    """Yield the tensors in order, split so that no file has more than `limit` bytes."""
    shard: dict[str, tuple[np.dtype, tuple[int, ...]]] = {}
    for key, tensor in tensors.items():
        if limit and shard and sum(map(size_of, (*shard.values(), tensor))) > limit:
            yield shard
            shard = {}
        shard[key] = tensor
    if shard:
        yield shard


def _write_safetensors(file: Path, tensors: Tensors, read: ReadTensor) -> None:
    """Write a safetensors file by rows (the writer of the library needs all tensors in memory)."""
    checksums = Checksums()
    with DirectIOFile(file) as out:
        # The header comes first and holds checksums: it is rewritten at the end.
        blank = dict.fromkeys(tensors, xxhash.xxh3_64().hexdigest())
        out.write(_header_bytes(tensors, blank))
        for key, _, array in read_ahead(tensors, read, checksums):
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
