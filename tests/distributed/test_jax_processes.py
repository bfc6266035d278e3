"""Two JAX processes of two CPU devices each train, stop, resume and evaluate as one."""

import json
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

import mooshak_torch.train
from mooshak.config.model import ModelConfig
from mooshak.config.parse import dump_config, load_config
from mooshak.config.sections import CheckpointConfig, Config, EvaluateConfig, ScheduleConfig
from mooshak.data.shards import load_or_prepare_shards

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("compiled_in_haste")]

Pair = list[subprocess.Popen]


@pytest.fixture
def config(tiny_config: Config, tmp_path: Path) -> Path:
    """A run in float64 whose learning rate does not depend on how long it is."""
    model = ModelConfig(
        vocab_size=512, dim=32, n_layers=2, n_heads=4, hidden_dim=48, max_seq_len=32
    )
    config = replace(
        tiny_config,
        model=model,
        schedule=ScheduleConfig("constant", warmup_steps=2),
        train=replace(tiny_config.train, steps=100_000, dtype="float64"),
        checkpoint=CheckpointConfig(every=0),
        evaluate=EvaluateConfig(every=3, sequences=6, batch_size=3),
        run=replace(tiny_config.run, dir=str(tmp_path / "pair")),
    )
    load_or_prepare_shards(config, progress=False)
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config))
    return path


def start(module: str, *arguments: object) -> Pair:
    """Start both processes of a command."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-m", module, *map(str, arguments)]
    command += ["--parallel.coordinator_address", coordinator, "--parallel.num_processes", "2"]
    return [
        subprocess.Popen(
            [*command, "--parallel.process_id", str(i)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]


def finish(pair: Pair) -> tuple[str, str]:
    """Return the output of both processes; fail unless both succeed."""
    try:
        told = [process.communicate(timeout=200) for process in pair]
    finally:
        for process in pair:
            process.kill()
    for process, (_, errors) in zip(pair, told, strict=True):
        assert process.returncode == 0, errors[-3000:]
    # Gloo, which JAX uses on CPUs, prints its connections; its threads break lines of each other.
    gloo = re.compile(r"\[Gloo\]|peer ranks|^$")
    lines = [out.splitlines() for out, _ in told]
    first, second = ("\n".join(line for line in own if not gloo.search(line)) for own in lines)
    return first, second


def metrics(directory: Path, key: str) -> list[float]:
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line[key] for line in lines if key in line]


def test_two_processes_train_resume_and_evaluate_as_one(config: Path, tmp_path: Path) -> None:
    together = ("--config", config)
    # They begin with a checkpoint of PyTorch, which the first of them converts for both.
    begin = load_config(config, ["--train.stop_after_step", "1", "--evaluate.every", "0"])
    mooshak_torch.train.train(begin)
    # Each process feeds rows of its own; a signal to one of them stops both.
    layout = ("--mesh", "data=2,fsdp=2", "--model.scan_layers", "true", "--train.remat", "full")
    pair = start("mooshak_jax.train", *together, *layout)
    log, deadline = tmp_path / "pair" / "metrics.jsonl", time.monotonic() + 120
    while not (log.exists() and log.read_text().count("\n") >= 4):
        if time.monotonic() > deadline or any(process.poll() is not None for process in pair):
            finish(pair)
        time.sleep(0.1)
    pair[1].send_signal(signal.SIGTERM)
    first, second = finish(pair)
    step = len(metrics(tmp_path / "pair", "loss"))
    assert f"stopped after step {step}, saved" in first and second == ""
    # Both processes feed the same rows, to devices that have a part of every head and matrix.
    steps = ("--train.steps", step + 4)
    finish(start("mooshak_jax.train", *together, *steps, "--mesh", "tensor=4"))
    pair_evaluates = start(
        "mooshak_jax.evaluate",
        tmp_path / "pair" / "checkpoints" / str(step + 4),
        *("--mesh", "fsdp=2,tensor=2", "--evaluate.sequences", 5, "--json"),
    )
    scores, nothing = finish(pair_evaluates)
    assert nothing == ""
    alone = (*together, *steps, "--run.dir", tmp_path / "alone")
    one = [sys.executable, "-m", "mooshak_jax.train", *map(str, alone)]
    subprocess.run(one, check=True, capture_output=True, timeout=200)
    for key in ("loss", "validation_loss", "grad_norm"):
        truth = metrics(tmp_path / "alone", key)
        assert metrics(tmp_path / "pair", key) == pytest.approx(truth, rel=1e-10, abs=0)
    checkpoint = tmp_path / "alone" / "checkpoints" / str(step + 4)
    five = ("--evaluate.sequences", "5", "--json")
    done = subprocess.run(
        [sys.executable, "-m", "mooshak_jax.evaluate", str(checkpoint), *five],
        check=True,
        capture_output=True,
        text=True,
    )
    for language, score in json.loads(done.stdout).items():
        assert json.loads(scores)[language] == pytest.approx(score, rel=1e-10)


def test_mesh_without_one_process_is_refused(config: Path) -> None:
    wrong = ("--mesh", "data=2", "--parallel.cpu_devices", 2)
    pair = start("mooshak_jax.train", "--config", config, *wrong)
    told = [process.communicate(timeout=120)[1] for process in pair]
    for process, errors in zip(pair, told, strict=True):
        assert process.returncode == 2
        assert "mesh data=2 has 2 devices, the 2 processes have 4" in errors
