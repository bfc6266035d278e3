"""Checkpoints of a run, `RUN/checkpoints/{step}`: background saves, retention, failures.

A checkpoint is renamed to its final name when it is complete. It contains `config.json`,
`trainer_state.json`, the tokenizer, and `dcp/` (torch), `orbax/` (JAX) or safetensors files.
"""

import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from mooshak.checkpoints import base
from mooshak.checkpoints.formats import Processes
from mooshak.checkpoints.together import raise_together
from mooshak.config.sections import Config, with_absolute_paths
from mooshak.errors import PeerError, SaveError, os_error_text
from mooshak.files import write_atomically
from mooshak.tokenizer.files import files_of_tokenizer, standard_name, tokenizer_files

POLL_SECONDS = 0.1
"""Seconds between two checks that all processes have saved."""


class CheckpointManager:
    """Background saves of a run, retention of the newest and the best, and their failures.

    A failure in one process ends all of them: they exchange `failed` with the flags of every step,
    and call `raise_failure` together. Only the first process renames and deletes directories.
    """

    def __init__(self, config: Config, processes: Processes):
        self.directory = Path(config.run.dir) / "checkpoints"
        self.config, self.processes = config, processes
        self.files: dict[str, Path] = {}
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        with self.defer_failure(f"{self.directory} could not be prepared"):
            if processes.is_main:
                self.directory.mkdir(parents=True, exist_ok=True)
                self.files = _copy_tokenizer(config)
                for ending in ("writing", "deleting"):
                    for unfinished in self.directory.glob(f".*.{ending}"):
                        shutil.rmtree(unfinished)
        self.raise_failure()

    def __enter__(self) -> "CheckpointManager":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: Any, traceback: Any) -> None:
        """Let a save finish that is under way when a step fails; a second signal does not wait."""
        if kind is not None and issubclass(kind, Exception) and self._thread is not None:
            alone = self.processes.world_size == 1
            is_lost = issubclass(kind, PeerError)  # The other process cannot do its part.
            self._thread.join(None if alone else 5 if is_lost else self.config.parallel.timeout)

    @property
    def failed(self) -> bool:
        """True if this process has a failure that it has not reported to the others."""
        return self._failure is not None

    def save(
        self, state: dict[str, Any], start_writing: Callable[[Path], Callable[[], None]]
    ) -> None:
        """Save a training state in the background, unless it is saved; all processes call it.

        `start_writing(directory)` takes a snapshot and returns a function that waits until it is
        written. Raises the failure of the previous save, as `raise_failure` does.
        """
        self.finish()
        final = self.directory / str(state["step"])
        if state["step"] in complete_steps(self.directory):
            return
        temporary = self.directory / f".{final.name}.writing"
        what = f"the checkpoint of step {final.name} could not be saved"
        with self.defer_failure(what):
            if self.processes.is_main:
                if final.exists():
                    _set_aside(final)
                temporary.mkdir(exist_ok=True)
        # Before a process could wait in start_writing for one that has failed here.
        self.raise_failure()

        def complete(wait: Callable[[], None]) -> None:
            with self.defer_failure(what):
                wait()
                if self.processes.is_main:
                    base.write_description(temporary, self.config.model, state, self.files)
                    temporary.rename(final)
                    self._prune()

        with self.defer_failure(what):
            wait = start_writing(temporary)
            self._thread = threading.Thread(
                target=complete, args=(wait,), name=f"save-{final.name}"
            )
            self._thread.start()

    @contextmanager
    def defer_failure(self, what: str) -> Iterator[None]:
        """Record an exception of the block, which `raise_failure` raises; `what` is its effect.

        An `OSError` becomes a `SaveError` of one line.
        """
        try:
            yield
        except OSError as error:
            self._failure = SaveError(f"{what}: {os_error_text(error)}")
            self._failure.__cause__ = error
        except BaseException as error:
            self._failure = error

    def raise_failure(self) -> None:
        """Raise the failure of any process: the error itself there, `PeerError` in the others.

        All processes call it at the same point of the run.
        """
        if (failure := self._failure) is not None:
            self._failure = None
        raise_together(self.processes, failure)

    def finish(self) -> None:
        """Wait until the current save is complete in all processes; all of them call it.

        Raises its failure, as `raise_failure` does.
        """
        while True:
            saving = self._thread is not None and self._thread.is_alive()
            self.raise_failure()
            if not self.processes.any_process(saving):
                return
            if self._thread is not None:
                self._thread.join(POLL_SECONDS)

    def _prune(self) -> None:
        """Delete all checkpoints but the newest and the best; other files are not touched."""
        steps = complete_steps(self.directory)
        retained = set(steps[-self.config.checkpoint.keep :])
        states = {step: base.read_trainer_state(self.directory / str(step)) for step in steps}
        losses = {step: _loss_of_step(state) for step, state in states.items() if state}
        known = {s: loss for s, loss in losses.items() if loss is not None and loss == loss}
        if known:
            retained.add(min(known, key=lambda step: known[step]))
        for step in set(steps) - retained:
            # A partly deleted directory must not look like a checkpoint.
            unwanted = self.directory / f".{step}.deleting"
            (self.directory / str(step)).rename(unwanted)
            shutil.rmtree(unwanted)


def _set_aside(path: Path) -> None:
    """Rename an incomplete checkpoint, such as a broken copy, to a free name."""
    number = 1
    while (aside := path.with_name(f"{path.name}.incomplete-{number}")).exists():
        number += 1
    path.rename(aside)
    print(f"{path} is incomplete; it is {aside} now", file=sys.stderr)


def _loss_of_step(state: dict[str, Any]) -> float | None:
    """Return the validation loss of a training state, or None if it is of an earlier step."""
    # Older versions did not record the step.
    current = state.get("validation_step", state["step"]) == state["step"]
    return state.get("validation_loss") if current else None


def _copy_tokenizer(config: Config) -> dict[str, Path]:
    """Copy the files of the tokenizer to RUN/tokenizer, from where every save takes them.

    The originals may be deleted during the run: with `init.from`, or with an older checkpoint.
    """
    directory = Path(config.run.dir) / "tokenizer"
    files = files_of_tokenizer(Path(config.tokenizer.path))
    for name in tokenizer_files(directory).keys() - files.keys():
        (directory / name).unlink()
    for name, file in files.items():
        write_atomically(directory / name, file.read_bytes())
    return tokenizer_files(directory)


def record_of(config: Config) -> Config:
    """Return the configuration for RUN/config.yaml, after `init.from` with RUN/tokenizer.

    Its paths are absolute: the commands that read it may run in another working directory.
    """
    config = with_absolute_paths(config)
    if not config.init.from_:
        return config
    path = Path(config.run.dir) / "tokenizer" / standard_name(Path(config.tokenizer.path))
    return replace(config, tokenizer=replace(config.tokenizer, path=str(path)))


def complete_steps(directory: Path) -> list[int]:
    """Return the steps of the complete checkpoints in a directory, in order."""
    return sorted(
        int(path.name)
        for path in directory.glob("[0-9]*")
        if path.name.isdecimal() and (path / "trainer_state.json").is_file()
    )


def newest_checkpoint(run: Path) -> Path | None:
    """Return the newest complete checkpoint of a run directory, or None."""
    steps = complete_steps(run / "checkpoints")
    return run / "checkpoints" / str(steps[-1]) if steps else None
