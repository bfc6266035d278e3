"""Benchmarks: every worker runs in a tiny size; no test depends on a time."""

import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

from benchmarks.__main__ import check_target
from benchmarks.case import Case, Target, config, step_flops
from benchmarks.cases import CASES, COMPILED, JAX, OURS_COMPILED, TORCH
from benchmarks.servers import VLLM_PYTHON

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _as_a_process_starts() -> Iterator[None]:
    """Other tests here compute in float64, which a peer's optimizer does not expect."""
    with jax.enable_x64(False):
        yield


# A case's sizes and a worker, each pair once; compiling a peer would take the longest of all.
ENTRIES = {
    (entry, json.dumps(case.tiny)): (case, entry)
    for case in CASES
    for name, entry in case.workers.items()
    if name not in (COMPILED, OURS_COMPILED)
}

PEERS = {"litgpt": "litgpt", "llama_cpp": "llama_cpp", "hf_server": "fastapi"}
"""Part of a worker's name -> the package that it needs."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "entry"), ENTRIES.values(), ids=lambda value: getattr(value, "name", value)
)
def test_every_worker_runs(case: Case, entry: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    module, function = entry.split(":")
    for word, peer in PEERS.items():
        if word in entry:
            pytest.importorskip(peer)
    if "vllm" in entry and not VLLM_PYTHON.is_file():
        pytest.skip("make vllm")
    repeat = getattr(importlib.import_module(f"benchmarks.{module}"), function)(case.tiny)
    assert case.name == "start" or repeat() > 0  # A start sets up by starting once.


@pytest.mark.slow
def test_case_is_measured_and_shown_on_a_page(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "benchmarks", "data", "--size", "tiny", "--repetitions", "2"]
    # Not in `tmp_path`: the DataLoader has sockets there, whose paths are short.
    with tempfile.TemporaryDirectory() as temporary:
        done = subprocess.run(
            [*words, "--out", str(tmp_path)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            env=os.environ | {"TMPDIR": temporary},
        )
        assert done.returncode == 0, done.stderr
        assert not [path for path in Path(temporary).iterdir() if path.is_dir()]
    result = json.loads((tmp_path / "data.json").read_text())
    (point,) = result["points"]
    for row in point["workers"].values():
        assert len(row["figures"]) == 2 and row["median"] > 0 and row["memory"] > 1e6
        assert row["figures"][0] == pytest.approx(4 * 16 * 8 / row["seconds"][0])
    page = (tmp_path / "index.html").read_text()
    assert result["title"] in page and "<svg" in page and "<script" not in page


@pytest.mark.slow
def test_unknown_case_is_one_line() -> None:
    words = [sys.executable, "-m", "benchmarks", "trian"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: no case 'trian'")


def test_targets_are_ratios_of_one_run() -> None:
    measured = {
        TORCH: {"median": 30.0, "memory": 2.0},
        JAX: {"median": 20.0, "memory": 1.0},
        "peer": {"missing": "no module"},
    }
    for target, value, passed in (
        (Target(TORCH, JAX, 1.5), 1.5, True),
        (Target(TORCH, JAX, 1.6), 1.5, False),
        (Target(TORCH, JAX, 1.9, "memory"), 2.0, False),
        (Target(TORCH, None, 30.0, "seconds"), 30.0, True),
    ):
        row = check_target(target, measured)
        assert row is not None and (row["value"], row["passed"]) == (value, passed)
    assert check_target(Target(TORCH, "peer", 1.0), measured) is None


def test_targets_name_workers() -> None:
    for case in CASES:
        for target in case.targets:
            assert {target.ours, target.other} - {None} <= set(case.workers), case.name


def test_flops_of_a_step_are_the_configurations() -> None:
    case = CASES[0]
    model = config(case.full).model
    assert step_flops(case.full) == model.flops_per_token(512) * 2048
