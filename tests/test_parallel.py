"""The torch side on several processes (gloo): every layout trains as one process does."""

import functools
import json
import math
import os
import socket
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mooshak_jax.train
from mooshak import config as configuration
from mooshak.config import Config, ModelConfig
from mooshak.errors import InputError
from mooshak_torch.checkpoint import open_checkpoint
from mooshak_torch.optimizer import LossScale
from mooshak_torch.plan import plan
from mooshak_torch.train import train

STEPS = 10

LAYOUTS = {
    "ddp": ("--parallel.strategy", "ddp"),
    "fsdp": ("--parallel.strategy", "fsdp"),
    "hsdp": ("--mesh", "data=2,fsdp=2", "--train.accumulation", 2),
    "tensor": ("--mesh", "fsdp=2,tensor=2"),
}
"""Of four processes."""

VARIANTS = {
    "accumulation": ("--mesh", "fsdp=4", "--train.accumulation", 2),
    "kept": ("--mesh", "fsdp=-1", "--parallel.reshard_after_forward", "false"),
    "remat": ("--mesh", "fsdp=2,tensor=2", "--train.remat", "full"),
    "offload": ("--mesh", "fsdp=4", "--parallel.cpu_offload", "true", "--parallel.prefetch", 2),
    "sequence": ("--mesh", "data=2,tensor=2", "--parallel.sequence_parallel", "true"),
}
VARIANTS["sequence"] += ("--train.remat", "dots")

LLAMA = ("--model.architecture", "llama", "--model.head_dim", 6, "--model.qk_norm", "true")
LLAMA += ("--model.qkv_bias", "true", "--model.wo_bias", "true", "--model.mlp_bias", "true")
LLAMA += ("--model.tie_embeddings", "true")
"""The other architecture with everything that can be in it."""


@pytest.fixture(scope="module")
def config(tiny_config: Config, tiny_tokenizer: object, tmp_path_factory: Any) -> Path:
    """A tiny model whose widths four processes do not divide, in float64."""
    model = ModelConfig(
        vocab_size=512, dim=40, n_layers=3, n_heads=4, n_kv_heads=2, hidden_dim=42, max_seq_len=32
    )
    changed = replace(
        tiny_config,
        model=model,
        train=replace(tiny_config.train, steps=STEPS, dtype="float64"),
        optimizer=replace(tiny_config.optimizer, learning_rate=1e-2, clip_norm=0.5),
        schedule=replace(tiny_config.schedule, warmup_steps=2),
        # Seven sequences in batches of two: four processes do not go through equally many.
        evaluate=replace(tiny_config.evaluate, every=STEPS // 2, sequences=7, batch_size=1),
    )
    path: Path = tmp_path_factory.mktemp("parallel") / "config.yaml"
    path.write_text(configuration.dump(changed))
    return path


@pytest.fixture(scope="module")
def alone(config: Path) -> Path:
    """The run of one process."""
    directory = config.parent / "alone"
    train(configuration.load(config, ["--run.dir", str(directory)]))
    return directory


def launch(processes: int, runs: list[tuple[str, list[Any]]], file: Path) -> list[list[Any]]:
    """Do all runs in one start of torchrun; returns for every process what its runs came to."""
    with ExitStack() as stack:
        # A port for every run: where a group has met, its next one would find its traces.
        sockets = [stack.enter_context(socket.socket()) for _ in runs]
        for free in sockets:
            free.bind(("127.0.0.1", 0))
        ports = [free.getsockname()[1] for free in sockets]
    listed = [[p, do, [*map(str, argv)]] for p, (do, argv) in zip(ports, runs, strict=True)]
    file.write_text(json.dumps(listed))
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes))
    done = subprocess.run(
        [sys.executable, *torchrun, str(Path(__file__).with_name("ranks.py")), str(file)],
        capture_output=True,
        text=True,
        timeout=400,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    files = [file.with_name(f"{file.stem}-{rank}.json") for rank in range(processes)]
    return [json.loads(written.read_text()) for written in files]


def metrics(directory: Path, key: str = "loss") -> list[float]:
    """A figure of all steps that have it; asserts that no step is missing or doubled."""
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line[key] for line in lines if key in line]


def test_every_layout_trains_as_one_process(config: Path, alone: Path, tmp_path: Path) -> None:
    layouts = LAYOUTS | VARIANTS
    runs = [
        ("train", [config, *options, "--run.dir", tmp_path / name])
        for name, options in layouts.items()
    ]
    held = ["ddp", "fsdp", "hsdp", "tensor", "offload"]
    runs += [("hold", [config, *layouts[name]]) for name in held]
    results = launch(4, runs, tmp_path / "runs.json")
    for name in layouts:
        for key in ("loss", "grad_norm", "validation_loss"):
            there, here = metrics(tmp_path / name, key), metrics(alone, key)
            assert len(here) == (2 if key == "validation_loss" else STEPS)
            assert there == pytest.approx(here, rel=1e-12, abs=0), (name, key)

    model = configuration.load(config).model
    whole = 8 * model.parameter_count()
    for result in results:
        per_process = dict(zip(held, result[len(layouts) :], strict=True))
        assert per_process["ddp"] == {
            "parameters": whole,
            "gradients": whole,
            "optimizer": 2 * whole,
        }
        for name, shards in (("fsdp", 4), ("hsdp", 2), ("tensor", 4), ("offload", 4)):
            for what, held_bytes in per_process[name].items():
                share = per_process["ddp"][what] / shards
                # Rows are dealt out whole: the last process has fewer of 42, the others more.
                assert abs(held_bytes - share) < 0.05 * share, (name, what)
    for number, name in enumerate(held):
        there = [result[len(layouts) + number] for result in results]
        assert_planned(configuration.load(config, [*map(str, layouts[name])]), there)


