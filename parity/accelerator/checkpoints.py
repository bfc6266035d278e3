"""Part `checkpoints`: saving and restoring a training state, and conversion between frameworks."""

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mooshak.checkpoints import base
from parity.accelerator.curve import run_directory, steps
from parity.accelerator.rows import Row, Setup, attempt
from parity.accelerator.training import configuration, torch_trainer
from parity.convert import convert, open_any


def checkpoints(setup: Setup) -> Iterator[Row]:
    """Yield the time of a save and of a restore on the device, and changed tensors."""
    if setup.torch_device != "cpu" or setup.small:
        yield from attempt("save and restore", lambda: _save(setup))
    for framework, other in (("torch", "jax"), ("jax", "torch")):
        half = steps(setup) // 2
        source = run_directory(framework, setup) / f"checkpoints/{half}"
        if source.is_dir():
            yield from attempt(
                f"conversion of {framework}",
                lambda s=source, f=framework, o=other: _convert(s, f, o, setup),  # type: ignore[misc]
            )


def _save(setup: Setup) -> Iterator[Row]:
    """Save the state of the 125M model after a step, and restore it into another one."""
    import torch

    from mooshak_torch.checkpoint import open_checkpoint, restore, start_saving

    config = configuration("125m", setup)
    step, optimizer = torch_trainer(config, setup)
    step()
    path = setup.out / "saved"
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    state = {"format_version": 1, "step": 1, "seed": 0}
    base.write_description(path, config.model, state, {})
    start = time.perf_counter()
    wait = start_saving(optimizer.state(), path)
    yield Row("PyTorch, 125M: training waits for a save", time.perf_counter() - start, "s")
    wait()
    yield Row("PyTorch, 125M: save until on disk", time.perf_counter() - start, "s")
    saved = _tensors(optimizer)
    _, other = torch_trainer(config, setup)
    start = time.perf_counter()
    restore(other, open_checkpoint(path))
    yield Row("PyTorch, 125M: restore", time.perf_counter() - start, "s")
    found = _tensors(other)
    changed = sum(not torch.equal(tensor, found[key]) for key, tensor in saved.items())
    yield Row("PyTorch, 125M: tensors that a restore changes", changed, "", 0.0, changed == 0)
    shutil.rmtree(path)


def _tensors(optimizer: Any) -> dict[tuple[str, str], Any]:
    state = optimizer.state()
    return {(part, name): tensor for part in state for name, tensor in state[part].items()}


def _convert(source: Path, framework: str, other: str, setup: Setup) -> Iterator[Row]:
    """Convert a checkpoint that was written on the device to the other framework and back."""
    there, back = (setup.out / "converted" / name for name in (f"{framework}-there", framework))
    for path in (there, back):
        shutil.rmtree(path, ignore_errors=True)
    start = time.perf_counter()
    convert(source, there, other)
    convert(there, back, framework)
    seconds = time.perf_counter() - start
    first, last = open_any(source), open_any(back)
    changed = sum(first.read(k).tobytes() != last.read(k).tobytes() for k in first.tensors)
    changed += first.tensors.keys() != last.tensors.keys()
    name = f"{framework} to {other} to {framework}: tensors that change"
    yield Row(name, changed, "", 0.0, changed == 0, f"{seconds:.1f} s")
