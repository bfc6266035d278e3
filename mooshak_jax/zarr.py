"""The arrays of an Orbax checkpoint by its storage layer (tensorstore), a part of one at a time.

Orbax itself reads and writes whole trees: it would hold every array of a conversion in memory.
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
    """The arrays of a checkpoint that exists, by their names: the keys of `tree`, dotted."""

    def __init__(self, directory: Path):
        self.directory = directory
        metadata = ocp.PyTreeCheckpointer().metadata(directory.absolute()).item_metadata
        self.tree = metadata.tree
        self._driver = "zarr3" if metadata.use_zarr3 else "zarr"
        self._open: dict[str, tensorstore.TensorStore] = {}

    def read(self, name: str, region: tuple[slice, ...]) -> np.ndarray:
        """A part of an array, in the order of axes in which it is stored."""
        if (rows := self._rows(name, region)) is not None:
            return rows
        if (store := self._open.get(name)) is None:
            store = self._opened(name, region)
            self._open = {name: store}
        fortran = store.chunk_layout.inner_order != tuple(range(store.rank))
        return store[region].read(order="F" if fortran else "C").result()

    def _rows(self, name: str, region: tuple[slice, ...]) -> np.ndarray | None:
        """A part that is rows of a chunk which is a file of its elements; None for any other."""
        description = self.directory / name / ".zarray"
        if not description.is_file():
            return None
        zarray = json.loads(description.read_bytes())
        turn = slice(None, None, -1 if zarray["order"] == "F" else 1)
        shape, chunk = zarray["shape"][turn], zarray["chunks"][turn]
        (first, stop), *columns = (
            cut.indices(size)[:2] for cut, size in zip(region[turn], shape, strict=True)
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

    def _opened(self, name: str, region: tuple[slice, ...]) -> tensorstore.TensorStore:
        spec = {"driver": self._driver, "kvstore": _place(self.directory, name)}
        store = tensorstore.open(spec, open=True, read=True).result()
        # Chunks that lie across the part are kept, decoded: the next part needs them again.
        kept = store.dtype.numpy_dtype.itemsize
        chunk: Any = store.chunk_layout.read_chunk.shape
        for cut, size, width in zip(region, store.shape, chunk, strict=True):
            start, stop, _ = cut.indices(size)
            kept *= (-(-stop // width) - start // width) * width
        if kept <= 2 * CHUNK_BYTES:
            return store
        context = tensorstore.Context({"cache_pool": {"total_bytes_limit": kept}})
        return tensorstore.open(spec, open=True, read=True, context=context).result()


class ZarrWriter:
    """Makes a checkpoint of the structure of `tree`, whose arrays have their names."""

    def __init__(self, directory: Path, tree: Any):
        self.directory = directory
        # Orbax writes its descriptions, which have no shapes, with one element for each array. A
        # file for each chunk: OCDBT would write its index anew for every array.
        empty = jax.tree.map(lambda _: np.zeros(1, np.float32), tree)
        ocp.PyTreeCheckpointer(use_ocdbt=False).save(directory.absolute(), empty)
        self._context = tensorstore.Context({"file_io_sync": False})

    def create(
        self, name: str, dtype: np.dtype, shape: tuple[int, ...], chunk: int, transposed: bool
    ) -> Callable[[int, np.ndarray], None]:
        """An array with `chunk` rows in each chunk; returns what writes a chunk, given its number.

        With `transposed` it is its transpose that is called `name`, in Fortran order. Chunks are
        not compressed: the bits of weights are noise, and zstd is slower than the disk. Then a
        chunk is a file of its bytes.
        """
        shutil.rmtree(self.directory / name)
        turn = slice(None, None, -1 if transposed else 1)
        spec = {
            "driver": "zarr",
            "kvstore": _place(self.directory, name),
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
                file.truncate(chunk * rows.nbytes // len(rows))  # The last may have fewer rows.

        return write


def _place(directory: Path, name: str) -> dict[str, str]:
    base = directory.absolute()
    if (base / "manifest.ocdbt").is_file():
        return {"driver": "ocdbt", "base": f"file://{base}", "path": f"{name}/"}
    return {"driver": "file", "path": f"{base / name}/"}
