"""Runs of an older version, with old keys and files, resume, evaluate and generate."""

import json
import shutil
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

from mooshak.checkpoints.init_from import resolve
from mooshak.config.parse import load_config, load_draft
from mooshak.errors import InputError
from mooshak.training.metrics import losses, read_metrics
from parity.convert import convert, open_any

OLD_RUNS = Path(__file__).parents[1] / "old_runs"
READERS = [("torch", "torch"), ("jax", "jax"), ("safetensors", "torch"), ("safetensors", "jax")]
"""Old run, and the framework that reads it."""
# Measured with the version that wrote the runs, in both frameworks.
LOSSES = {3: 5.7369757, 4: 5.7400284}
VALIDATION = {2: (5.7485824, 6.8048830), 4: (5.7222791, 6.7737466)}
"""Step -> validation loss, bits per byte."""
TEXT = "hehe6he6hehehe6hehehe"


@pytest.fixture(autouse=True)
def _in_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The paths in the records are relative."""
    shutil.copytree(OLD_RUNS, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")  # The torch commands set it for good.


@pytest.mark.slow
@pytest.mark.parametrize(("run", "framework"), READERS)
def test_old_run_resumes(run: str, framework: str) -> None:
    record = Path(run, "config.yaml").read_text()
    assert "clip_norm: 0.5" in record and "accumulation: 2" in record
    config = resolve(load_draft(f"{run}/config.yaml", ["--train.stop_after_step", "null"]))
    import_module(f"mooshak_{framework}.train").train(config)
    curve = losses(Path(run))
    assert list(curve) == [1, 2, 3, 4]
    assert {step: curve[step] for step in LOSSES} == pytest.approx(LOSSES, rel=1e-6)
    last = read_metrics(Path(run, "metrics.jsonl"))[-1]
    assert (last["validation_loss"], last["bits_per_byte_en"]) == pytest.approx(
        VALIDATION[4], rel=1e-6
    )
    # The record has the new keys now, and the checkpoint its tokenizer.
    assert "max_grad_norm: 0.5" in (record := Path(run, "config.yaml").read_text())
    assert "clip_norm" not in record and "final_fraction" not in record
    assert Path(run, "checkpoints/4/tokenizer.model").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(("run", "framework"), [("torch", "torch"), ("jax", "jax")])
def test_old_run_is_evaluated(
    run: str, framework: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["evaluate", f"{run}/checkpoints/2", "--json"])
    import_module(f"mooshak_{framework}.evaluate").main()
    scores = json.loads(capsys.readouterr().out)["en"]
    assert (scores["loss"], scores["bits_per_byte"]) == pytest.approx(VALIDATION[2], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("run", "framework"), READERS)
def test_old_run_generates(run: str, framework: str) -> None:
    path = f"{run}/checkpoints/2"
    lm = import_module(f"mooshak_{framework}").load(path)
    assert lm.generate("Once upon", max_new_tokens=12).text == TEXT


def test_old_run_converts_to_the_same_tensors() -> None:
    convert(Path("torch/checkpoints/2"), Path("again"), "safetensors")
    made, kept = open_any(Path("again")), open_any(Path("safetensors/checkpoints/2"))
    assert made.trainer_state == kept.trainer_state and made.has_optimizer
    for key in kept.tensors:
        assert np.array_equal(made.read(key), kept.read(key)), key


def test_old_record_is_translated_only_in_a_run() -> None:
    assert load_config("torch/config.yaml").optimizer.max_grad_norm == 0.5
    assert load_config("torch/config.yaml").train.gradient_accumulation_steps == 2
    shutil.copy("torch/config.yaml", "mine.yaml")  # No record: a user's file.
    with pytest.raises(InputError, match="was renamed; use "):
        load_draft("mine.yaml")
