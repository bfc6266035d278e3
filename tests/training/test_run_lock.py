"""The lock of a run directory: one owner at a time, and none after it has ended."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest

from mooshak.config.sections import Config
from mooshak.errors import InputError
from mooshak.training import run_lock
from mooshak.training.run_lock import LOCK, own_run

OWNER = """
import sys, time
from pathlib import Path
from mooshak.training.run_lock import own_run

class OneProcess:
    is_main = True
    def broadcast(self, text):
        return text

with own_run(Path(sys.argv[1]), OneProcess()):
    print("owns", flush=True)
    sys.stdin.read()
"""


class OneProcess:
    is_main, world_size = True, 1

    def broadcast(self, text: str) -> str:
        return text


def owner(run: Path) -> "subprocess.Popen[str]":
    """A process that owns the run until its input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(run)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "owns\n"
    return process


@pytest.mark.slow
def test_second_command_is_refused_until_the_first_ends(
    tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In both frameworks, and before anything is written."""
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    run = tmp_path / "run"
    config = replace(tiny_config, run=replace(tiny_config.run, dir=str(run)))
    process = owner(run)
    try:
        before = (run / LOCK).read_text()
        assert json.loads(before) == {"host": socket.gethostname(), "pid": process.pid}
        who = f"{run} is in use by process {process.pid} on {socket.gethostname()}"
        for framework in ("torch", "jax"):
            with pytest.raises(InputError, match=who):
                import_module(f"mooshak_{framework}.train").train(config)
        assert [path.name for path in run.iterdir()] == [LOCK]
        assert (run / LOCK).read_text() == before
    finally:
        process.kill()  # As kill -9: the file stays, the lock does not.
        process.communicate()
    assert (run / LOCK).exists()
    with own_run(run, OneProcess()):
        assert json.loads((run / LOCK).read_text())["pid"] == os.getpid()
    assert not list(run.iterdir())


def test_directory_that_stays_empty_is_removed(tmp_path: Path) -> None:
    with own_run(tmp_path / "a" / "b", OneProcess()):
        assert (tmp_path / "a" / "b" / LOCK).is_file()
    assert not (tmp_path / "a").exists()
    (tmp_path / "c").mkdir()
    with own_run(tmp_path / "c", OneProcess()):
        pass
    assert (tmp_path / "c").is_dir()


@pytest.mark.parametrize("content", ["", "not JSON", "[]", '{"host": "here"}'])
def test_damaged_lock_is_replaced(content: str, tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text(content)
    with own_run(tmp_path, OneProcess()):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()


def test_owner_on_another_host_is_alive_while_it_renews(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run_lock, "STALE_SECONDS", 1.0)
    monkeypatch.setattr(run_lock, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(run_lock, "RENEWAL_SECONDS", 0.1)
    (tmp_path / LOCK).write_text(json.dumps({"host": "elsewhere", "pid": 7}))
    ended = threading.Event()
    renewal = threading.Thread(target=run_lock._renew, args=(tmp_path / LOCK, ended))
    renewal.start()
    try:
        with (
            pytest.raises(InputError, match="in use by process 7 on elsewhere"),
            own_run(tmp_path, OneProcess()),
        ):
            pass
    finally:
        ended.set()
        renewal.join()
    began = time.monotonic()
    with own_run(tmp_path, OneProcess()):  # Not renewed for a second.
        assert time.monotonic() - began >= 1
    (tmp_path / LOCK).write_text(json.dumps({"host": "elsewhere", "pid": 7}))
    os.utime(tmp_path / LOCK, (1, 1))
    began = time.monotonic()
    with own_run(tmp_path, OneProcess()):  # Of 1970.
        assert time.monotonic() - began < 1
    assert "was in use on elsewhere; is it still?" in capsys.readouterr().err


def test_process_decides_without_locks_of_the_file_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_lock, "_try_lock", lambda file: None)
    here = socket.gethostname()
    (tmp_path / LOCK).write_text(json.dumps({"host": here, "pid": os.getppid()}))
    refused = pytest.raises(InputError, match=f"in use by process {os.getppid()}")
    with refused, own_run(tmp_path, OneProcess()):
        pass
    (tmp_path / LOCK).write_text(json.dumps({"host": here, "pid": 2**30}))
    with own_run(tmp_path, OneProcess()):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()


def test_unusable_directory_is_said_in_all_processes(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    said = pytest.raises(InputError, match=f"File exists: {tmp_path / 'file'}")
    with said, own_run(tmp_path / "file", OneProcess()):
        pass

    class Second(OneProcess):
        is_main = False

        def broadcast(self, text: str) -> str:
            return '"File exists: file"'

    with pytest.raises(InputError, match="File exists: file"), own_run(tmp_path, Second()):
        pass
