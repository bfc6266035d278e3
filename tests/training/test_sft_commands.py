"""The sft commands: equal in both frameworks and on layouts, resumed in either, from HF models."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from parity.convert import convert
from tests.conftest import ENGLISH, HINDI
from tests.distributed.ranks import assert_same, metrics

pytestmark = pytest.mark.slow

STEPS = 6


@pytest.fixture(scope="module")
def config(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration with conversations of one and two turns, and the checkpoint to start from."""
    here, random_ = tmp_path_factory.mktemp("sft"), random.Random(0)
    for language, words in (("hi", HINDI), ("en", ENGLISH)):
        lines = []
        for number in range(90):
            turns = [" ".join(random_.choices(words, k=random_.randint(2, 7))) for _ in range(4)]
            roles = ("user", "assistant") * 2
            messages = [{"role": r, "content": c} for r, c in zip(roles, turns, strict=True)]
            lines.append(json.dumps({"messages": messages[: 2 + 2 * (number % 2)]}))
        (here / f"{language}.jsonl").write_text("\n".join(lines))
    (here / "sft.yaml").write_text(f"""
init: {{from: {tiny_checkpoint}}}
data:
  format: conversations
  validation_fraction: 0.1
  sources:
    - {{name: hindi, kind: jsonl, language: hi, path: "{here}/hi.jsonl"}}
    - {{name: english, kind: jsonl, language: en, path: "{here}/en.jsonl"}}
optimizer: {{learning_rate: 1.0e-2}}
schedule: {{warmup_steps: 2}}
train: {{steps: {STEPS}, batch_size: 4, dtype: float64}}
checkpoint: {{every: 3, keep: 2}}
evaluate: {{every: 3, sequences: 6, batch_size: 4}}
run: {{progress: false, tensorboard: false}}
""")
    return here / "sft.yaml"


def run(module: str, *arguments: object, launcher: tuple[str, ...] = ("-m",)) -> str:
    """Run a command; return its standard error. Fails with it."""
    words = [sys.executable, *launcher, module, *map(str, arguments)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


@pytest.fixture(scope="module")
def torch_run(config: Path) -> Path:
    """The uninterrupted run in PyTorch."""
    said = run("mooshak_torch.sft", "--config", config, "--run.dir", config.parent / "torch")
    assert "180 conversations, 180 samples," in said and "an epoch is" in said
    return config.parent / "torch"


def test_run_learns_and_evaluates_both_languages(torch_run: Path) -> None:
    losses = metrics(torch_run)
    assert len(losses) == STEPS and losses[-1] < 0.98 * losses[0]
    assert len(metrics(torch_run, "bits_per_byte_hi")) == 2
    assert len(metrics(torch_run, "validation_loss")) == 2


def test_jax_has_the_same_curve(config: Path, torch_run: Path) -> None:
    here = config.parent / "jax"
    run("mooshak_jax.sft", "--config", config, "--run.dir", here)
    assert_same(here, torch_run)


def test_resume_has_the_same_bits_and_crosses_frameworks(config: Path, torch_run: Path) -> None:
    here = config.parent / "resumed"
    first = ("--config", config, "--run.dir", here, "--train.stop_after_step", 3)
    run("mooshak_torch.sft", *first)
    other = config.parent / "crossed"
    run("mooshak_jax.sft", "--config", config, "--run.dir", other, "--train.stop_after_step", 3)
    run("mooshak_torch.sft", "--config", here / "config.yaml", "--train.stop_after_step", STEPS)
    assert metrics(here) == metrics(torch_run)
    last = f"checkpoints/{STEPS}"
    convert(here / last, here / "a", "safetensors")
    convert(torch_run / last, here / "b", "safetensors")
    for name in ("model", "optimizer"):
        ours, theirs = (load_file(here / x / f"{name}.safetensors") for x in "ab")
        assert all(ours[key].tobytes() == theirs[key].tobytes() for key in theirs)
    run("mooshak_torch.sft", "--config", other / "config.yaml", "--train.stop_after_step", STEPS)
    assert_same(other, torch_run)


@pytest.mark.parametrize(
    ("module", "launcher", "options"),
    [
        ("mooshak_torch", 2, ("--train.gradient_accumulation_steps", 2)),
        ("mooshak_jax", 0, ("--mesh", "data=2,fsdp=2,tensor=2")),
    ],
    ids=["DDP", "JAX mesh"],
)
def test_layouts_have_the_same_curve(
    module: str, launcher: int, options: tuple, config: Path, torch_run: Path, tmp_path: Path
) -> None:
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m")
    words = ("--config", config, "--run.dir", tmp_path / "run", *options)
    run(f"{module}.sft", *words, launcher=torchrun if launcher else ("-m",))
    assert_same(tmp_path / "run", torch_run)


def test_deepspeed_starts_from_a_checkpoint(config: Path, torch_run: Path, tmp_path: Path) -> None:
    """In float32, which DeepSpeed computes in."""
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m")
    words = ("--config", config, "--train.dtype", "float32", "--train.steps", 2, "--run.dir")
    zero = ("--parallel.strategy", "deepspeed", "--parallel.zero_stage", 3)
    run("mooshak_torch.sft", *words, tmp_path / "zero", *zero, launcher=torchrun)
    run("mooshak_torch.sft", *words, tmp_path / "single")
    assert_same(tmp_path / "zero", tmp_path / "single", 2e-5)


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_bad_conversation_is_one_line(framework: str, config: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"messages": [{"role": "boss", "content": "a"}]}')
    sources = f"[{{name: a, kind: jsonl, path: {tmp_path}/a.jsonl}}]"
    words = ("--config", str(config), "--run.dir", str(tmp_path / "run"), "--data.sources", sources)
    command = [sys.executable, "-m", f"mooshak_{framework}.sft", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and done.stdout == ""
    start = f"error: {tmp_path}/a.jsonl, line 1, message 1 of messages: the role 'boss' is unknown"
    assert done.stderr.startswith(start) and done.stderr.count("\n") == 1
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_hugging_face_directory_is_a_start(
    config: Path, tiny_checkpoint: Path, torch_run: Path, tmp_path: Path
) -> None:
    convert(tiny_checkpoint, tmp_path / "hf", "hf")
    for framework in ("torch", "jax"):
        here = tmp_path / framework
        words = ("--config", config, "--init.from", tmp_path / "hf", "--train.steps", 2)
        run(f"mooshak_{framework}.sft", *words, "--run.dir", here, "--sft.packing", "none")
    assert_same(tmp_path / "torch", tmp_path / "jax")
    assert metrics(tmp_path / "torch")[0] == pytest.approx(metrics(torch_run)[0], rel=0.1)
