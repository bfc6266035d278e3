"""The dpo commands: resumed in the other framework, validated, references computed once or live."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mooshak.checkpoints import safetensors
from tests.drawn_checkpoints import drawn_checkpoint

pytestmark = pytest.mark.slow

PAIRS = [
    {"prompt": f"What is {i} + {j}? ", "chosen": str(i + j), "rejected": str(i + j + 1 + j % 2)}
    for i in range(6)
    for j in range(6)
]
STEPS = 4


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    here = tmp_path_factory.mktemp("pairs")
    write(here / "pairs.jsonl", PAIRS)
    (here / "dpo.yaml").write_text(f"""
data:
  validation_fraction: 0.2
  sources: [{{name: sums, kind: jsonl, path: "{here}/pairs.jsonl"}}]
dpo: {{beta: 0.5}}
optimizer: {{learning_rate: 1.0e-3}}
schedule: {{warmup_steps: 1}}
train: {{steps: {STEPS}, batch_size: 4, sequence_length: 64, dtype: float64}}
checkpoint: {{every: 2}}
evaluate: {{every: 2, batch_size: 2}}
run: {{progress: false, tensorboard: false}}
""")
    return here / "dpo.yaml"


def write(path: Path, records: list[dict]) -> None:
    path.write_text("\n".join(map(json.dumps, records)))


def dpo(framework: str, config: Path, directory: Path, *options: object, code: int = 0) -> str:
    """Run the command; returns what it writes to standard error."""
    command = [sys.executable, "-m", f"mooshak_{framework}.dpo", "--config", str(config)]
    command += ["--run.dir", str(directory), *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stderr[-3000:]
    return done.stderr


def lines(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(config: Path, tiny_checkpoint: Path) -> list[dict]:
    """The metrics of a run in torch with a reference that is computed once."""
    run = config.parent / "whole"
    assert "30 preference pairs, 6 more held out" in dpo(
        "torch", config, run, "--init.from", tiny_checkpoint
    )
    return lines(run)


def assert_equal(ours: list[dict], theirs: list[dict]) -> None:
    """Both runs have the same curves, those of validation included."""
    compared = 0
    for a, b in zip(ours, theirs, strict=True):
        names = b.keys() - ("learning_rate", "memory_bytes", "tokens_per_second", "time")
        if b["step"] == 1:
            names -= {"rewards/accuracies"}  # Of margins that are zero but for rounding.
        for name in names:
            assert abs(a[name] - b[name]) <= 1e-11 * max(abs(b[name]), 1e-2), (b["step"], name)
            compared += name.startswith("validation_")
    assert compared == 12


def test_run_resumes_in_the_other_framework(
    config: Path, tiny_checkpoint: Path, tmp_path: Path, whole: list[dict]
) -> None:
    start = ("--init.from", tiny_checkpoint)
    assert abs(whole[0]["loss"] - np.log(2)) < 1e-12 < abs(whole[1]["loss"] - np.log(2))
    assert whole[-1]["rewards/margins"] != 0 <= whole[-1]["rewards/accuracies"] <= 1
    parts = tmp_path / "parts"
    dpo("jax", config, parts, *start, "--train.stop_after_step", 2, "--mesh", "data=2,fsdp=2")
    reference = (parts / "reference.json").read_bytes()
    dpo("torch", config, parts, *start)
    assert (parts / "reference.json").read_bytes() == reference
    assert_equal(lines(parts), whole)
    last = lines(parts)[-1]
    assert last["validation_loss"] != last["loss"]
    assert last["validation_rewards/accuracies"] == last["validation_rewards/accuracies_en"]


def test_live_reference_equals_the_precomputed_one(
    config: Path, tiny_checkpoint: Path, tmp_path: Path, whole: list[dict]
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_checkpoint, base)
    run, parts = tmp_path / "run", "--train.gradient_accumulation_steps"
    options = ("--init.from", base, "--dpo.precompute_reference", "false", parts, 2)
    dpo("torch", config, run, *options, "--train.stop_after_step", 2)
    dpo("jax", config, run, *options, "--mesh", "fsdp=2")
    assert_equal(lines(run), whole)
    # The reference of a resumed run is read again: another checkpoint is noticed.
    source = safetensors.open_checkpoint(tiny_checkpoint)
    shutil.rmtree(base)
    other = drawn_checkpoint(source.model, 2, tokenizer_files=source.tokenizer_files)
    safetensors.write_checkpoint(base, other)
    more = ("--train.steps", STEPS + 2, "--schedule.total_steps", STEPS)
    last = dpo("torch", config, run, *options, *more, code=2)
    assert "is not the reference that this run began with" in last


def test_kto_reads_answers_with_labels(config: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    records = [
        {"prompt": one["prompt"], "completion": one[key], "label": key == "chosen"}
        for i, one in enumerate(PAIRS)
        for key in (("chosen", "rejected") if i % 2 else ("chosen",))
    ]
    write(tmp_path / "answers.jsonl", records)
    text = config.read_text().replace(f"{config.parent}/pairs.jsonl", f"{tmp_path}/answers.jsonl")
    (tmp_path / "kto.yaml").write_text(text)
    options = ("--init.from", tiny_checkpoint, "--dpo.loss", "kto")
    for framework in ("torch", "jax"):
        dpo(framework, tmp_path / "kto.yaml", tmp_path / framework, *options)
    ours, theirs = lines(tmp_path / "torch"), lines(tmp_path / "jax")
    assert ours[0]["loss"] == pytest.approx(0.5, abs=1e-12) and ours[0]["kl"] < 1e-12
    for a, b in zip(ours, theirs, strict=True):
        assert abs(a["loss"] / b["loss"] - 1) < 1e-12
    for name in ("validation_loss", "validation_kl", "validation_rewards/accuracies"):
        assert ours[1][name] == pytest.approx(theirs[1][name], rel=1e-11)


def test_adapters_are_trained_against_their_base(
    config: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    options = ("--init.from", tiny_checkpoint, "--lora.rank", 2, "--lora.dora", "true")
    live = ("--dpo.precompute_reference", "false")
    dpo("torch", config, tmp_path / "torch", *options)
    dpo("jax", config, tmp_path / "jax", *options, *live)
    dpo("torch", config, tmp_path / "live", *options, *live, "--train.stop_after_step", 2)
    ours = lines(tmp_path / "torch")
    assert abs(ours[0]["loss"] - np.log(2)) < 1e-12 < abs(ours[1]["loss"] - np.log(2))
    assert_equal(lines(tmp_path / "jax"), ours)
    assert [one["loss"] for one in lines(tmp_path / "live")] == [one["loss"] for one in ours[:2]]
    wrong = dpo(
        "torch",
        config,
        tmp_path / "more",
        *options,
        *live,
        "--lora.modules_to_save",
        "[norms]",
        code=2,
    )
    assert "lora.modules_to_save changes the base model" in wrong
    path = tmp_path / "torch" / "checkpoints" / str(STEPS)
    wrong = dpo("torch", config, tmp_path / "more", "--init.from", path, *live, code=2)
    assert "has adapters, so it is not its base" in wrong


def test_wrong_pairs_and_lost_references_are_named(
    config: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    def fails(records: list[dict], *options: object) -> str:
        write(tmp_path / "other.jsonl", records)
        text = config.read_text().replace(f"{config.parent}/pairs.jsonl", f"{tmp_path}/other.jsonl")
        (tmp_path / "other.yaml").write_text(text)
        options = ("--init.from", tiny_checkpoint, *options)
        last = dpo("torch", tmp_path / "other.yaml", tmp_path / "run", *options, code=2)
        return last.splitlines()[-1]

    same = PAIRS[0] | {"rejected": PAIRS[0]["chosen"]}
    assert "chosen equals rejected" in fails([*PAIRS, same])
    assert "is not a pair; dpo needs" in fails([{"prompt": "a", "completion": "b"}])
    long = PAIRS[0] | {"prompt": "What is it? " * 40}
    assert "no label in half of train.sequence_length 64" in fails([*PAIRS, long])
    assert "no label" not in dpo(
        "torch",
        tmp_path / "other.yaml",
        tmp_path / "run",
        *("--init.from", tiny_checkpoint, "--dpo.max_skipped", 1, "--train.stop_after_step", 2),
    )
    reference = tmp_path / "run" / "reference.json"
    saved = reference.read_text()
    reference.unlink()
    more = ("--init.from", tiny_checkpoint, "--dpo.max_skipped", 1)
    lost = dpo("torch", tmp_path / "other.yaml", tmp_path / "run", *more, code=2)
    assert "the reference of this run is lost" in lost
    reference.write_text(saved.replace('"pairs": "', '"pairs": "0'))
    other = dpo("torch", tmp_path / "other.yaml", tmp_path / "run", *more, code=2)
    assert "belongs to other preference pairs" in other