def assert_planned(config: Config, results: list[dict[str, int]]) -> None:
    """The planner says, to 2 %, what the process that holds most holds."""
    strategy = config.parallel.strategy
    if strategy == "auto":
        strategy = "hsdp" if "data" in config.parallel.mesh else "fsdp"
    if config.parallel.cpu_offload:
        # What is held is the same; the host has it.
        config = replace(config, parallel=replace(config.parallel, cpu_offload=False))
    planned = plan(config, "h100-80g", len(results), strategy).memory
    for what in ("parameters", "gradients", "optimizer"):
        assert planned[what] == pytest.approx(max(r[what] for r in results), rel=0.02), what


def test_two_processes_hold_what_is_planned(config: Path, tmp_path: Path) -> None:
    layouts = [
        ["--parallel.strategy", "ddp"],
        ["--parallel.strategy", "fsdp"],
        ["--parallel.strategy", "fsdp", "--train.dtype", "bfloat16"],
        ["--mesh", "tensor=2"],
    ]
    results = launch(2, [("hold", [config, *options]) for options in layouts], tmp_path / "runs")
    for number, options in enumerate(layouts):
        there = [result[number] for result in results]
        assert_planned(configuration.load(config, options), there)


def test_a_checkpoint_of_every_layout_restores_in_every_other(config: Path, tmp_path: Path) -> None:
    """One step in each, so that each follows on each; then two processes go on, then one."""
    names = list(LAYOUTS)
    order = [names[0]]
    pairs = {(a, b) for a in names for b in names if a != b}
    while following := [b for b in names if (order[-1], b) in pairs]:
        # The one with most ways left to go: the walk ends when every pair has been passed.
        order.append(max(following, key=lambda b: sum(a == b for a, _ in pairs)))
        pairs.discard((order[-2], order[-1]))
    assert not pairs
    steps = len(order) + 2
    options = [config, *LLAMA, "--model.n_layers", 1, "--train.steps", steps]
    options += ["--evaluate.every", 0, "--run.dir"]
    chain = [
        ("train", [*options, tmp_path / "chain", *LAYOUTS[name], "--train.stop_at", step])
        for step, name in enumerate(order, 1)
    ]
    launch(4, chain, tmp_path / "four.json")
    pair = [*options, tmp_path / "chain", "--mesh", "tensor=2", "--train.stop_at", steps - 1]
    launch(2, [("train", pair)], tmp_path / "two.json")
    for directory in ("chain", "alone"):
        argv = [str(option) for option in (*options[1:], tmp_path / directory)]
        train(configuration.load(config, argv))
    for key in ("loss", "grad_norm"):
        there, here = metrics(tmp_path / "chain", key), metrics(tmp_path / "alone", key)
        assert len(here) == steps and there == pytest.approx(here, rel=1e-12, abs=0)


def test_what_cannot_work_is_said(config: Path, tmp_path: Path) -> None:
    """Meshes that do not fit, before anything is allocated; a process that does not come."""
    wrong = [
        (("--mesh", "fsdp=3"), "mesh fsdp=3 needs 3 processes and there are 2"),
        (("--mesh", "fsdp=-1,data=4"), "mesh fsdp=-1,data=4 needs 4 processes and there are 2"),
        (("--mesh", "date=2"), "expected axis=size with the axes data, fsdp, tensor"),
        (("--parallel.strategy", "ddp", "--mesh", "fsdp=2"), "ddp has only the axis data"),
        (("--parallel.strategy", "single"), "single, but torchrun started 2 processes"),
        (("--mesh", "tensor=2", "--model.n_kv_heads", 1), "n_kv_heads 1 is not divisible"),
        (("--parallel.cpu_offload", "true"), "cpu_offload goes with parallel.strategy fsdp"),
        (("--train.accumulation", 8), "train.batch_size 8 is not divisible by mesh data=2"),
    ]
    options = [config, "--run.dir", tmp_path / "run", "--train.dtype", "float32"]
    runs = [("train", [*options, *argv]) for argv, _ in wrong]
    runs.append(("absent", [*options, "--mesh", "fsdp=2", "--parallel.timeout", 3]))
    results = launch(2, runs, tmp_path / "runs.json")
    for number, (_, message) in enumerate(wrong):
        assert all(message in result[number] for result in results), results[0][number]
    assert "rank 0 of 2 waited in all_gather" in results[0][-1]
    assert "Timed out" in results[0][-1] and "\n" not in results[0][-1]
    assert not list((tmp_path / "run" / "checkpoints").iterdir())
    with pytest.raises(InputError, match="needs processes: start with torchrun"):
        train(configuration.load(config, ["--parallel.strategy", "fsdp"]))
    with pytest.raises(InputError, match="gradients scaled, which only"):
        mooshak_jax.train.train(configuration.load(config, ["--train.dtype", "float16"]))


