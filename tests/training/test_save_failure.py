"""A save that fails in one process ends all of them, with the reason."""

import errno
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mooshak.checkpoints.manager import CheckpointManager, complete_steps
from mooshak.config.parse import dump_config
from mooshak.config.sections import CheckpointConfig, Config
from mooshak.data.shards import load_or_prepare_shards
from mooshak.errors import PeerError, SaveError
from tests.peers import DEADLINE, Peer, Peers

FAILURES = {
    "mkdir": "File exists",
    "start": "Input/output error",
    "write": "File too large",
    "describe": "Is a directory",
    "rename": "Directory not empty",
    "prune": "Directory not empty",
}
"""Failing operation -> the reason that is reported."""


def train(checkpoints: CheckpointManager, peer: Peer, last: int, start: Callable[..., Any]) -> None:
    """A loop as the trainers have it: flags every step, a save every second one."""
    for step in range(1, last + 1):
        if peer.any_process(checkpoints.failed):
            checkpoints.raise_failure()
        if step % 2 == 0:
            checkpoints.save({"format_version": 1, "step": step}, start)
    checkpoints.finish()


@pytest.mark.usefixtures("tiny_tokenizer")
@pytest.mark.parametrize("last", [4, 10_000])
@pytest.mark.parametrize(
    ("fault", "bad"),
    [*((fault, 0) for fault in FAILURES), ("start", 1), ("write", 1), ("start", 2), ("write", 2)],
)
def test_failure_is_raised_by_all(
    fault: str, bad: int, last: int, tiny_config: Config, tmp_path: Path
) -> None:
    config = replace(
        tiny_config,
        run=replace(tiny_config.run, dir=str(tmp_path)),
        checkpoint=CheckpointConfig(every=2, keep=1 if fault == "prune" else 9),
    )
    directory, peers, ended = tmp_path / "checkpoints", Peers(3), threading.Event()
    written = {step: threading.Barrier(3) for step in (2, 4)}
    raised: dict[int, BaseException] = {}

    def start(rank: int, temporary: Path) -> Callable[[], None]:
        step = int(temporary.name.split(".")[1])
        failing = step == 4 and rank == bad
        if failing and fault == "start":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(temporary))

        def wait() -> None:
            if failing and fault == "write":
                raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
            if step == 4 and fault in ("start", "write"):
                ended.wait()  # As in a collective to which one process does not come.
                raise RuntimeError("connection closed")
            written[step].wait(DEADLINE)
            if failing and fault == "describe":
                (temporary / "config.json").mkdir()
            if failing and fault == "rename":
                (directory / "4" / "other").mkdir(parents=True)
            if failing and fault == "prune":
                (directory / ".2.deleting" / "other").mkdir(parents=True)

        return wait

    def process(rank: int) -> None:
        peer = Peer(peers, rank)
        try:
            checkpoints = CheckpointManager(config, peer)
            if fault == "mkdir" and rank == 0:
                (directory / ".4.writing").touch()
            train(checkpoints, peer, last, lambda temporary: start(rank, temporary))
        except Exception as error:
            raised[rank] = error

    threads = [threading.Thread(target=process, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE)
    ended.set()
    assert sorted(raised) == [0, 1, 2]
    text = f"the checkpoint of step 4 could not be saved: {FAILURES[fault]}"
    for rank, error in raised.items():
        kind = SaveError if rank == bad else PeerError
        assert type(error) is kind
        assert str(error).startswith(text if rank == bad else f"rank {bad} failed: {text}")
    assert complete_steps(directory) == ([2, 4] if fault == "prune" else [2])


@pytest.mark.usefixtures("tiny_tokenizer")
def test_unknown_error_keeps_its_type(tiny_config: Config, tmp_path: Path) -> None:
    config = replace(tiny_config, run=replace(tiny_config.run, dir=str(tmp_path)))
    checkpoints = CheckpointManager(config, Peer(Peers(1), 0))

    def wait() -> None:
        raise KeyError("a bug")

    checkpoints.save({"format_version": 1, "step": 1}, lambda _: wait)
    with pytest.raises(KeyError, match="a bug"):
        checkpoints.finish()
    checkpoints.finish()


STUCK = """
import multiprocessing, threading, time
from mooshak.errors import PeerError, SaveError, command

@command
def main():
    threading.Thread(target=threading.Event().wait).start()
    multiprocessing.get_context("fork").Process(target=time.sleep, args=(10_000,)).start()
    raise {error}("no space")

main()
"""


@pytest.mark.slow
@pytest.mark.parametrize(("error", "code"), [("PeerError", 3), ("SaveError", 2)])
def test_command_error_ends_threads_and_children(error: str, code: int) -> None:
    # The output of a child that is left behind stays open.
    command = [sys.executable, "-c", STUCK.format(error=error)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE)
    assert (done.returncode, done.stderr) == (code, "error: no space\n")


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def run_all(commands: list[list[str]], variables: list[dict[str, str]]) -> list[tuple[int, str]]:
    """Run commands at once; returns the exit code and the last lines of each."""
    processes = [
        subprocess.Popen(
            [sys.executable, *command],
            env=os.environ | more,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for command, more in zip(commands, variables, strict=True)
    ]
    try:
        printed = [process.communicate(timeout=DEADLINE)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(p.returncode, out) for p, out in zip(processes, printed, strict=True)]


@pytest.fixture
def arguments(tiny_config: Config, tmp_path: Path) -> list[str]:
    """The arguments of a long run that saves every second step."""
    config = replace(
        tiny_config,
        train=replace(tiny_config.train, steps=100_000),
        checkpoint=CheckpointConfig(every=2, keep=9),
        evaluate=replace(tiny_config.evaluate, every=0),
        run=replace(tiny_config.run, dir=str(tmp_path / "run")),
    )
    load_or_prepare_shards(config, progress=False)
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config))
    return ["--config", str(path)]


