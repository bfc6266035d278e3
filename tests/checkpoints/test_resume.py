"""Resume: the checkpoint that a run continues from, and those that are refused."""

import json
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mooshak.checkpoints import base
from mooshak.checkpoints.manager import complete_steps
from mooshak.checkpoints.resume import (
    check_resume,
    check_tokenizer,
    loss_scale_of,
    n_updates,
    rate_change,
    resume_from,
    trainer_state,
)
from mooshak.config.sections import Config, ScheduleConfig
from mooshak.errors import InputError


def checkpoint(directory: Path, step: int) -> Path:
    """A directory that has the names of a checkpoint."""
    path = directory / str(step)
    path.mkdir(parents=True)
    (path / "model.safetensors").touch()
    state = {"format_version": 1, "step": step}
    (path / "trainer_state.json").write_text(json.dumps(state))
    return path


@pytest.fixture
def run(tiny_config: Config, tmp_path: Path) -> tuple[Config, Path]:
    """A configuration and the empty folder of its checkpoints."""
    config = replace(tiny_config, run=replace(tiny_config.run, dir=str(tmp_path / "run")))
    return config, tmp_path / "run" / "checkpoints"


def test_resume_takes_the_newest_complete_one(run: tuple[Config, Path]) -> None:
    config, directory = run
    assert resume_from(config, "auto") is None
    for step in (9, 100, 20):
        checkpoint(directory, step)
    # Numbers, not their digits, are compared; these are incomplete or not a step.
    (directory / "200").mkdir()
    (directory / "300.bak").mkdir()
    (directory / ".400.writing").mkdir()
    assert complete_steps(directory) == [9, 20, 100]
    assert resume_from(config, "auto") == directory / "100"


def test_resume_never_needs_an_empty_run(run: tuple[Config, Path]) -> None:
    config, directory = run
    assert resume_from(config, "never") is None
    checkpoint(directory, 9)
    with pytest.raises(InputError, match="holds checkpoints up to step 9"):
        resume_from(config, "never")


def test_resume_from_a_path(run: tuple[Config, Path], tmp_path: Path) -> None:
    config, directory = run
    elsewhere = checkpoint(tmp_path / "elsewhere", 9)
    assert resume_from(config, str(elsewhere)) == elsewhere
    checkpoint(directory, 9)
    assert resume_from(config, str(elsewhere)) == elsewhere
    checkpoint(directory, 10)
    with pytest.raises(InputError, match="holds checkpoints up to step 10"):
        resume_from(config, str(elsewhere))
    with pytest.raises(InputError, match="there is no checkpoint directory /nowhere"):
        resume_from(config, "/nowhere")


def source_of(config: Config, state: dict[str, Any] | None, has_optimizer: bool = True) -> Any:
    return SimpleNamespace(
        path="P", model=config.model, trainer_state=state, has_optimizer=has_optimizer
    )


def test_resume_continues_the_same_run(tiny_config: Config) -> None:
    state = trainer_state(tiny_config, 3, "torch", "t", 1.5, 2, "fsdp=2")
    assert (state["validation_loss"], state["validation_step"]) == (1.5, 3)
    assert check_resume(tiny_config, source_of(tiny_config, state), "t") == 3
    # Through JSON, as it is stored; more steps, other hardware and precision are allowed.
    state = json.loads(json.dumps(state))
    longer = replace(tiny_config, train=replace(tiny_config.train, steps=99, dtype="bfloat16"))
    assert check_resume(longer, source_of(tiny_config, state), "t") == 3
    done = replace(tiny_config, train=replace(tiny_config.train, steps=3))
    assert check_resume(done, source_of(tiny_config, state), "t") == 3
    del state["validation_step"]  # As older versions wrote it.
    assert check_resume(tiny_config, source_of(tiny_config, state), "t") == 3


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("run", {"seed": 7}, "written with seed 0, this run has 7"),
        ("train", {"batch_size": 4}, "written with batch_size 8, this run has 4"),
        ("train", {"sequence_length": 16}, "written with sequence_length 32, this run has 16"),
        ("train", {"steps": 2}, "is at step 3, after train.steps 2"),
        ("data", {"validation_fraction": 0.5}, "written with validation_fraction 0.2"),
        ("model", {"hidden_dim": 40}, "its hidden_dim is 48, the configuration's is 40"),
    ],
)
def test_resume_of_another_run_is_refused(
    section: str, change: dict[str, Any], message: str, tiny_config: Config
) -> None:
    source = source_of(tiny_config, trainer_state(tiny_config, 3, "torch", "t", None))
    changed = {section: replace(getattr(tiny_config, section), **change)}
    with pytest.raises(InputError, match=message):
        check_resume(replace(tiny_config, **changed), source, "t")