def test_float16_skips_what_is_not_finite_and_resumes_exactly(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # So much that the first gradients overflow.
    scale = functools.partial(LossScale, scale=2.0**30)
    monkeypatch.setattr("mooshak_torch.train.LossScale", scale)
    options = ["--train.dtype", "float16", "--evaluate.every", "0", "--run.dir"]
    for directory, stops in (("whole", (STEPS,)), ("parts", (6, STEPS))):
        for stop in stops:
            argv = [*options, str(tmp_path / directory), "--train.stop_at", str(stop)]
            train(configuration.load(config, argv))
    whole = metrics(tmp_path / "whole")
    assert metrics(tmp_path / "parts") == whole
    scales = metrics(tmp_path / "whole", "loss_scale")
    assert scales[0] == 2.0**29 and 2.0**15 < scales[-1] < 2.0**28
    assert scales[-1] == scales[-2] and whole[-1] < whole[0]
    state = json.loads((tmp_path / f"whole/checkpoints/{STEPS}/trainer_state.json").read_text())
    assert state["loss_scale"]["scale"] == scales[-1]
    assert state["loss_scale"]["skipped"] == 30 - math.log2(scales[-1])


def test_zero_trains_as_ddp(config: Path, tmp_path: Path) -> None:
    """DeepSpeed's three stages, one after the other in one run, whose checkpoint is like any.

    And in bfloat16 FSDP rounds where DDP does: what it gathers narrow is what is multiplied narrow.
    """
    options = [config, "--train.dtype", "float32", "--run.dir"]
    zero = ("--parallel.strategy", "deepspeed", "--parallel.zero_stage")
    runs = [
        ("train", [*options, tmp_path / "ddp"]),
        ("train", [*options, tmp_path / "ddp16", "--train.dtype", "bfloat16"]),
        ("train", [*options, tmp_path / "fsdp16", "--train.dtype", "bfloat16", "--mesh", "fsdp=2"]),
        ("train", [*options, tmp_path / "zero", *zero, 3, "--train.stop_at", 2]),
        ("train", [*options, tmp_path / "zero", *zero, 1, "--train.stop_at", 4]),
        ("train", [*options, tmp_path / "zero", *zero, 2, "--train.stop_at", 5]),
        ("train", [*options, tmp_path / "zero", *zero, 3, "--train.accumulation", 2]),
        ("train", [*options, tmp_path / "wide", *zero, 2, "--train.dtype", "float64"]),
    ]
    results = launch(2, runs, tmp_path / "runs.json")
    assert all("in float32 or bfloat16, not float64" in result[-1] for result in results)
    for key in ("loss", "grad_norm"):
        there, here = metrics(tmp_path / "zero", key), metrics(tmp_path / "ddp", key)
        assert len(here) == STEPS and there == pytest.approx(here, rel=5e-6, abs=0), key
    # Until the order of a sum in float32 makes a weight round to the other bfloat16.
    there, here = (metrics(tmp_path / run)[:5] for run in ("fsdp16", "ddp16"))
    assert there == pytest.approx(here, rel=1e-7, abs=0)
    assert here != pytest.approx(metrics(tmp_path / "ddp")[:5], rel=1e-6, abs=0)
    # As it converts: every tensor and every moment, whole.
    there, here = (
        open_checkpoint(tmp_path / run / "checkpoints" / str(STEPS)) for run in ("zero", "ddp")
    )
    assert list(there.tensors) == list(here.tensors) and there.has_optimizer
    for name in here.tensors:
        difference = np.linalg.norm(there.read(name) - here.read(name))
        assert difference <= 1e-3 * np.linalg.norm(here.read(name)), name


def test_a_resume_on_shards_of_unequal_size_is_exact(config: Path, tmp_path: Path) -> None:
    """torchtitan #809 and #1702: the loss differed after a resume."""
    uneven = ("--model.n_heads", 3, "--model.n_kv_heads", 3, "--model.dim", 30)
    options = [config, *uneven, "--model.head_dim", 10, "--train.dtype", "float32"]
    options += ["--mesh", "fsdp=4", "--run.dir"]
    runs = [
        ("train", [*options, tmp_path / "whole"]),
        ("train", [*options, tmp_path / "parts", "--train.stop_at", 3]),
        ("train", [*options, tmp_path / "parts"]),
    ]
    launch(4, runs, tmp_path / "runs.json")
    for key in ("loss", "grad_norm"):
        assert metrics(tmp_path / "parts", key) == metrics(tmp_path / "whole", key)