def run_pair(layout: str, bad: int, fault: str, arguments: list[str]) -> list[tuple[int, str]]:
    """Train in two processes, of which one fails at the checkpoint of step 4."""
    if layout == "deepspeed":
        pytest.importorskip("deepspeed")
    framework, port = "jax" if layout == "jax" else "torch", str(free_port())
    command = [WORKER, framework, str(bad), fault, "4", *arguments]
    if layout == "jax":
        command += ["--mesh", "fsdp=2", "--parallel.coordinator_address", f"127.0.0.1:{port}"]
        command += ["--parallel.num_processes", "2", "--parallel.process_id"]
        return run_all([[*command, rank] for rank in "01"], [{}, {}])
    command += ["--parallel.strategy", layout]
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    variables = [place | {"RANK": rank, "LOCAL_RANK": rank} for rank in "01"]
    return run_all([command, command], variables)


WORKER = str(Path(__file__).with_name("failing_save.py"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "bad", "fault", "last"),
    [
        ("fsdp", 0, "write", False),
        ("fsdp", 1, "write", True),
        ("ddp", 1, "start", True),
        ("deepspeed", 0, "start", False),
        ("deepspeed", 0, "describe", True),
        ("jax", 0, "write", False),
        ("jax", 1, "start", False),
        ("jax", 0, "describe", True),
    ],
)
def test_processes_end_after_failed_save(
    layout: str, bad: int, fault: str, last: bool, arguments: list[str], tmp_path: Path
) -> None:
    done = run_pair(layout, bad, fault, [*arguments, *(["--train.steps", "4"] if last else [])])
    reason = f"the checkpoint of step 4 could not be saved: {FAILURES[fault]}: "
    for rank, (code, printed) in enumerate(done):
        message = printed.strip().splitlines()[-1]
        assert code == (2 if rank == bad else 3), printed[-3000:]
        expected = "error: " + ("" if rank == bad else f"rank {bad} failed: ") + reason
        assert message.startswith(expected), printed[-3000:]
    assert complete_steps(tmp_path / "run" / "checkpoints") == [2]


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["fsdp", "jax"])
def test_processes_end_after_failure_of_one(layout: str, arguments: list[str]) -> None:
    done = run_pair(layout, 1, "alone", arguments)
    assert all(code != 0 for code, _ in done), done
    assert "error: one process failed alone" in done[1][1].splitlines()


@pytest.mark.slow
def test_torchrun_reports_failed_save(arguments: list[str], tmp_path: Path) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, WORKER, "torch", "0", "describe", "4", *arguments]
    ((code, printed),) = run_all([command], [{}])
    assert code != 0
    reason = "the checkpoint of step 4 could not be saved: Is a directory"
    assert re.search(f"error: {reason}", printed), printed[-3000:]
    assert re.search(f"error: rank 0 failed: {reason}", printed), printed[-3000:]
    assert complete_steps(tmp_path / "run" / "checkpoints") == [2]
