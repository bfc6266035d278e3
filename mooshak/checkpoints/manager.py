"""The checkpoints of a run: `RUN/checkpoints/{step}`, which appear complete or not at all.

Which framework wrote one is told by its state: the folder `dcp` (torch), `orbax` (JAX), or the file
`model.safetensors` (interchange). Beside it stand `config.json` and `trainer_state.json`.
"""

import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mooshak.checkpoints import base
from mooshak.config.sections import Config
from mooshak.tokenizer.files import files_of_tokenizer


class CheckpointManager:
    """Saves in the background, keeps the newest and the best, and remembers a failure.

    `is_main` is true in the one process that names and deletes directories.
    """

    def __init__(self, config: Config, is_main: bool = True):
        self.directory = Path(config.run.dir) / "checkpoints"
        self.config, self.is_main = config, is_main
        self.files = files_of_tokenizer(Path(config.tokenizer.path))
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        if is_main:
            self.directory.mkdir(parents=True, exist_ok=True)
            for unfinished in self.directory.glob(".*.writing"):
                shutil.rmtree(unfinished)

    def save(
        self, state: dict[str, Any], start_writing: Callable[[Path], Callable[[], None]]
    ) -> None:
        """Save a training state; returns while it is still being written.

        `start_writing(directory)` takes a snapshot and returns the function that waits for it.
        Raises what stopped the save before this one.
        """
        self.finish()
        final = self.directory / str(state["step"])
        if final.exists():
            return
        temporary = self.directory / f".{final.name}.writing"
        if self.is_main:
            temporary.mkdir(exist_ok=True)
        wait = start_writing(temporary)

        def complete() -> None:
            try:
                wait()
                if self.is_main:
                    base.write_description(temporary, self.config.model, state, self.files)
                    temporary.rename(final)
                    self._prune()
            except BaseException as error:
                self._error = error

        self._thread = threading.Thread(target=complete, name=f"save-{final.name}")
        self._thread.start()

    def raise_failure(self) -> None:
        """Raise what stopped a save, if one failed; call it every step."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def finish(self) -> None:
        """Wait for the save under way; raises what stopped it."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.raise_failure()

    def _prune(self) -> None:
        """Delete all but the newest and the best. What this program did not write stays."""
        steps = complete_steps(self.directory)
        kept = set(steps[-self.config.checkpoint.keep :])
        states = {step: base.read_trainer_state(self.directory / str(step)) for step in steps}
        losses = {step: (state or {}).get("validation_loss") for step, state in states.items()}
        known = {step: loss for step, loss in losses.items() if loss is not None}
        if known:
            kept.add(min(known, key=lambda step: known[step]))
        for step in set(steps) - kept:
            shutil.rmtree(self.directory / str(step))


def complete_steps(directory: Path) -> list[int]:
    """The steps whose checkpoints in a run's folder of checkpoints are complete, in order."""
    return sorted(
        int(path.name)
        for path in directory.glob("[0-9]*")
        if path.name.isdecimal() and (path / "trainer_state.json").is_file()
    )


def newest_checkpoint(run: Path) -> Path | None:
    """Return the newest complete checkpoint of a run directory, or None."""
    steps = complete_steps(run / "checkpoints")
    return run / "checkpoints" / str(steps[-1]) if steps else None
