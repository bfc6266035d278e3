"""Files and directories that appear complete or not at all; locks."""

import os
import shutil
import threading
from pathlib import Path

import pytest

from mooshak.errors import InputError
from mooshak.files import (
    LOCK,
    DirectIOFile,
    atomic_directory,
    atomic_write,
    locked,
    read_object,
    read_uncached,
    write_atomically,
)


def test_atomic_write_replaces_the_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    write_atomically(path, "एक")
    assert path.read_bytes() == "एक".encode()
    with atomic_write(path) as file:
        file.write(b"two")
        assert path.read_bytes() == "एक".encode()
    assert path.read_bytes() == b"two" and os.listdir(path.parent) == ["file"]


def test_atomic_write_that_fails_changes_nothing(tmp_path: Path) -> None:
    write_atomically(tmp_path / "file", b"one")
    with pytest.raises(RuntimeError), atomic_write(tmp_path / "file") as file:
        file.write(b"two")
        raise RuntimeError
    assert (tmp_path / "file").read_bytes() == b"one" and os.listdir(tmp_path) == ["file"]


def test_read_object_names_a_broken_file(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    assert read_object(path) == {}
    for text, message in (('{"a"', "state.json is not JSON"), ("[1]", "is not a JSON object")):
        path.write_text(text)
        with pytest.raises(InputError, match=message):
            read_object(path)
    path.write_text('{"a": 1}')
    assert read_object(path) == {"a": 1}


def test_atomic_directory_appears_complete(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "out"
    with atomic_directory(path) as directory:
        (directory / "inside").mkdir()
        (directory / "inside" / "file").write_text("a")
        assert not path.exists()
    assert (path / "inside" / "file").read_text() == "a"
    assert os.listdir(path) == ["inside"] and os.listdir(path.parent) == ["out"]


def test_atomic_directory_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), atomic_directory(tmp_path / "out") as directory:
        (directory / "file").write_text("a")
        raise RuntimeError
    assert os.listdir(tmp_path) == []


def test_atomic_directory_overwrites_nothing(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.mkdir()
    with pytest.raises(InputError, match="out exists already"), atomic_directory(path):
        raise AssertionError
    path.rmdir()
    # It may appear while the other is being made.
    with pytest.raises(InputError, match="out exists already"), atomic_directory(path) as directory:
        (directory / "file").write_text("a")
        path.mkdir()
    assert os.listdir(tmp_path) == ["out"] and os.listdir(path) == []


def test_atomic_directory_removes_what_a_kill_left(tmp_path: Path) -> None:
    left = tmp_path / ".out.unfinished"
    (left / "folder").mkdir(parents=True)
    for name in ("file", LOCK, "folder/file"):
        (left / name).write_text("left")
    with atomic_directory(tmp_path / "out") as directory:
        assert os.listdir(directory) == [LOCK]
    assert os.listdir(tmp_path / "out") == []


def test_atomic_directory_is_made_by_one(tmp_path: Path) -> None:
    path = tmp_path / "out"
    with atomic_directory(path) as directory:
        (directory / "file").write_text("a")
        with pytest.raises(InputError, match="another process is writing"), atomic_directory(path):
            raise AssertionError
    assert (path / "file").read_text() == "a"


def test_atomic_directory_needs_room(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    with (
        pytest.raises(InputError, match=r"out needs .* GB and the disk has"),
        atomic_directory(tmp_path / "out", n_bytes=2 * free),
    ):
        raise AssertionError
    assert os.listdir(tmp_path) == []


def test_lock_makes_others_wait(tmp_path: Path) -> None:
    path, events = tmp_path / "folder" / "lock", []
    starting = threading.Event()

    def other() -> None:
        starting.set()
        with locked(path):
            events.append("other")

    thread = threading.Thread(target=other)
    with locked(path):
        thread.start()
        starting.wait()
        thread.join(0.2)
        assert thread.is_alive()
        events.append("first")
    thread.join(30)
    assert events == ["first", "other"]


def test_direct_file_holds_what_was_written(tmp_path: Path) -> None:
    """Lengths that are no multiple of a page or of the buffer, and a header that comes last."""
    parts = [os.urandom(size) for size in (100, 4096, 5001, (1 << 24) + 3, 7)]
    with DirectIOFile(tmp_path / "file") as file:
        for part in parts:
            file.write(part)
        assert file.tell() == sum(map(len, parts))
        file.seek(0)
        file.write(b"x" * 100)
    content = b"x" * 100 + b"".join(parts[1:])
    assert (tmp_path / "file").read_bytes() == content
    with read_uncached(tmp_path / "file") as file:
        file.seek(4000)
        assert file.read() == content[4000:]
