"""The run directory: its records."""

from dataclasses import replace
from pathlib import Path

import pytest

from mooshak.config.sections import Config
from mooshak.training.metrics import RunLog, environment, losses


def test_environment_without_git(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment()["git_commit"] is None


def log_steps(config: Config, first: int, last: int, closed: bool) -> None:
    log = RunLog(config, first, True, "cpu", 1)
    for step in range(first + 1, last + 1):
        log.log(step, 0.1, {"loss": float(step)})
    if closed:
        log.close()
    else:  # As after kill -9 of a process whose events were on disk.
        log.flush()
        log.progress.stop()


@pytest.mark.parametrize("closed", [True, False])
def test_each_step_is_once_in_tensorboard(
    closed: bool, tiny_config: Config, tmp_path: Path
) -> None:
    """A process is killed at step 7, after a checkpoint at step 4; or it stops there."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = replace(tiny_config.run, dir=str(tmp_path), tensorboard=True)
    config = replace(tiny_config, run=run)
    log_steps(config, 0, 4 if closed else 7, closed)
    log_steps(config, 4, 10, closed=True)
    reader = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"tensors": 0})
    reader.Reload()
    assert [event.step for event in reader.Tensors("loss")] == list(range(1, 11))
    assert list(losses(tmp_path)) == list(range(1, 11))
    assert len(list((tmp_path / "tensorboard").iterdir())) == (2 if closed else 1)
