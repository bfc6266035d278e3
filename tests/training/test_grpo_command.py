"""The grpo commands: samples of either framework, resumed among their updates, refused rewards."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.distributed.test_jax_processes import finish, start

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("compiled_in_haste")]

PROMPTS = [
    {"prompt": f"{i} + {j} = ", "answer": str(i + j), "n": i} for i in range(6) for j in range(6)
]
STEPS = 4
REWARD = "tests.training.reward_functions"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    here = tmp_path_factory.mktemp("prompts")
    (here / "prompts.jsonl").write_text("\n".join(map(json.dumps, PROMPTS)))
    (here / "grpo.yaml").write_text(f"""
data:
  validation_fraction: 0.3
  sources: [{{name: sums, kind: jsonl, path: "{here}/prompts.jsonl"}}]
grpo: {{reward: "{REWARD}:odd", num_generations: 4, num_iterations: 2, max_completion_length: 7,
  temperature: 1.3, top_p: 0.95, rollout_batch_size: 4}}
optimizer: {{learning_rate: 1.0e-3}}
schedule: {{warmup_steps: 1}}
train: {{steps: {STEPS}, batch_size: 8, sequence_length: 64, dtype: float64}}
checkpoint: {{every: 1, keep: 10}}
evaluate: {{every: {STEPS}}}
run: {{progress: false, tensorboard: false}}
""")
    return here / "grpo.yaml"


def grpo(
    framework: str,
    config: Path,
    directory: Path,
    *options: object,
    code: int = 0,
    launcher: tuple[str, ...] = ("-m",),
) -> str:
    """Run the command; returns what it writes to standard error."""
    command = [sys.executable, *launcher, f"mooshak_{framework}.grpo", "--config", str(config)]
    command += ["--run.dir", str(directory), *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stderr[-3000:]
    return done.stderr


def lines(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def samples(directory: Path, step: int) -> list[dict[str, Any]]:
    path = directory / "rollouts" / f"{step}.jsonl"
    return [json.loads(line) for line in path.read_text().split("\n") if line]


NAMES = ("loss", "grad_norm", "reward", "clip_ratio/high_mean", "entropy")


def assert_equal(ours: Path, theirs: Path, tolerance: float) -> None:
    for a, b in zip(lines(ours), lines(theirs), strict=True):
        for name in NAMES:
            assert abs(a[name] - b[name]) <= tolerance * max(abs(b[name]), 1e-2), name


@pytest.fixture(scope="module")
def whole(config: Path, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in torch."""
    directory = tmp_path_factory.mktemp("torch") / "run"
    said = grpo("torch", config, directory, "--init.from", tiny_checkpoint)
    assert "prompts, " in said and "2 with 4 samples each a rollout" in said
    return directory


def test_run_learns_from_its_samples(whole: Path) -> None:
    first, second = samples(whole, 0), samples(whole, 2)
    assert len(first) == 8 and first[0]["prompt_ids"] != second[0]["prompt_ids"]
    for one in first:
        assert one["is_truncated"] == (
            len(one["completion_ids"]) == 7 and one["completion_ids"][-1] != 2
        )
        assert len(one["old_log_probs"]) == len(one["completion_ids"]) > 0
    steps = lines(whole)
    # The ratio is 1 at the first update, so the loss is minus the mean advantage of the tokens.
    mean = np.concatenate([[one["advantage"]] * len(one["completion_ids"]) for one in first]).mean()
    assert abs(steps[0]["loss"] + mean) < 1e-12
    assert abs(steps[1]["loss"] + mean) > 1e-9
    assert steps[0]["clip_ratio/low_mean"] == 0
    assert 0 <= steps[-1]["validation_reward"] <= 1
    assert steps[0]["reward"] == steps[1]["reward"] != steps[2]["reward"]


