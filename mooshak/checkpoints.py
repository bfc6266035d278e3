"""The checkpoints of a run: `RUN/checkpoints/{step}`, which appear complete or not at all.

Which framework wrote one is told by its state: the folder `dcp` (torch), `orbax` (JAX), or the file
`model.safetensors` (interchange). Beside it stand `config.json` and `trainer_state.json`.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from mooshak import huggingface, interchange
from mooshak.config import Config, ModelConfig, description
from mooshak.errors import InputError

STATES = {"torch": "dcp", "jax": "orbax", "safetensors": "model.safetensors"}


class Checkpoints:
    """Saves in the background, keeps the newest and the best, and remembers a failure.

    `main` is true in the one process that names and deletes directories.
    """

    def __init__(self, config: Config, main: bool = True):
        self.directory = Path(config.run.dir) / "checkpoints"
        self.config, self.main = config, main
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        if main:
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
        if self.main:
            temporary.mkdir(exist_ok=True)
        wait = start_writing(temporary)

        def complete() -> None:
            try:
                wait()
                if self.main:
                    interchange.write_description(temporary, self.config.model, state)
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
        states = {
            step: interchange.read_trainer_state(self.directory / str(step)) for step in steps
        }
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


def kind_of(path: Path) -> str:
    """torch, jax, safetensors or hf. Raises `InputError` for a directory that is no checkpoint."""
    if not path.is_dir():
        raise InputError(f"there is no checkpoint directory {path}")
    if huggingface.is_hf(path):
        return "hf"
    kinds = [kind for kind, name in STATES.items() if (path / name).exists()]
    if (path / "model.safetensors.index.json").exists():
        kinds.append("safetensors")
    if len(kinds) != 1:
        raise InputError(
            f"{path} is not a checkpoint: it needs one of {', '.join(STATES.values())}, has "
            f"{' and '.join(kinds) or 'none'}"
        )
    return kinds[0]


def model_of(path: Path) -> ModelConfig:
    """The model that a checkpoint of any kind says it is, from its `config.json` alone."""
    if kind_of(path) == "hf":
        return huggingface.read_config(path)
    return interchange.read_description(path)[0]


def resume_from(config: Config, resume: str) -> Path | None:
    """The checkpoint that a run continues from, or None for a start from the beginning.

    `resume` is auto (the newest complete one in the run directory), never, or a path. A run
    directory with later checkpoints than that is refused: they would be mistaken for this run's.
    """
    directory = Path(config.run.dir) / "checkpoints"
    steps = complete_steps(directory)
    if resume == "auto":
        return directory / str(steps[-1]) if steps else None
    path = None if resume == "never" else Path(resume)
    if path is not None:
        kind_of(path)
    state = None if path is None else interchange.read_trainer_state(path)
    start = 0 if state is None else state["step"]
    if steps and steps[-1] > start:
        raise InputError(
            f"{config.run.dir} holds checkpoints up to step {steps[-1]}; continue them with "
            "--resume auto or choose another --run.dir"
        )
    return path


def trainer_state(
    config: Config,
    step: int,
    framework: str,
    tokenizer: str,
    loss: float | None,
    processes: int = 1,
    mesh: str = "",
) -> dict[str, Any]:
    """What `trainer_state.json` holds: `step` optimizer steps done, `loss` that of validation.

    `processes` and `mesh` say what the state was written by; they bind nobody who reads it.
    """
    return {
        "format_version": interchange.FORMAT_VERSION,
        "step": step,
        "seed": config.run.seed,
        "written_by": {"framework": framework, "processes": processes, "mesh": mesh},
        "dtype": config.train.dtype,
        "schedule": asdict(config.schedule),
        "optimizer": asdict(config.optimizer),
        "data": _data(config, tokenizer),
        "validation_loss": loss,
    }


def check_resume(
    config: Config, source: interchange.Checkpoint, tokenizer: str
) -> tuple[int, float | None]:
    """The step to continue at, and the last validation loss if there was one.

    Raises `InputError` where the run would not be the same run.
    """
    path, state = source.path, source.trainer_state
    check_model(path, source.model, config)
    if state is None or not source.has_optimizer:
        raise InputError(f"{path} has only weights; a run continues from a training state")
    present = {"seed": config.run.seed, **_data(config, tokenizer)}
    past = {"seed": state.get("seed"), **(state.get("data") or {})}
    for key, value in present.items():
        if past.get(key) != value:
            raise InputError(
                f"{path} was made with {key} {past.get(key)}, this run has {value}; the position "
                "in the data is the step only while these stay the same"
            )
    if state["step"] > config.train.steps:
        raise InputError(
            f"{path} is at step {state['step']}, after train.steps {config.train.steps}"
        )
    return state["step"], state.get("validation_loss")


def check_model(path: Path, model: ModelConfig, config: Config) -> None:
    """Raises `InputError` unless the `model` of a checkpoint is the configuration's."""
    there, here = description(model), description(config.model)
    for key, value in here.items():
        if there[key] != value:
            raise InputError(
                f"{path} is a checkpoint of another model: its {key} is {there[key]}, "
                f"the configuration's is {value}"
            )


class Processes(Protocol):
    """The processes of a run, as `Parallel` of either framework has them."""

    @property
    def main(self) -> bool:
        """Whether this is the first."""

    def tell(self, text: str) -> str:
        """What the first says, to all of them."""

    def wait(self) -> None:
        """Return when all have come here."""


@contextmanager
def readable(path: Path, kind: str, processes: Processes | None = None) -> Iterator[Path]:
    """A checkpoint of `kind` or of the interchange format with the contents of `path`.

    The other framework's checkpoint is converted on the way, in a process of its own: neither
    framework's package imports the other. The first of several processes does it for all.
    """
    found = kind_of(path)
    # Only torch reads what Hugging Face pickled.
    direct = kind == "torch" or huggingface.has_safetensors(path)
    if found in (kind, "safetensors") or (found == "hf" and direct):
        yield path
        return
    main = processes is None or processes.main
    directory, failure = _converted(path) if main else ("", "")
    if processes is not None:
        directory, failure = json.loads(processes.tell(json.dumps([directory, failure])))
    try:
        if failure:
            raise InputError(f"{path} could not be converted: {failure}")
        yield Path(directory) / path.name
        if processes is not None:
            processes.wait()
    finally:
        if main:
            shutil.rmtree(directory)


def _converted(path: Path) -> tuple[str, str]:
    """A new directory beside a checkpoint with its contents in the interchange format.

    And why they are not in it, if they are not.
    """
    directory = tempfile.mkdtemp(dir=path.parent, prefix=".converting-")
    arguments = ["-m", "parity.convert", str(path), f"{directory}/{path.name}"]
    command = [sys.executable, *arguments, "--to", "safetensors"]
    done = subprocess.run(command, capture_output=True, text=True)
    # Its last line is the error; what stands before it are warnings.
    reason = (done.stderr.splitlines() or ["no reason given"])[-1].removeprefix("error: ")
    return directory, reason if done.returncode else ""


def _data(config: Config, tokenizer: str) -> dict[str, Any]:
    return {
        "sources": [asdict(source) for source in config.data.sources],
        "batch_size": config.train.batch_size,
        "sequence_length": config.T,
        "validation_fraction": config.data.validation_fraction,
        "tokenizer": tokenizer,
    }
