"""The lock of a run directory, `RUN/.lock`: one command at a time writes there.

The file names the owner's host and process. On one machine, and on file systems that share locks,
the operating system's lock decides, which ends with the process however that ends. Elsewhere the
age of the file does, which the owner renews.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from mooshak.checkpoints.formats import Processes
from mooshak.errors import InputError, os_error_text

LOCK = ".lock"
RENEWAL_SECONDS = 5.0
"""Seconds between renewals by the owner."""
STALE_SECONDS = 30.0
"""Age from which the lock of another host is that of a process that has ended."""
POLL_SECONDS = 0.5


@contextlib.contextmanager
def own_run(run: Path, processes: Processes) -> Iterator[None]:
    """Own the run directory inside the block; all processes of the run call it, the first locks.

    A directory that did not exist and is still empty at the end is removed. Raises `InputError`, in
    all processes, if a process of another command owns it.
    """
    with contextlib.ExitStack() as stack:
        failure = ""
        if processes.is_main:
            try:
                stack.enter_context(_locked(run))
            except InputError as error:
                failure = str(error)
            except OSError as error:
                failure = os_error_text(error)
        failure = json.loads(processes.broadcast(json.dumps(failure)))
        if failure:
            raise InputError(failure)
        yield


@contextlib.contextmanager
def _locked(run: Path) -> Iterator[None]:
    made = [path for path in (run, *run.parents) if not path.exists()]
    try:
        run.mkdir(parents=True, exist_ok=True)
        file = _acquire(run / LOCK)
        ended = threading.Event()
        renewal = threading.Thread(target=_renew, args=(run / LOCK, ended), daemon=True)
        renewal.start()
        try:
            yield
        finally:
            ended.set()
            (run / LOCK).unlink(missing_ok=True)
            file.close()
    finally:
        with contextlib.suppress(OSError):
            for directory in made:
                directory.rmdir()


def _acquire(path: Path) -> BinaryIO:
    """Return the locked file. Raises `InputError` if another process owns it."""
    while True:
        # Not truncated: it names the owner.
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
        try:
            locked, owner = _try_lock(file), _owner(file)
            if locked is False or _is_alive(path, owner, locked is not None):
                who = f"process {owner.get('pid', 'unknown')} on {owner.get('host', 'unknown')}"
                raise InputError(
                    f"{path.parent} is in use by {who}, which trains there; wait for it, stop it, "
                    "or choose another --run.dir"
                )
            if _is_same(file, path):
                file.seek(0)
                file.truncate()
                text = json.dumps({"host": socket.gethostname(), "pid": os.getpid()})
                file.write(text.encode())
                file.flush()
                return file
        except BaseException:
            file.close()
            raise
        file.close()  # The last owner has just removed it.


def _try_lock(file: BinaryIO) -> bool | None:
    """Return whether the file is locked now, or None if its file system has no locks."""
    try:
        # Not flock: processes that the owner forks would keep it.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL):
            raise
        return None
    return True


def _owner(file: BinaryIO) -> dict[str, Any]:
    """Return host and process of a lock file, empty for a new one."""
    file.seek(0)
    try:
        content = json.loads(file.read())
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _is_alive(path: Path, owner: dict[str, Any], has_locks: bool) -> bool:
    """Return whether the owner that a file names is alive, where no lock says so."""
    host, pid = owner.get("host"), owner.get("pid")
    if host is None or not isinstance(pid, int):
        return False
    if host == socket.gethostname():
        return not has_locks and pid != os.getpid() and _is_running(pid)
    return _is_renewed(path, host)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # Of another user.
        return True
    return True


def _is_renewed(path: Path, host: str) -> bool:
    """Return whether the owner on another host renews the file; wait for that if it is young."""
    with contextlib.suppress(FileNotFoundError):
        seen = path.stat().st_mtime
        if time.time() - seen > 10 * STALE_SECONDS:  # More than clocks differ by.
            return False
        print(f"{path.parent} was in use on {host}; is it still?", file=sys.stderr)
        deadline = time.monotonic() + STALE_SECONDS
        while time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
            if path.stat().st_mtime != seen:
                return True
    return False


def _is_same(file: BinaryIO, path: Path) -> bool:
    """Return whether an open file is still the one at its path."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _renew(path: Path, ended: threading.Event) -> None:
    while not ended.wait(RENEWAL_SECONDS):
        with contextlib.suppress(OSError):
            os.utime(path)
