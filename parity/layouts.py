"""The same training on every layout of devices: what meshes and processes must not change.

JAX builds its meshes from the CPU devices of one process. PyTorch needs a process per rank:
`on_ranks` writes the case to a directory, torchrun starts `parity.rank_worker`, and its first
process writes the answer there.
"""

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from mooshak.checkpoints import safetensors
from mooshak.config.parse import dump_config, load_config
from mooshak.config.sections import Config, check_mesh
from mooshak.errors import InputError
from mooshak.files import write_atomically
from mooshak.mesh import mesh_sizes
from parity.backends import Arrays, Backend, TorchBackend
from parity.comparisons import STEPS, Line, Outline, ParityCase
from parity.faults import inject_fault
from parity.tolerances import FLOAT64, ROUNDING

MESHES = ("data=8", "fsdp=8", "data=2,fsdp=2,tensor=2")
"""Of JAX, on eight devices."""
PROCESSES = {"DDP": "data=2", "FSDP2": "fsdp=2"}
"""Of PyTorch: strategy -> mesh."""
N_DEVICES = 8
FAULT = "RMSNorm epsilon 1e-6"
"""Planted in the single process that all layouts are compared with: it moves every quantity."""


def compare_layouts(q: ParityCase) -> Iterator[Line]:
    """Training on every layout against one PyTorch process, in float64.

    A mesh that the model's sizes do not allow is left out: see `fitting`.
    """
    random, n_tokens = np.random.default_rng(2), q.tokens_nBS.shape[2]
    shape = (STEPS, N_DEVICES, n_tokens)  # A row for each device.
    vocabulary = q.torch.source.model.vocab_size
    wide = replace(q, tokens_nBS=random.integers(0, vocabulary, shape, dtype=np.int32))
    config = wide.config("float64")
    config = replace(config, train=replace(config.train, gradient_accumulation_steps=1))
    truth = outline(q.torch, config, wide)
    narrow = outline(q.torch, replace(config, train=replace(config.train, dtype="float32")), wide)
    floors = narrow.distances(truth)
    with inject_fault(FAULT, "torch"):
        faulty = outline(q.torch, config, wide)
    for name, found in _found(q, config, wide):
        apart, controls = found.distances(truth), found.distances(faulty)
        for what, measured in apart.items():
            floor = floors[what] * ROUNDING
            title = f"{what} of {STEPS} AdamW steps, {name}"
            yield Line(title, "float64", measured, FLOAT64, floor, controls[what], FAULT, "", name)


def _found(q: ParityCase, config: Config, wide: ParityCase) -> Iterator[tuple[str, Outline]]:
    for mesh in fitting(config):
        here = replace(config, parallel=replace(config.parallel, mesh=mesh))
        yield f"JAX, {mesh}", outline(q.jax, here, wide)
    for strategy, mesh in PROCESSES.items():
        here = replace(config, parallel=replace(config.parallel, mesh=mesh))
        yield f"torch, {strategy}, {mesh}", on_ranks(q.torch, here, wide)


def fitting(config: Config) -> list[str]:
    """The meshes that divide the model's heads and widths."""
    fit = []
    for mesh in MESHES:
        try:
            check_mesh(config, mesh_sizes(mesh, N_DEVICES))
        except InputError:
            continue
        fit.append(mesh)
    return fit


def outline(side: Backend, config: Config, q: ParityCase) -> Outline:
    """One training of a side in this process."""
    return Outline.of(side.steps(config, q.tokens_nBS))


def on_ranks(side: Backend, config: Config, q: ParityCase) -> Outline:
    """One training in PyTorch on as many processes as the mesh of `config` has."""
    n_processes = int(
        np.prod([int(part.split("=")[1]) for part in config.parallel.mesh.split(",")])
    )
    with tempfile.TemporaryDirectory(prefix="parity-") as name:
        directory = Path(name)
        safetensors.write_checkpoint(directory / "state", side.source)
        write_atomically(directory / "config.yaml", dump_config(config))
        np.save(directory / "tokens.npy", q.tokens_nBS)
        words = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        words += [f"--nproc-per-node={n_processes}", "-m", "parity.rank_worker", name]
        done = subprocess.run(words, capture_output=True, text=True)
        if done.returncode:
            raise InputError(f"torchrun failed: {done.stderr[-1000:]}")
        answer = load_file(directory / "answer.safetensors")
    parts: dict[str, Arrays] = {}
    for key, value in answer.items():
        part, _, name = key.partition("/")
        parts.setdefault(part, {})[name] = value
    single = {part: parts[part][""] for part in ("losses", "norms")}
    return Outline(**(parts | single))  # type: ignore[arg-type]  # arrays, and trees of arrays


def train_on_rank(directory: Path) -> None:
    """Train the case in a directory on this rank; the first rank writes the answer there."""
    config = load_config(directory / "config.yaml")
    side = TorchBackend(safetensors.open_checkpoint(directory / "state"))
    found = Outline.of(side.steps(config, np.load(directory / "tokens.npy")))
    answer: Arrays = {}
    for part, value in vars(found).items():
        trees = value if isinstance(value, dict) else {"": value}
        answer |= {f"{part}/{name}": np.ascontiguousarray(array) for name, array in trees.items()}
    if side.is_main:
        save_file(answer, directory / "answer.safetensors")
