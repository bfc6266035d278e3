"""Full runs in processes of their own: resume, signals, DDP, change of framework."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

pytestmark = pytest.mark.slow

STEPS = 8


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model on a little text of two languages; the first run makes tokenizer and shards."""
    here = tmp_path_factory.mktemp("corpus")
    for language, text in (
        ("hi", "एक चूहा जंगल में रहता था। वह {} फल लाया।"),
        ("en", "A mouse had {} nuts."),
    ):
        lines = [
            json.dumps({"text": " ".join(text.format(i * j) for j in range(9))}) for i in range(400)
        ]
        (here / f"{language}.jsonl").write_text("\n".join(lines))
    (here / "tiny.yaml").write_text(f"""
model: {{vocab_size: 384, dim: 24, n_layers: 2, n_heads: 3, hidden_dim: 40, max_seq_len: 32}}
tokenizer: {{path: {here}/tokenizer.model, vocab_size: 370}}
data:
  dir: {here}/tokens
  validation_fraction: 0.1
  sources:
    - {{name: hindi, kind: jsonl, language: hi, path: "{here}/hi.jsonl", weight: 2}}
    - {{name: english, kind: jsonl, language: en, path: "{here}/en.jsonl"}}
optimizer: {{learning_rate: 1.0e-2}}
schedule: {{warmup_steps: 2}}
train: {{steps: {STEPS}, batch_size: 4, dtype: float64}}
checkpoint: {{every: 2, keep: 2}}
evaluate: {{every: 4, sequences: 6, batch_size: 4}}
run: {{progress: false, tensorboard: false}}
""")
    return here / "tiny.yaml"