def test_rewarded_tokens_become_frequent(
    config: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    options = {
        "grpo.num_iterations": 1,
        "grpo.temperature": 1.0,
        "grpo.top_p": 1.0,
        "grpo.num_generations": 16,
        "grpo.rollout_batch_size": 64,
        "optimizer.learning_rate": 3e-2,
        "schedule.kind": "constant",
        "train.steps": 14,
        "train.batch_size": 64,
        "train.dtype": "float32",
        "checkpoint.every": 14,
        "evaluate.every": 14,
    }
    words = [f"--{name}={value}" for name, value in options.items()]
    grpo("torch", config, tmp_path, "--init.from", tiny_checkpoint, *words)
    steps = lines(tmp_path)
    rewards = [line["reward"] for line in steps]
    # Half of the tokens are odd at first. The most that 7 tokens can have is 7 / 8.
    assert max(rewards[:3]) < 0.6 and min(rewards[-3:]) > 0.8, rewards
    assert steps[-1]["validation_reward"] > 0.8


def test_resume_among_updates_is_exact(
    config: Path, tiny_checkpoint: Path, whole: Path, tmp_path: Path
) -> None:
    start, parts = ("--init.from", tiny_checkpoint), tmp_path / "parts"
    grpo("torch", config, parts, *start, "--train.stop_after_step", 1)
    saved = (parts / "rollouts" / "0.jsonl").read_bytes()
    assert saved == (whole / "rollouts" / "0.jsonl").read_bytes()
    grpo("torch", config, parts, *start)
    assert (parts / "rollouts" / "0.jsonl").read_bytes() == saved
    assert_equal(parts, whole, 0)
    (parts / "rollouts" / "2.jsonl").unlink()
    shutil.rmtree(parts / "checkpoints" / "4")
    lost = grpo("torch", config, parts, *start, code=2)
    assert "2.jsonl is missing: the run resumes among the updates on its samples" in lost


def test_frameworks_sample_the_same_and_take_turns(
    config: Path, tiny_checkpoint: Path, whole: Path, tmp_path: Path
) -> None:
    start = ("--init.from", tiny_checkpoint)
    # Samples of the other framework: the curve is that of one, to the last bit.
    other = tmp_path / "other"
    grpo("torch", config, other, *start, "--grpo.rollout_framework", "jax")
    assert_equal(other, whole, 0)
    # A mesh of JAX, resumed in torch between the two updates on one rollout.
    turns = tmp_path / "turns"
    grpo("jax", config, turns, *start, "--train.stop_after_step", 3, "--mesh", "data=2,fsdp=2")
    grpo("torch", config, turns, *start)
    assert_equal(turns, whole, 1e-11)
    script = [sys.executable, "scripts/compare_rollouts.py", str(whole), str(turns)]
    done = subprocess.run(script, capture_output=True, text=True, timeout=100)
    rows = [re.findall(r"\d+", line) for line in done.stdout.splitlines()]
    assert ["0", "8", "0"] in rows and ["2", "8", "0"] in rows, done.stdout + done.stderr


def test_sharded_weights_are_gathered(
    config: Path, tiny_checkpoint: Path, whole: Path, tmp_path: Path
) -> None:
    """On two processes, of which the first samples, with two micro-batches, and a reference."""
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m")
    more = ("--train.gradient_accumulation_steps", 2, "--mesh", "fsdp=2")
    options = ("--init.from", tiny_checkpoint, *more)
    grpo("torch", config, tmp_path / "two", *options, launcher=torchrun)
    assert_equal(tmp_path / "two", whole, 1e-11)


def test_two_jax_processes_sample_as_one(
    config: Path, tiny_checkpoint: Path, whole: Path, tmp_path: Path
) -> None:
    words = ("--config", config, "--init.from", tiny_checkpoint, "--run.dir", tmp_path / "two")
    finish(start("mooshak_jax.grpo", *words, "--mesh", "data=2,fsdp=2"))
    assert_equal(tmp_path / "two", whole, 1e-11)


def test_reference_is_the_initial_model(
    config: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """With adapters: the model without them."""
    adapters = ("--lora.rank", 2, "--grpo.beta", 0.5, "--grpo.rollout_framework", "torch")
    for framework in ("torch", "jax"):
        options = ("--init.from", tiny_checkpoint, *adapters)
        grpo(framework, config, tmp_path / framework, *options)
    ours, theirs = lines(tmp_path / "torch"), lines(tmp_path / "jax")
    assert ours[0]["kl"] < 1e-12 and ours[-1]["kl"] > 1e-6
    for a, b in zip(ours, theirs, strict=True):
        for name in ("loss", "kl", "reward"):
            assert abs(a[name] - b[name]) <= 1e-11 * max(abs(b[name]), 1e-2), name


def test_wrong_rewards_and_prompts_are_named(
    config: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    def fails(*options: object) -> str:
        start = ("--init.from", tiny_checkpoint, *options)
        return grpo("torch", config, tmp_path / "run", *start, code=2).splitlines()[-1]

    nan = fails("--grpo.reward", f"{REWARD}:nan")
    assert ":nan is nan, not a number, for sample 0 of the prompt at" in nan
    assert "prompts.jsonl, line" in nan
    assert "cannot be imported" in fails("--grpo.reward", f"{REWARD}:absent")
    assert "is not MODULE:FUNCTION" in fails("--grpo.reward", "rewards")
    assert "is not divisible by grpo.num_generations" in fails("--grpo.num_generations", 3)
    long = fails("--grpo.max_completion_length", 63)
    assert "more than train.sequence_length 64 (prompts left out: 1, grpo.max_skipped is 0)" in long


def test_equal_rewards_give_no_gradient(
    config: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    options = ("--init.from", tiny_checkpoint, "--grpo.reward", f"{REWARD}:equal")
    grpo("torch", config, tmp_path, *options, "--train.stop_after_step", 2)
    for step in lines(tmp_path):
        assert step["frac_reward_zero_std"] == 1 and step["reward"] == 0.25
        assert step["loss"] == 0 == step["grad_norm"]
