"""Checksums of tensors: computed while streaming, verified while reading."""

import json
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import xxhash

from mooshak.checkpoints.base import FULL_SLICE, ReadTensor, Tensors, row_chunks
from mooshak.errors import InputError

HASH = "xxh3_64"
CHECKSUMS = "checksums.json"
"""Checksum file of a DCP or Orbax checkpoint; safetensors have them in their metadata."""


class Checksums(dict[str, str]):
    """key -> hash of the bytes of a tensor in the canonical layout, computed from rows in order."""

    def __init__(self) -> None:
        super().__init__()
        self._open: dict[str, tuple[int, xxhash.xxh3_64]] = {}

    def add(self, key: str, shape: tuple[int, ...], rows: slice, array: np.ndarray) -> None:
        """Add the next rows of a tensor; rows that are out of order discard its hash."""
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


def verify_on_read(
    read: ReadTensor, tensors: Tensors, checksums: Mapping[str, str], where: Callable[[str], Path]
) -> ReadTensor:
    """Return `read` with verification of every tensor that is read in full, by rows in order.

    The result raises `InputError` for a damaged tensor, naming it and its file, `where(key)`.
    """
    if not checksums:
        return read
    found = Checksums()

    def reading(key: str, rows: slice = FULL_SLICE) -> np.ndarray:
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
    """Write the checksums of a checkpoint whose format does not store them."""
    (path / CHECKSUMS).write_text(json.dumps({HASH: checksums}, indent=2) + "\n", "utf-8")


def read_checksums(path: Path) -> dict[str, str]:
    """Read the checksums of a DCP or Orbax checkpoint; empty if it has none."""
    file = path / CHECKSUMS
    if not file.is_file():
        return {}
    try:
        return dict(json.loads(file.read_bytes()).get(HASH, {}))
    except (ValueError, AttributeError, TypeError) as error:
        raise InputError(f"{file} is not a list of checksums ({error!r})") from error


def read_ahead(
    tensors: Tensors, read: ReadTensor, checksums: Checksums
) -> Iterator[tuple[str, slice, np.ndarray]]:
    """Yield key, rows and values of every chunk of the tensors, in order, and add their checksums.

    A thread reads the next chunk while one is in use.
    """

    def following() -> Iterator[tuple[str, slice, np.ndarray]]:
        for key, tensor in tensors.items():
            for rows in row_chunks(tensor):
                array = np.ascontiguousarray(read(key, rows))
                checksums.add(key, tensor[1], rows, array)
                yield key, rows, array

    items = following()
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = thread.submit(next, items, None)
            yield item
