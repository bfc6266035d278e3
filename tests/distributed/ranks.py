"""Pool of worker processes for torch tests, and the metrics of their runs."""

import json
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest


class Ranks:
    """Four processes that do what they are asked to, all or the first of them together."""

    def __init__(self, log: Path):
        self.log = log
        command = [sys.executable, str(Path(__file__).with_name("rank_worker.py"))]
        with log.open("w") as errors:
            self.processes = [
                subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    text=True,
                )
                for _ in range(4)
            ]

    def run(self, processes: int, do: str, argv: list[Any], *paths: Path) -> list[Any]:
        """Return the result of a rank_worker.py function in every process, on machines of two."""
        with socket.socket() as free:
            # A port for every run: where a group has met, its next one would find its traces.
            free.bind(("127.0.0.1", 0))
            place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        place |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": "2"}
        words = [[*map(str, argv)], [*map(str, paths)]]
        chosen = self.processes[:processes]
        for rank, process in enumerate(chosen):
            here = place | {"RANK": str(rank), "LOCAL_RANK": str(rank % 2)}
            assert process.stdin is not None
            process.stdin.write(json.dumps([do, *words, here]) + "\n")
            process.stdin.flush()
        overdue = threading.Timer(120, self.close)
        overdue.start()
        answers = [process.stdout.readline() for process in chosen if process.stdout is not None]
        overdue.cancel()
        told = [json.loads(answer) for answer in answers if answer]
        for answer in told:
            assert "result" in answer, answer["failed"]
        assert len(told) == processes, self.log.read_text()[-3000:]
        return [answer["result"] for answer in told]

    def close(self) -> None:
        for process in self.processes:
            process.kill()


def metrics(directory: Path, key: str = "loss") -> list[float]:
    """A figure of all steps that have it; asserts that no step is missing or doubled."""
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line[key] for line in lines if key in line]


FIGURES = ("loss", "grad_norm")


def assert_same(
    there: Path, here: Path, tolerance: float = 1e-12, figures: tuple[str, ...] = FIGURES
) -> None:
    """The figures of both runs are the same at every step."""
    for key in figures:
        measured, truth = metrics(there, key), metrics(here, key)
        assert measured == pytest.approx(truth, rel=tolerance, abs=0), key