def test_resume_needs_tokenizer_and_optimizer(tiny_config: Config) -> None:
    state = trainer_state(tiny_config, 3, "torch", "t", None)
    with pytest.raises(InputError, match="written with tokenizer t, this run has u"):
        check_resume(tiny_config, source_of(tiny_config, state), "u")
    for source in (source_of(tiny_config, None), source_of(tiny_config, state, False)):
        with pytest.raises(InputError, match="P has only weights"):
            check_resume(tiny_config, source, "t")


def test_resume_compares_the_document_mask(tiny_config: Config) -> None:
    """States written before the key existed are those of runs without document masks."""
    plain = tiny_config
    masked = replace(plain, data=replace(plain.data, document_mask=True))
    states = [trainer_state(config, 3, "torch", "t", None) for config in (plain, masked)]
    assert "document_mask" not in states[0]["data"] and states[1]["data"]["document_mask"] is True
    for config in (plain, masked):
        for state, same in zip(states, (config is plain, config is masked), strict=True):
            source: Any = SimpleNamespace(
                path="P", model=config.model, trainer_state=state, has_optimizer=True
            )
            if same:
                assert check_resume(config, source, "t") == 3
            else:
                refused = r"P was written with document_mask (True|False)"
                with pytest.raises(InputError, match=refused):
                    check_resume(config, source, "t")


def test_updates_are_the_steps_without_the_skipped_ones() -> None:
    """Bias correction would otherwise be wrong after a resume in another dtype or framework."""
    state = {"step": 30, "loss_scale": {"scale": 4.0, "clean": 1, "skipped": 14}}
    assert n_updates(state) == 16 and n_updates({"step": 30}) == 30
    assert loss_scale_of(state) == {"loss_scale": state["loss_scale"]}
    assert loss_scale_of({"step": 30}) == loss_scale_of(None) == {}


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_float16_state_is_resumed_with_its_updates(
    framework: str, tiny_config: Config, tmp_path: Path
) -> None:
    """In float32: the state of the optimizer, and what the next checkpoint records."""
    config = replace(tiny_config, run=replace(tiny_config.run, dir=str(tmp_path / "run")))
    model = config.model
    state = {"step": 30, "loss_scale": {"scale": 4.0, "clean": 1, "skipped": 14}}
    shapes = model.parameter_shapes()
    shapes |= {f"{moment}.{name}": shapes[name] for moment in base.MOMENTS for name in [*shapes]}
    tensors = {key: (np.dtype(np.float32), shape) for key, shape in shapes.items()}

    def read(key: str, rows: slice = base.FULL_SLICE) -> np.ndarray:
        return np.ones(tensors[key][1], np.float32)[rows]

    source = base.Checkpoint(tmp_path, "torch", model, state, tensors, read)
    trainer = import_module(f"mooshak_{framework}.step").Trainer(config)
    trainer.restore(source)
    if framework == "torch":
        steps = {int(s["step"]) for s in trainer.optimizer.inner.state.values()}
    else:
        steps = {int(trainer.state["step"])}
    assert steps == {16}
    assert trainer.trainer_state() == {"loss_scale": state["loss_scale"]}


def shards_of(documents: int, sha256: str = "a", shard_tokens: int = 100) -> dict[str, Any]:
    """The description of a source of fifty tokens for each document."""
    counts = {"documents": documents, "tokens": 50 * documents}
    return {"en": {**counts, "shard_tokens": shard_tokens, "sha256": sha256}}


