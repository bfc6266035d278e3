"""Detect the format of a checkpoint; convert one of the other framework on the fly."""

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
"""Format -> the file or directory that identifies it."""


class Processes(Protocol):
    """The processes of a run: the interface of `Parallel` in both frameworks."""

    @property
    def is_main(self) -> bool:
        """True in the first process."""

    @property
    def world_size(self) -> int:
        """Number of processes."""

    def broadcast(self, text: str) -> str:
        """Return the text of the first process, in all of them."""

    def barrier(self) -> None:
        """Wait for all processes."""

    def any_process(self, flag: bool) -> bool:
        """Return whether the flag is set in any process; a collective."""

    def gather(self, text: str) -> list[str]:
        """Return the texts of all processes, by rank."""

    def close(self) -> None:
        """Leave the process group; a collective."""


def detect_format(path: Path) -> str:
    """Return torch, jax, safetensors or hf. Raises `InputError` if `path` is not a checkpoint."""
    if not path.is_dir():
        raise InputError(f"there is no checkpoint directory {path}")
    if is_hf(path):
        return "hf"
    found = {name for name, marker in FORMAT_MARKERS.items() if (path / marker).exists()}
    if (path / "model.safetensors.index.json").exists():
        found.add("safetensors")
    if len(found) != 1:
        raise InputError(
            f"{path} is not a checkpoint: it needs one of {', '.join(FORMAT_MARKERS.values())}, "
            f"has {' and '.join(sorted(found)) or 'none'}"
        )
    return found.pop()


def model_of(path: Path) -> ModelConfig:
    """Read the model of a checkpoint of any format, from its `config.json`."""
    if detect_format(path) == "hf":
        return hf.read_config(path)
    return base.read_description(path)[0]


@contextmanager
def ensure_readable_format(
    path: Path, framework: str, processes: Processes | None = None
) -> Iterator[Path]:
    """Yield `path`, or a temporary conversion of it that `framework` (torch or jax) can read.

    A checkpoint of the other framework is converted to the interchange format in another process,
    since neither package imports the other; among several processes, by the first one. Raises
    `InputError` in all of them if the conversion fails.
    """
    found = detect_format(path)
    # Only torch reads the pickles of Hugging Face.
    direct = framework == "torch" or hf.has_safetensors(path)
    if found in (framework, "safetensors") or (found == "hf" and direct):
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
    """Convert a checkpoint to the interchange format in a temporary directory.

    It is next to the checkpoint, where there is space and all processes see it, or, if nothing can
    be written there, in the system's directory. Returns it, and why the conversion failed, or an
    empty text.
    """
    path = path.absolute()
    try:
        directory = tempfile.mkdtemp(dir=path.parent, prefix=".converting-")
    except OSError:
        directory = tempfile.mkdtemp(prefix="mooshak-converting-")
    arguments = ["-m", "parity.convert", str(path), f"{directory}/{path.name}"]
    command = [sys.executable, *arguments, "--to", "safetensors"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
    # The last line is the error, after warnings.
    reason = (done.stderr.splitlines() or ["no reason given"])[-1].removeprefix("error: ")
    return directory, reason if done.returncode else ""
