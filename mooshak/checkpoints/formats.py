"""Detect a checkpoint's format, and convert the other framework's on the fly."""

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from mooshak.checkpoints import base, hf
from mooshak.config.model import ModelConfig
from mooshak.errors import InputError
from mooshak.tokenizer.files import is_hf

FORMAT_MARKERS = {"torch": "dcp", "jax": "orbax", "safetensors": "model.safetensors"}


class Processes(Protocol):
    """The processes of a run, as `Parallel` of either framework has them."""

    @property
    def is_main(self) -> bool:
        """Whether this is the first."""

    def broadcast(self, text: str) -> str:
        """What the first says, to all of them."""

    def barrier(self) -> None:
        """Return when all have come here."""

    def any_process(self, flag: bool) -> bool:
        """Whether the flag is set in any process; all of them ask at the same step."""

    def gather(self, text: str) -> list[str]:
        """What every process says, by rank."""

    def close(self) -> None:
        """Leave the others; all of them do so at the same point of the run."""


def detect_format(path: Path) -> str:
    """torch, jax, safetensors or hf. Raises `InputError` for a directory that is no checkpoint."""
    if not path.is_dir():
        raise InputError(f"there is no checkpoint directory {path}")
    if is_hf(path):
        return "hf"
    kinds = [kind for kind, name in FORMAT_MARKERS.items() if (path / name).exists()]
    if (path / "model.safetensors.index.json").exists():
        kinds.append("safetensors")
    if len(kinds) != 1:
        raise InputError(
            f"{path} is not a checkpoint: it needs one of {', '.join(FORMAT_MARKERS.values())}, "
            f"has {' and '.join(kinds) or 'none'}"
        )
    return kinds[0]


def model_of(path: Path) -> ModelConfig:
    """The model that a checkpoint of any kind says it is, from its `config.json` alone."""
    if detect_format(path) == "hf":
        return hf.read_config(path)
    return base.read_description(path)[0]


@contextmanager
def ensure_readable_format(
    path: Path, kind: str, processes: Processes | None = None
) -> Iterator[Path]:
    """A checkpoint of `kind` or of the interchange format with the contents of `path`.

    The other framework's checkpoint is converted on the way, in a process of its own: neither
    framework's package imports the other. The first of several processes does it for all.
    """
    found = detect_format(path)
    # Only torch reads what Hugging Face pickled.
    direct = kind == "torch" or hf.has_safetensors(path)
    if found in (kind, "safetensors") or (found == "hf" and direct):
        yield path
        return
    main = processes is None or processes.is_main
    directory, failure = _converted(path) if main else ("", "")
    if processes is not None:
        directory, failure = json.loads(processes.broadcast(json.dumps([directory, failure])))
    try:
        if failure:
            raise InputError(f"{path} could not be converted: {failure}")
        yield Path(directory) / path.name
        if processes is not None:
            processes.barrier()
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
