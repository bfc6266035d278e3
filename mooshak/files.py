"""Atomic writes of files and directories, file locks, and I/O that bypasses the page cache."""

import contextlib
import errno
import fcntl
import io
import json
import mmap
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

from mooshak.errors import InputError


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Yield a temporary file that replaces `path` when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.filename in (None, str(temporary)):  # Name the file that the user knows.
            error.filename, error.filename2 = str(path), None
        raise
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write the content of a file atomically, text as UTF-8."""
    with atomic_write(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def read_object(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file, empty if there is no file.

    Raises `InputError` if the file is not JSON, or not an object.
    """
    try:
        values = json.loads(path.read_bytes()) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise InputError(f"{path} is not a JSON object")
    return values


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file `path`, which other processes wait for; a dead process releases it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


LOCK = ".lock"


@contextlib.contextmanager
def atomic_directory(path: Path, n_bytes: int = 0) -> Iterator[Path]:
    """Yield a temporary directory that is renamed to `path` when the block ends without an error.

    Its files are synced to disk first. One process at a time writes `path`: it holds a lock, which
    is released if the process is killed; what it left is then removed by the next one. Raises
    `InputError` if `path` exists (nothing is overwritten), if another process is writing it, or if
    the disk has less than `n_bytes` free.
    """
    _check_absent(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.unfinished"
    with _hold(temporary, path):
        try:
            for leftover in temporary.iterdir():
                if leftover.is_dir():
                    shutil.rmtree(leftover)
                elif leftover.name != LOCK:
                    leftover.unlink()
            free = shutil.disk_usage(temporary).free
            if n_bytes > free:
                raise InputError(
                    f"{path} needs {n_bytes / 1e9:.3g} GB and the disk has {free / 1e9:.3g} GB "
                    "free; free some space"
                )
            yield temporary
            _all_to_disk(temporary)
            _check_absent(path)
            temporary.rename(path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        (path / LOCK).unlink()
        _to_disk(path.parent)


def _hold(directory: Path, target: Path) -> BinaryIO:
    """Create a directory and lock it. Raises `InputError` if another process holds the lock."""
    while True:
        directory.mkdir(exist_ok=True)
        try:
            lock = (directory / LOCK).open("wb")
        except FileNotFoundError:  # Its owner has just renamed or removed it.
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(lock.fileno()), os.stat(directory / LOCK)):
                return lock
        except BlockingIOError as error:
            lock.close()
            raise InputError(f"another process is writing {target}; wait for it") from error
        except FileNotFoundError:
            pass
        lock.close()


def _check_absent(path: Path) -> None:
    if path.exists():
        raise InputError(f"{path} exists already; remove it or choose another destination")


def _all_to_disk(directory: Path) -> None:
    """Sync all files and directories below a directory to disk."""
    with ThreadPoolExecutor(8) as pool:  # The file system batches concurrent syncs.
        list(pool.map(_to_disk, [*directory.rglob("*"), directory]))


def _to_disk(path: Path) -> None:
    """Sync a file, or the entries of a directory, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_uncached(path: Path) -> io.BufferedReader:
    """Open a file for reads that do not leave its pages in the page cache.

    Pages that are read once would evict useful ones, and on a VM, allocating page cache can be
    slower than the disk.
    """
    return io.BufferedReader(_Uncached(path))


class _Uncached(io.FileIO):
    def readinto(self, buffer: Any) -> int:
        try:
            return os.preadv(self.fileno(), [buffer], HERE, DONT_CACHE)
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
        return super().readinto(buffer) or 0


HERE = -1
"""Offset argument of preadv2: read at the current position."""
DONT_CACHE = 0x80
"""RWF_DONTCACHE, since Linux 6.14."""


class DirectIOFile(io.FileIO):
    """A new file, written with O_DIRECT (full pages, no page cache) if the file system allows.

    `flush` does not write a partial page, which would end direct I/O.
    """

    def __init__(self, path: Path):
        super().__init__(path, "wb", opener=_open_direct)
        self._buffer = _spare.pop() if _spare else mmap.mmap(-1, 1 << 24, mmap.MAP_PRIVATE)
        self._filled = 0

    def write(self, data: Any) -> int:
        data = memoryview(data).cast("B")
        size = len(data)
        while data:
            part = data[: len(self._buffer) - self._filled]
            self._buffer[self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            data = data[len(part) :]
            if self._filled == len(self._buffer):
                self._write_out()
        return size

    def tell(self) -> int:
        return super().tell() + self._filled

    def seek(self, position: int, whence: int = os.SEEK_SET) -> int:
        self._write_out()
        return super().seek(position, whence)

    def truncate(self, size: int | None = None) -> int:
        self._write_out()
        return super().truncate(size)

    def close(self) -> None:
        if not self.closed:
            try:
                self._write_out()
            finally:
                super().close()
            _spare.append(self._buffer)

    def _write_out(self) -> None:
        filled, self._filled = self._filled, 0
        pages = filled // mmap.PAGESIZE * mmap.PAGESIZE
        for start, stop in ((0, pages), (pages, filled)):
            while start < stop:
                try:
                    start += os.write(self.fileno(), memoryview(self._buffer)[start:stop])
                except OSError as error:
                    flags = fcntl.fcntl(self, fcntl.F_GETFL)
                    if error.errno != errno.EINVAL or not flags & os.O_DIRECT:
                        raise
                    # The end of the file is a partial page: from here on, buffered writes.
                    fcntl.fcntl(self, fcntl.F_SETFL, flags & ~os.O_DIRECT)


_spare: list[mmap.mmap] = []
"""Buffers of closed files, for reuse."""


def _open_direct(path: str, flags: int) -> int:
    try:
        return os.open(path, flags | os.O_DIRECT, 0o666)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    return os.open(path, flags, 0o666)
