"""Checkpoint manager: which checkpoints it keeps and deletes, and when one appears."""

import json
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from mooshak.checkpoints.manager import (
    CheckpointManager,
    complete_steps,
    newest_checkpoint,
    record_of,
)
from mooshak.config.sections import CheckpointConfig, Config, InitConfig
from mooshak.errors import InputError


class OneProcess:
    """A run of one process."""

    is_main = True

    def broadcast(self, text: str) -> str:
        return text

    def barrier(self) -> None: ...

    world_size = 1

    def any_process(self, flag: bool) -> bool:
        return flag

    def gather(self, text: str) -> list[str]:
        return [text]

    def close(self) -> None: ...


Manager = Callable[[int], CheckpointManager]


@pytest.fixture
def manager(tiny_config: Config, tmp_path: Path) -> Manager:
    """Make the manager of a run in `tmp_path` that keeps so many checkpoints."""
    (tmp_path / "tokenizer.model").write_text("a tokenizer")

    def make(keep: int) -> CheckpointManager:
        config = replace(
            tiny_config,
            checkpoint=CheckpointConfig(keep=keep),
            tokenizer=replace(tiny_config.tokenizer, path=str(tmp_path / "tokenizer.model")),
            run=replace(tiny_config.run, dir=str(tmp_path / "run")),
        )
        return CheckpointManager(config, OneProcess())

    return make


def write(directory: Path) -> Callable[[], None]:
    """The weights of a checkpoint."""
    return lambda: (directory / "model.safetensors").write_text("weights") and None


def save(manager: CheckpointManager, step: int, loss: float | None = None) -> None:
    state = {"format_version": 1, "step": step, "validation_loss": loss}
    manager.save(state, write)


NAN = float("nan")


@pytest.mark.parametrize(
    ("keep", "losses", "kept"),
    [
        (1, [3.0, 1.0, 2.0, 1.5], [2, 4]),
        (2, [3.0, 1.0, 2.0, 1.5], [2, 3, 4]),
        (2, [1.0, 2.0, 3.0, 4.0], [1, 3, 4]),
        (1, [4.0, 3.0, 2.0, 1.0], [4]),
        (2, [None, None, None, None], [3, 4]),
        (1, [None, 2.0, None, 3.0], [2, 4]),
        (1, [2.0, 1.0, 1.0, 5.0], [2, 4]),
        (1, [NAN, 2.0, 1.0, NAN], [3, 4]),
        (1, [NAN, NAN, NAN, NAN], [4]),
    ],
)
def test_manager_keeps_the_newest_and_the_best(
    keep: int, losses: list[float | None], kept: list[int], manager: Manager
) -> None:
    saving = manager(keep)
    for step, loss in enumerate(losses, 1):
        save(saving, step, loss)
    saving.finish()
    assert complete_steps(saving.directory) == kept
    assert sorted(path.name for path in saving.directory.iterdir()) == sorted(map(str, kept))


def test_loss_of_an_earlier_step_is_not_the_best(manager: Manager) -> None:
    saving = manager(1)
    # The loss of step 3 is the best of a checkpoint; that of step 2 has none.
    for step, validated in ((1, 1), (2, 1), (3, 3), (4, 2)):
        loss = {1: 2.0, 2: 0.5, 3: 1.0}[validated]
        state = {"step": step, "validation_loss": loss, "validation_step": validated}
        saving.save({"format_version": 1, **state}, write)
    saving.finish()
    assert complete_steps(saving.directory) == [3, 4]


def test_deleted_tokenizer_is_saved_from_the_run(manager: Manager, tmp_path: Path) -> None:
    saving = manager(1)
    (tmp_path / "tokenizer.model").unlink()
    save(saving, 3)
    saving.finish()
    for directory in ("tokenizer", "checkpoints/3"):
        assert (tmp_path / "run" / directory / "tokenizer.model").read_text() == "a tokenizer"


def test_record_of_a_run_with_init_from_names_its_tokenizer(tiny_config: Config) -> None:
    assert record_of(tiny_config) == tiny_config
    path = tiny_config.tokenizer.path
    started = replace(tiny_config, init=InitConfig("llama"))
    expected = str(Path(tiny_config.run.dir) / "tokenizer" / "tokenizer.model")
    assert record_of(started).tokenizer.path == expected != path
    assert record_of(record_of(started)) == record_of(started)


def test_broken_copy_of_a_step_is_set_aside(
    manager: Manager, capsys: pytest.CaptureFixture[str]
) -> None:
    """Such as a directory that was copied without `trainer_state.json`; a file too."""
    saving = manager(9)
    (saving.directory / "3" / "dcp").mkdir(parents=True)
    (saving.directory / "3.incomplete-1").mkdir()
    (saving.directory / "4").write_text("a file")
    for step in (3, 4):
        save(saving, step)
        saving.finish()
    assert complete_steps(saving.directory) == [3, 4]
    assert (saving.directory / "3.incomplete-2" / "dcp").is_dir()
    assert (saving.directory / "4.incomplete-1").read_text() == "a file"
    assert "checkpoints/3 is incomplete; it is " in capsys.readouterr().err


def test_manager_deletes_nothing_unknown(manager: Manager) -> None:
    directory = manager(1).directory
    unknown = [directory / name for name in ("notes", "1.bak", "2", "007x")]
    for path in unknown:
        path.mkdir()
    saving = manager(1)
    for step in (3, 4):
        save(saving, step)
    saving.finish()
    assert sorted(directory.iterdir()) == sorted([*unknown, directory / "4"])


def test_manager_removes_unfinished_directories(manager: Manager) -> None:
    directory = manager(1).directory
    for name in (".3.writing", ".2.deleting"):
        (directory / name / "dcp").mkdir(parents=True)
    manager(1)
    assert not list(directory.iterdir())


def test_checkpoint_appears_when_it_is_complete(manager: Manager) -> None:
    saving, written = manager(1), threading.Event()

    def start_writing(directory: Path) -> Callable[[], None]:
        def wait() -> None:
            written.wait()
            write(directory)()

        return wait

    saving.save({"format_version": 1, "step": 5, "validation_loss": None}, start_writing)
    assert newest_checkpoint(saving.directory.parent) is None
    written.set()
    saving.finish()
    path = newest_checkpoint(saving.directory.parent)
    assert path == saving.directory / "5"
    assert {file.name for file in path.iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer.model",
        "trainer_state.json",
    }
    assert (path / "tokenizer.model").read_text() == "a tokenizer"


def test_checkpoint_of_a_step_is_written_once(manager: Manager) -> None:
    saving = manager(2)
    save(saving, 3, 1.0)
    saving.finish()
    save(saving, 3, 9.0)
    saving.finish()
    state = json.loads((saving.directory / "3" / "trainer_state.json").read_text())
    assert state["validation_loss"] == 1.0


def test_failed_save_is_raised_by_the_next(manager: Manager) -> None:
    saving = manager(2)

    def full(directory: Path) -> Callable[[], None]:
        raise OSError(28, "No space left on device", str(directory / "dcp"))

    saving.save({"format_version": 1, "step": 3}, full)
    assert saving.failed
    with pytest.raises(InputError, match="the checkpoint of step 3 could not be saved: No space"):
        save(saving, 4)
    assert complete_steps(saving.directory) == []
    # Once: the run may go on.
    assert not saving.failed
    save(saving, 5)
    saving.finish()
    assert complete_steps(saving.directory) == [5]
