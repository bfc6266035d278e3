"""A training command in which one process fails to save one checkpoint.

failing_save.py torch|jax RANK FAULT STEP [arguments of the command]
"""

import errno
import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from mooshak.checkpoints.manager import CheckpointManager
from mooshak.errors import InputError


def main() -> None:
    framework, rank, fault, step, *arguments = sys.argv[1:]
    this = os.environ.get("RANK") or arguments[arguments.index("--parallel.process_id") + 1]
    sys.argv = ["train", *arguments]
    if framework == "torch":
        from mooshak_torch.train import main as train
    else:
        from mooshak_jax.distributed import mesh
        from mooshak_jax.train import main as train

        mesh.SHUTDOWN_SECONDS = 5  # The others wait as long for a process that failed alone.
    if this == rank:
        fail_at(step, FAULTS[fault], framework)
    train()


def fail_at(step: str, inject: Callable[[str, Path], None], framework: str) -> None:
    """Inject the fault when the checkpoint of `step` is about to be saved."""
    save = CheckpointManager.save

    def failing_save(self: CheckpointManager, state: dict[str, Any], *rest: Any) -> None:
        if str(state["step"]) == step:
            # The fault must not reach the previous save, which this process may still be writing.
            # Not `finish`, which all processes call together.
            if self._thread is not None:
                self._thread.join()
            inject(framework, self.directory / f".{step}.writing")
        save(self, state, *rest)

    mock.patch.object(CheckpointManager, "save", failing_save).start()


def write(framework: str, directory: Path) -> None:
    """No file of this process can be longer than this, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))


def start(framework: str, directory: Path) -> None:
    """The main thread fails where it starts the save; the other processes have started it."""
    error = OSError(errno.EIO, os.strerror(errno.EIO), str(directory))
    target = {
        "torch": "torch.distributed.checkpoint.async_save",
        "jax": "orbax.checkpoint.PyTreeCheckpointHandler.async_save",
    }
    mock.patch(target[framework], side_effect=error).start()


def describe(framework: str, directory: Path) -> None:
    """The data can be written, and config.json cannot."""
    (directory / "config.json").mkdir(parents=True)


def alone(framework: str, directory: Path) -> None:
    """The main thread fails where the processes do not exchange failures."""
    raise InputError("one process failed alone")


FAULTS = {fault.__name__: fault for fault in (write, start, describe, alone)}

if __name__ == "__main__":
    main()
