"""The dpo commands: resumed in the other framework, with a reference that is computed once."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

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
data: {{sources: [{{name: sums, kind: jsonl, path: "{here}/pairs.jsonl"}}]}}
dpo: {{beta: 0.5}}
optimizer: {{learning_rate: 1.0e-3}}
schedule: {{warmup_steps: 1}}
train: {{steps: {STEPS}, batch_size: 4, sequence_length: 64, dtype: float64}}
checkpoint: {{every: 2}}
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


def test_run_resumes_in_the_other_framework(
    config: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    start = ("--init.from", tiny_checkpoint)
    assert "36 preference pairs" in dpo("torch", config, tmp_path / "whole", *start)
    whole = lines(tmp_path / "whole")
    assert abs(whole[0]["loss"] - np.log(2)) < 1e-12 < abs(whole[1]["loss"] - np.log(2))
    assert whole[-1]["rewards/margins"] != 0 <= whole[-1]["rewards/accuracies"] <= 1
    parts = tmp_path / "parts"
    dpo("jax", config, parts, *start, "--train.stop_after_step", 2, "--mesh", "data=2,fsdp=2")
    reference = (parts / "reference.json").read_bytes()
    dpo("torch", config, parts, *start)
    assert (parts / "reference.json").read_bytes() == reference
    for ours, theirs in zip(lines(parts), whole, strict=True):
        for name in ("loss", "grad_norm", "rewards/chosen", "rewards/margins"):
            assert abs(ours[name] - theirs[name]) <= 1e-11 * max(abs(theirs[name]), 1e-2), name


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


def test_adapters_are_trained_against_their_base(
    config: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    options = ("--init.from", tiny_checkpoint, "--lora.rank", 2, "--lora.dora", "true")
    for framework in ("torch", "jax"):
        dpo(framework, config, tmp_path / framework, *options)
    ours, theirs = lines(tmp_path / "torch"), lines(tmp_path / "jax")
    assert abs(ours[0]["loss"] - np.log(2)) < 1e-12
    for a, b in zip(ours, theirs, strict=True):
        assert abs(a["loss"] / b["loss"] - 1) < 1e-12


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
