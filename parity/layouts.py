"""Compare the same training on every layout of devices: meshes and processes must change nothing.

JAX builds its meshes from the CPU devices of one process. PyTorch needs a process per rank:
`_train_on_ranks` writes the cases to a directory, torchrun starts `parity.rank_worker`, and the
first rank writes the results there.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from mooshak.checkpoints import safetensors
from mooshak.config.mesh_checks import check_mesh
from mooshak.config.parse import dump_config, load_config
from mooshak.config.sections import Config
from mooshak.data.packing import Batch
from mooshak.errors import InputError
from mooshak.files import write_atomically
from mooshak.mesh import mesh_sizes
from parity.backends import Arrays, Backend, TorchBackend
from parity.comparisons.case import STEPS, Line, ParityCase
from parity.comparisons.training import Outline
from parity.faults import inject_fault
from parity.tolerances import FLOAT64, ROUNDING

MESHES = ("data=8", "fsdp=8", "data=2,fsdp=2,tensor=2")
"""Of JAX, on eight devices."""
PROCESSES = {"DDP": "data=2", "FSDP2": "fsdp=2"}
"""Of PyTorch: strategy -> mesh."""
N_PROCESSES = 2
N_DEVICES = 8
FAULT = "RMSNorm epsilon 1e-6"
"""Injected into the single process that all layouts are compared with: changes every quantity."""


def compare_layouts(q: ParityCase) -> Iterator[Line]:
    """Compare training on every layout with one PyTorch process, in float64.

    First on plain rows, then with document masks. Meshes that the model's sizes do not allow are
    omitted: see `fitting`.
    """
    random, n_tokens = np.random.default_rng(2), q.tokens_nBS.shape[2]
    shape = (STEPS, N_DEVICES, n_tokens)  # One row per device.
    vocabulary = q.torch.source.model.vocab_size
    wide = replace(q, tokens_nBS=random.integers(0, vocabulary, shape, dtype=np.int32))
    config = wide.config("float64")
    config = replace(config, train=replace(config.train, gradient_accumulation_steps=1))
    rows = ((wide.batches, False), (wide.packed, True))
    on_ranks = _train_on_ranks(q.torch, config, [batches for batches, _ in rows])
    for (batches, documents), trained in zip(rows, on_ranks, strict=True):
        truth = Outline.of(q.torch.steps(config, batches))
        low = replace(config, train=replace(config.train, dtype="float32"))
        floors = Outline.of(q.torch.steps(low, batches)).distances(truth)
        with inject_fault(FAULT, "torch"):
            faulty = Outline.of(q.torch.steps(config, batches))
        for name, found in (*_train_on_meshes(q.jax, config, batches), *trained.items()):
            apart, controls = found.distances(truth), found.distances(faulty)
            layout = f"{name}, document masks" if documents else name
            for quantity, measured in apart.items():
                floor = floors[quantity] * ROUNDING
                line = Line(f"{quantity}, {layout}", "float64", measured, FLOAT64)
                yield replace(
                    line,
                    noise_floor=floor,
                    negative_control=controls[quantity],
                    fault=FAULT,
                    layout=layout,
                    documents=documents,
                )


def _train_on_meshes(
    backend: Backend, config: Config, batches: Sequence[Batch[np.ndarray]]
) -> Iterator[tuple[str, Outline]]:
    for mesh in fitting(config):
        here = replace(config, parallel=replace(config.parallel, mesh=mesh))
        yield f"JAX, {mesh}", Outline.of(backend.steps(here, batches))


def fitting(config: Config) -> list[str]:
    """Return the meshes that divide the model's heads and widths."""
    fit = []
    for mesh in MESHES:
        try:
            check_mesh(config, mesh_sizes(mesh, N_DEVICES))
        except InputError:
            continue
        fit.append(mesh)
    return fit


def _train_on_ranks(
    backend: Backend, config: Config, cases: Sequence[Sequence[Batch[np.ndarray]]]
) -> list[dict[str, Outline]]:
    """Train on the batches of each case in PyTorch, with each strategy: one start of processes.

    Returns the results of each case, by name.
    """
    with tempfile.TemporaryDirectory(prefix="parity-") as name:
        directory = Path(name)
        safetensors.write_checkpoint(directory / "state", backend.source)
        write_atomically(directory / "config.yaml", dump_config(config))
        for case, batches in enumerate(cases):
            for step, batch in enumerate(batches):
                save_file(_arrays(batch), directory / f"case-{case}-batch-{step}.safetensors")
        write_atomically(directory / "ports", json.dumps(_free_ports(len(cases) * len(PROCESSES))))
        words = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        words += [f"--nproc-per-node={N_PROCESSES}", "-m", "parity.rank_worker", name]
        done = subprocess.run(words, capture_output=True, encoding="utf-8", errors="replace")
        if done.returncode:
            raise InputError(f"torchrun failed: {done.stderr[-1000:]}")
        return [
            {
                f"torch, {strategy}, {mesh}": _read_outline(directory / f"case-{case}-{mesh}")
                for strategy, mesh in PROCESSES.items()
            }
            for case in range(len(cases))
        ]


def _free_ports(count: int) -> list[int]:
    """Return distinct ports that no process uses."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _read_outline(path: Path) -> Outline:
    parts: dict[str, Arrays] = {}
    for key, value in load_file(path).items():
        part, _, name = key.partition("/")
        parts.setdefault(part, {})[name] = value
    single = {part: parts[part][""] for part in ("losses", "norms")}
    return Outline(**(parts | single))  # type: ignore[arg-type]  # arrays, and trees of arrays


def _arrays(batch: Batch[np.ndarray]) -> Arrays:
    arrays = batch._asdict().items()
    return {name: np.ascontiguousarray(a) for name, a in arrays if a is not None}


def train_on_rank(directory: Path) -> None:
    """Train the cases in a directory on this rank; the first rank writes the results there."""
    config = load_config(directory / "config.yaml")
    backend = TorchBackend(safetensors.open_checkpoint(directory / "state"))
    n_cases = len(list(directory.glob("case-*-batch-0.safetensors")))
    cases = list(product(range(n_cases), PROCESSES.values()))
    # A store for each case: in that of an earlier one, processes find addresses that are closed.
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
    for (case, mesh), port in zip(
        cases, json.loads((directory / "ports").read_text("utf-8")), strict=True
    ):
        os.environ["MASTER_PORT"] = str(port)
        files = [directory / f"case-{case}-batch-{step}.safetensors" for step in range(STEPS)]
        here = replace(config, parallel=replace(config.parallel, mesh=mesh))
        found = Outline.of(backend.steps(here, [Batch(**load_file(file)) for file in files]))
        results: Arrays = {}
        for part, value in vars(found).items():
            trees = value if isinstance(value, dict) else {"": value}
            results |= {f"{part}/{name}": np.ascontiguousarray(a) for name, a in trees.items()}
        if backend.is_main:
            save_file(results, directory / f"case-{case}-{mesh}")