def run(module: str, *arguments: object, launcher: tuple[str, ...] = ("-m",)) -> str:
    """Run a command; returns what it prints. Fails with its error output."""
    done = subprocess.run(
        [sys.executable, *launcher, module, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def losses(directory: Path) -> list[float]:
    """The losses of all steps; asserts that no step is missing or doubled."""
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


@pytest.fixture(scope="module")
def torch_run(config: Path) -> Path:
    """The uninterrupted torch run."""
    directory = config.parent / "torch"
    run("mooshak_torch.train", "--config", config, "--run.dir", directory)
    return directory


def test_run_directory_has_its_records(torch_run: Path) -> None:
    curve = losses(torch_run)
    assert len(curve) == STEPS and curve[-1] < curve[0]
    assert {"config.yaml", "environment.json", "metrics.jsonl"} <= set(os.listdir(torch_run))
    assert json.loads((torch_run / "environment.json").read_text())["versions"]["torch"]
    last = json.loads((torch_run / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["validation_loss"] > 0 and last["bits_per_byte_hi"] > 0 < last["bits_per_byte_en"]
    assert sorted(os.listdir(torch_run / "checkpoints"))[-1] == str(STEPS)
    state = json.loads((torch_run / f"checkpoints/{STEPS}/trainer_state.json").read_text())
    # Validation is every 4 steps.
    assert state["validation_step"] == STEPS and STEPS % 4 == 0
    assert state["validation_loss"] == last["validation_loss"]
    assert len(os.listdir(torch_run / "checkpoints")) <= 3


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_resumed_run_equals_the_uninterrupted_one(
    framework: str, config: Path, tmp_path: Path
) -> None:
    options = ("--config", config, "--train.dtype", "float32", "--checkpoint.keep", 3)
    run(f"mooshak_{framework}.train", *options, "--run.dir", tmp_path / "whole")
    parts = (*options, "--run.dir", tmp_path / "parts")
    run(f"mooshak_{framework}.train", *parts, "--train.stop_after_step", 5)
    run(f"mooshak_{framework}.train", *parts)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    # A checkpoint has its own validation loss, or none: step 5 was the last one, 6 is between two.
    known = [
        json.loads((tmp_path / f"parts/checkpoints/{step}/trainer_state.json").read_text())
        for step in (5, 6)
    ]
    assert known[0]["validation_loss"] > 0 and known[1]["validation_loss"] is None


def test_two_ddp_processes_train_as_one(config: Path, torch_run: Path, tmp_path: Path) -> None:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m")
    arguments = (
        "--config",
        config,
        "--run.dir",
        tmp_path,
        "--train.gradient_accumulation_steps",
        2,
    )
    run("mooshak_torch.train", *arguments, launcher=launcher)
    assert losses(tmp_path) == pytest.approx(losses(torch_run), rel=1e-12, abs=0)


def test_jax_mesh_trains_as_torch(config: Path, torch_run: Path, tmp_path: Path) -> None:
    run("mooshak_jax.train", "--config", config, "--run.dir", tmp_path, "--mesh", "data=2")
    assert losses(tmp_path) == pytest.approx(losses(torch_run), rel=1e-12, abs=0)


def test_run_changes_framework_and_back(config: Path, torch_run: Path, tmp_path: Path) -> None:
    options = ("--config", config, "--run.dir", tmp_path)
    run("mooshak_torch.train", *options, "--train.stop_after_step", 3)
    run("mooshak_jax.train", *options, "--train.stop_after_step", 6)
    run("mooshak_torch.train", *options)
    assert losses(tmp_path) == pytest.approx(losses(torch_run), rel=1e-12, abs=0)


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_signal_saves_and_reports_how_to_resume(
    framework: str, config: Path, tmp_path: Path
) -> None:
    arguments = ["--config", str(config), "--run.dir", str(tmp_path), "--train.steps", "100000"]
    process = subprocess.Popen(
        [sys.executable, "-m", f"mooshak_{framework}.train", *arguments, "--evaluate.every", "0"],
        stdout=subprocess.PIPE,
        text=True,
    )
    metrics = tmp_path / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") >= 3):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 0
    assert "--resume auto" in output
    step = len(losses(tmp_path))
    assert (tmp_path / "checkpoints" / str(step) / "trainer_state.json").is_file()


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_profile_lists_the_time_of_operations(framework: str, config: Path, tmp_path: Path) -> None:
    options = (
        "--run.dir",
        tmp_path,
        "--train.stop_after_step",
        3,
        "--evaluate.every",
        0,
        "--profile",
    )
    said = run(f"mooshak_{framework}.train", "--config", config, *options)
    assert "time by operation" in said and {"torch": "aten::", "jax": "fusion"}[framework] in said
    trace = {"torch": "trace.json", "jax": "*.trace.json.gz"}[framework]
    assert list((tmp_path / "profile").rglob(trace))


def test_both_frameworks_generate_the_same_text(config: Path, torch_run: Path) -> None:
    checkpoint = torch_run / "checkpoints" / str(STEPS)
    options = (checkpoint, "--prompt", "एक चूहा", "--prompt", "A mouse", "--tokens", 12)
    sampled = (*options, "--temperature", 1, "--seed", 5)
    assert run("mooshak_torch.generate", *options) == run("mooshak_jax.generate", *options)
    assert run("mooshak_torch.generate", *sampled) == run("mooshak_jax.generate", *sampled)


def test_both_frameworks_evaluate_the_same(config: Path, torch_run: Path) -> None:
    checkpoint = torch_run / "checkpoints" / str(STEPS)
    ours, theirs = (
        json.loads(run(f"mooshak_{framework}.evaluate", checkpoint, "--json"))
        for framework in ("torch", "jax")
    )
    assert list(ours) == list(theirs) == ["hi", "en"]
    last = json.loads((torch_run / "metrics.jsonl").read_text().splitlines()[-1])
    for language, score in ours.items():
        assert score == pytest.approx(theirs[language], rel=1e-12)
        assert score["bits_per_byte"] == pytest.approx(last[f"bits_per_byte_{language}"], rel=1e-12)
        assert score["ratio"] * score["bits_per_byte"] == pytest.approx(
            score["unigram_bits_per_byte"]
        )
        # Eight steps are hardly a model, but the coder of single tokens is a fixed figure.
        assert 0.5 < score["unigram_bits_per_byte"] < 4


@pytest.mark.parametrize(
    ("kind", "framework", "dtype", "tolerance"),
    [
        ("torch", "torch", "float32", 1e-5),
        ("jax", "torch", "float64", 1e-12),
        ("safetensors", "jax", "float32", 1e-5),
    ],
)
def test_checkpoint_of_any_format_is_evaluated(
    kind: str,
    framework: str,
    dtype: str,
    tolerance: float,
    config: Path,
    torch_run: Path,
    tmp_path: Path,
) -> None:
    run("parity.convert", torch_run / "checkpoints" / str(STEPS), tmp_path / "copy", "--to", kind)
    options = ("--config", config, "--train.dtype", dtype, "--data.dir", tmp_path / "tokens")
    # The shards are made on the way; what is printed is the object and nothing else.
    scores = json.loads(run(f"mooshak_{framework}.evaluate", tmp_path / "copy", *options, "--json"))
    last = json.loads((torch_run / "metrics.jsonl").read_text().splitlines()[-1])
    for language, score in scores.items():
        truth = last[f"bits_per_byte_{language}"]
        assert score["bits_per_byte"] == pytest.approx(truth, rel=tolerance)


def test_all_held_out_text_is_evaluated_on_request(torch_run: Path) -> None:
    checkpoint = torch_run / "checkpoints" / str(STEPS)
    shown = run("mooshak_torch.evaluate", "--evaluate.sequences", 0, checkpoint)
    tokens = [
        int(row.split("│")[2].replace(",", "")) for row in shown.splitlines() if " hi " in row
    ]
    manifest = json.loads((torch_run.parent / "tokens/hindi/manifest.json").read_text())
    held_out = sum(s["tokens"] for s in manifest["shards"] if s["split"] == "validation")
    assert tokens == [(held_out - 1) // 32 * 32]


def test_run_over_five_layouts_has_the_same_curve(
    config: Path, torch_run: Path, tmp_path: Path
) -> None:
    """DDP, FSDP2, a mesh of JAX, one process of torch, another mesh: one run directory."""
    ranks = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m")
    scanned = ("--model.scan_layers", "true")
    options = ("--config", config, "--run.dir", tmp_path / "run", "--checkpoint.keep", 9)
    for stop, framework, launcher, layout in (
        (2, "torch", ranks, ("--parallel.strategy", "ddp")),
        (4, "torch", ranks, ("--parallel.strategy", "fsdp")),
        (5, "jax", ("-m",), ("--mesh", "data=2,fsdp=2", *scanned)),
        (6, "torch", ("-m",), ()),
        (8, "jax", ("-m",), ("--mesh", "fsdp=4")),
    ):
        words = (*options, *layout, "--train.stop_after_step", stop)
        run(f"mooshak_{framework}.train", *words, launcher=launcher)
    pairs = zip(losses(tmp_path / "run"), losses(torch_run), strict=True)
    assert max(abs(loss / truth - 1) for loss, truth in pairs) < 1e-12
    # What the last checkpoint holds is what the run that stayed holds.
    for name, directory in (("moved", tmp_path / "run"), ("stayed", torch_run)):
        source = directory / "checkpoints" / str(STEPS)
        run("parity.convert", source, tmp_path / name, "--to", "safetensors")
    moved, stayed = (load_tensors(tmp_path / name) for name in ("moved", "stayed"))
    for key, truth in stayed.items():
        assert np.linalg.norm(moved[key] - truth) <= 1e-12 * np.linalg.norm(truth), key


def load_tensors(directory: Path) -> dict[str, np.ndarray]:
    """The tensors of an interchange directory, optimizer included."""
    return load_file(directory / "model.safetensors") | load_file(
        directory / "optimizer.safetensors"
    )


def refused(module: str, *arguments: object) -> str:
    """Run a command that must end with exit code 2 and one line; returns the line."""
    done = subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)], capture_output=True, text=True
    )
    assert done.returncode == 2, (done.returncode, done.stderr[-2000:])
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in done.stderr
    return lines[0]


def test_bad_input_ends_in_one_line(config: Path, tmp_path: Path) -> None:
    """In processes of their own; all other bad input is in test_bad_input.py."""
    here = ("--config", config, "--run.dir", tmp_path / "run")
    assert "did you mean train.steps" in refused("mooshak_torch.train", "--train.stepz", 3)
    divided = refused("mooshak_jax.train", *here, "--mesh", "data=3")
    assert "train.batch_size 4 is not divisible by mesh data=3" in divided
    on_three = (*here, "--mesh", "data=2", "--parallel.cpu_devices", 3)
    assert "data=2 does not divide the 3 devices" in refused("mooshak_jax.train", *on_three)
    assert not (tmp_path / "run").exists()