@pytest.mark.parametrize(
    ("shards", "message"),
    [
        (shards_of(9), r"with 7 documents \(350 tokens\) of source en, this run has 9 documents"),
        (shards_of(7, "b"), "with other text of source en"),
        (shards_of(7), ""),
        (shards_of(7, "b", shard_tokens=200), ""),  # The same text in other files.
    ],
)
def test_resume_with_other_text_is_refused(
    shards: dict[str, Any], message: str, tiny_config: Config
) -> None:
    state = trainer_state(tiny_config, 3, "torch", "t", None, shards=shards_of(7))
    source = source_of(tiny_config, json.loads(json.dumps(state)))
    assert check_resume(tiny_config, source, "t", shards, allow_data_change=True) == 3
    if not message:
        assert check_resume(tiny_config, source, "t", shards) == 3
        return
    with pytest.raises(InputError, match=f"written {message}.*; --allow_data_change resumes"):
        check_resume(tiny_config, source, "t", shards)
    for key in ("shards", "cleaning"):  # As older versions wrote it.
        del source.trainer_state["data"][key]
    assert check_resume(tiny_config, source, "t", shards) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"deduplicate": False}, "with data.deduplicate True, this run has False"),
        ({"validation_fraction": 0.5}, "with validation_fraction 0.2, this run has 0.5"),
        ({"sources": "path"}, r"with path of data.sources\[hi\] .*/hi.jsonl, this run has moved"),
        ({"sources": "one"}, "with data.sources hi, en, this run has en"),
    ],
)
def test_other_data_are_named_and_allowed(
    change: dict[str, Any], message: str, tiny_config: Config
) -> None:
    state = trainer_state(tiny_config, 3, "torch", "t", None)
    first, second = tiny_config.data.sources
    others = {"path": [replace(first, path="moved"), second], "one": [second]}
    if "sources" in change:
        change = {"sources": others[change["sources"]]}
    config = replace(tiny_config, data=replace(tiny_config.data, **change))
    with pytest.raises(InputError, match=f"P was written {message}"):
        check_resume(config, source_of(config, state), "t")
    assert check_resume(config, source_of(config, state), "t", allow_data_change=True) == 3
    with pytest.raises(InputError, match="written with tokenizer t, this run has u"):
        check_resume(config, source_of(config, state), "u", allow_data_change=True)


def test_changed_learning_rate_is_said(tiny_config: Config) -> None:
    """More steps stretch the schedule, and raise the rate of the next step."""
    sizes = {
        "train": replace(tiny_config.train, steps=100),
        "schedule": ScheduleConfig("cosine", 0),
    }
    config = replace(tiny_config, **sizes)
    state = trainer_state(config, 75, "torch", "t", None)
    assert rate_change(config, state) == "" == rate_change(config, None)
    longer = replace(
        config, train=replace(config.train, steps=300), schedule=ScheduleConfig("cosine", 0)
    )
    # Three quarters of a cosine from 1 to 0.1, and a quarter, of the peak 3e-4.
    assert rate_change(longer, state) == (
        "the learning rate of step 76 is 0.00026, not 6.95e-05: schedule.total_steps was 100 and "
        "is 300 (--schedule.total_steps 100 restores it)"
    )
    kept = replace(longer, schedule=config.schedule)
    assert rate_change(kept, state) == ""
    peak = replace(config, optimizer=replace(config.optimizer, learning_rate=1e-3))
    assert "is 0.000232, not 6.95e-05: the schedule or the peak is another" in rate_change(
        peak, state
    )
    old = state["schedule"].pop("min_lr_ratio")
    state["schedule"]["final_fraction"] = old  # As older versions wrote it.
    assert "6.95e-05" in rate_change(longer, state)


def test_validation_loss_is_that_of_the_step(tiny_config: Config) -> None:
    state = trainer_state(tiny_config, 6, "torch", "t", None)
    assert (state["validation_loss"], state["validation_step"]) == (None, None)
    assert n_updates({**state, "skipped_steps": 2}) == 4


def test_tokenizer_of_a_checkpoint_is_compared(tiny_config: Config, tmp_path: Path) -> None:
    here: Any = SimpleNamespace(fingerprint="f" * 64, path="t.model")
    check_tokenizer(tmp_path, here)  # Only weights.
    path = checkpoint(tmp_path, 3)
    check_tokenizer(path, here)
    for fingerprint in ("f" * 64, "e" * 64):
        state = trainer_state(tiny_config, 3, "torch", fingerprint, None)
        (path / "trainer_state.json").write_text(json.dumps(state))
        if fingerprint == here.fingerprint:
            check_tokenizer(path, here)
        else:
            with pytest.raises(InputError, match=r"another tokenizer than t\.model"):
                check_tokenizer(path, here)
