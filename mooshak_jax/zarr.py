"""Read and write parts of single arrays of an Orbax checkpoint, through tensorstore.

Orbax itself reads and writes full trees: a conversion would hold every array in memory.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore

from mooshak.checkpoints.base import CHUNK_BYTES, stored_rows
from mooshak.files import DirectIOFile


class ZarrReader:
    """Reader of a checkpoint's arrays by name: the keys of `tree`, joined by dots."""

    def __init__(self, directory: Path):
        self.directory = directory
        metadata = ocp.PyTreeCheckpointer().metadata(directory.absolute()).item_metadata
        self.tree = metadata.tree
        self._driver = "zarr3" if metadata.use_zarr3 else "zarr"
        self._stores: dict[str, tensorstore.TensorStore] = {}

    def read(self, name: str, region: tuple[slice, ...]) -> np.ndarray:
        """Return a region of an array, in the stored order of its axes."""
        if (rows := self._read_rows(name, region)) is not None:
            return rows
        if (store := self._stores.get(name)) is None:
            store = self._open_store(name, region)
            self._stores = {name: store}
        fortran = store.chunk_layout.inner_order != tuple(range(store.rank))
        return store[region].read(order="F" if fortran else "C").result()

    def _read_rows(self, name: str, region: tuple[slice, ...]) -> np.ndarray | None:
        """Return rows of a single uncompressed chunk from its file; None for other regions."""
        description = self.directory / name / ".zarray"
        if not description.is_file():
            return None
        zarray = json.loads(description.read_bytes())
        turn = slice(None, None, -1 if zarray["order"] == "F" else 1)
        shape, chunk = zarray["shape"][turn], zarray["chunks"][turn]
        (first, stop), *columns = (
            axis.indices(size)[:2] for axis, size in zip(region[turn], shape, strict=True)
        )
        number = first // chunk[0]
        index = (number, *(0 for _ in columns))[turn]
        file = self.directory / name / ".".join(map(str, index))
        if (
            zarray.get("compressor")
            or zarray.get("filters")
            or chunk[1:] != shape[1:]
            or columns != [(0, size) for size in shape[1:]]
            or stop > (number + 1) * chunk[0]
            or not file.is_file()
        ):
            return None
        rows = slice(first - number * chunk[0], stop - number * chunk[0])
        array = stored_rows(file, 0, np.dtype(zarray["dtype"]), tuple(chunk), rows)
        return array.T if zarray["order"] == "F" else array

    def _open_store(self, name: str, region: tuple[slice, ...]) -> tensorstore.TensorStore:
        spec = {"driver": self._driver, "kvstore": _kvstore(self.directory, name)}
        store = tensorstore.open(spec, open=True, read=True).result()
        # Chunks that extend beyond the region are cached, decoded: the next region needs them.
        n_bytes = store.dtype.numpy_dtype.itemsize
        chunk: Any = store.chunk_layout.read_chunk.shape
        for axis, size, width in zip(region, store.shape, chunk, strict=True):
            start, stop, _ = axis.indices(size)
            n_bytes *= (-(-stop // width) - start // width) * width
        if n_bytes <= 2 * CHUNK_BYTES:
            return store
        context = tensorstore.Context({"cache_pool": {"total_bytes_limit": n_bytes}})
        return tensorstore.open(spec, open=True, read=True, context=context).result()


class ZarrWriter:
    """Writer of a checkpoint with the structure of `tree`; arrays are named as in `ZarrReader`."""

    def __init__(self, directory: Path, tree: Any):
        self.directory = directory
        # Orbax writes its metadata, which have no shapes, with one element for each array. One file
        # per chunk: OCDBT would rewrite its index for every array.
        empty = jax.tree.map(lambda _: np.zeros(1, np.float32), tree)
        ocp.PyTreeCheckpointer(use_ocdbt=False).save(directory.absolute(), empty)
        self._context = tensorstore.Context({"file_io_sync": False})

    def create(
        self, name: str, dtype: np.dtype, shape: tuple[int, ...], chunk: int, transposed: bool
    ) -> Callable[[int, np.ndarray], None]:
        """Create an array with `chunk` rows per chunk; return a function (number, rows) to write.

        With `transposed` the array `name` is the transpose, in Fortran order. Chunks are not
        compressed (weights have random bits, and zstd is slower than the disk): each is a file of
        its elements.
        """
        shutil.rmtree(self.directory / name)
        turn = slice(None, None, -1 if transposed else 1)
        spec = {
            "driver": "zarr",
            "kvstore": _kvstore(self.directory, name),
            "metadata": {
                "shape": shape[turn],
                "chunks": (chunk, *shape[1:])[turn],
                "order": "F" if transposed else "C",
                "dtype": dtype.name if dtype.name == "bfloat16" else dtype.str,
                "compressor": None,
            },
        }
        tensorstore.open(spec, create=True, context=self._context).result()

        def write(number: int, rows: np.ndarray) -> None:
            index = (number, *(0 for _ in shape[1:]))[turn]
            with DirectIOFile(self.directory / name / ".".join(map(str, index))) as file:
                file.write(rows.view(np.uint8).data)
                file.truncate(chunk * rows.nbytes // len(rows))  # The last one may have fewer rows.

        return write


def _kvstore(directory: Path, name: str) -> dict[str, str]:
    """Return tensorstore's key-value store of an array."""
    base = directory.absolute()
    if (base / "manifest.ocdbt").is_file():
        return {"driver": "ocdbt", "base": f"file://{base}", "path": f"{name}/"}
    return {"driver": "file", "path": f"{base / name}/"}
