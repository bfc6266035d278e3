"""Files that are either whole or not there, made by one process at a time."""

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
    """A file to write to, which takes the place of `path` when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a whole file, text as UTF-8."""
    with atomic_write(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file, empty where there is no file. Raises `InputError` for another."""
    try:
        values = json.loads(path.read_bytes()) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise InputError(f"{path} is not a JSON object")
    return values


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file `path`; other processes wait here. A process that dies lets go of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


LOCK = ".lock"


@contextlib.contextmanager
def atomic_directory(path: Path, n_bytes: int = 0) -> Iterator[Path]:
    """A directory to fill, which is named `path` when the block ends without an error.

    It is on the disk by then. One process at a time makes `path`: it holds a lock, which a process
    that is killed lets go of, and what that one left is removed. Raises `InputError` when `path`
    exists (nothing is ever overwritten), when another process is making it, or when the disk has
    no room for `n_bytes`.
    """
    _check_absent(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.unfinished"
    with _hold(temporary, path):
        try:
            for left in temporary.iterdir():
                if left.is_dir():
                    shutil.rmtree(left)
                elif left.name != LOCK:
                    left.unlink()
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
    """Make a directory and lock it. Raises `InputError` if another process holds the lock."""
    while True:
        directory.mkdir(exist_ok=True)
        try:
            lock = (directory / LOCK).open("wb")
        except FileNotFoundError:  # Its owner has just given it its name, or removed it.
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(lock.fileno()), os.stat(directory / LOCK)):
                return lock
        except BlockingIOError as error:
            lock.close()
            raise InputError(f"another process is making {target}; wait for it") from error
        except FileNotFoundError:
            pass
        lock.close()


def _check_absent(path: Path) -> None:
    if path.exists():
        raise InputError(f"{path} exists already; remove it or choose another destination")


def _all_to_disk(directory: Path) -> None:
    """Wait until every file of a directory is on the disk, and their names."""
    with ThreadPoolExecutor(8) as pool:  # The file system writes their names together.
        list(pool.map(_to_disk, [*directory.rglob("*"), directory]))


def _to_disk(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_uncached(path: Path) -> io.BufferedReader:
    """A file to read, whose pages stay in memory no longer than the reading.

    What is read and written once would push out what is used again, and memory can be slower than
    the disk: a virtual machine asks its host for every page that has been free for seconds.
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
"""The position of a file, for reads with flags."""
DONT_CACHE = 0x80
"""RWF_DONTCACHE of Linux 6.14."""


class DirectIOFile(io.FileIO):
    """A new file, which goes to the disk by whole pages, past the page cache, where it can.

    `flush` waits for more: part of a page would end that.
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
                    # The end of the file, no whole page, and what comes after it.
                    fcntl.fcntl(self, fcntl.F_SETFL, flags & ~os.O_DIRECT)


_spare: list[mmap.mmap] = []
"""Buffers of files that are closed, for others."""


def _open_direct(path: str, flags: int) -> int:
    try:
        return os.open(path, flags | os.O_DIRECT, 0o666)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    return os.open(path, flags, 0o666)
