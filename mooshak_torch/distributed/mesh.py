"""Processes and devices in PyTorch: one mesh, `--mesh data=2,fsdp=2,tensor=2`.

Mirror: mooshak_jax/distributed/mesh.py. `data` replicates the model (DDP; with fsdp: HSDP), `fsdp`
shards parameters, gradients and optimizer state (FSDP2), and both shard the batch. `tensor` shards
heads, MLP width and vocabulary.
"""

import math
import os
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from mooshak.config.mesh_checks import check_mesh
from mooshak.config.sections import Config
from mooshak.data.packing import Batch
from mooshak.errors import InputError, PeerError
from mooshak.mesh import AXES, mesh_sizes, mesh_text, parse_mesh
from mooshak_torch.distributed import deepspeed

DEFAULT_MESHES = {
    "single": "data=1",
    "ddp": "data=-1",
    "fsdp": "fsdp=-1",
    "deepspeed": "data=-1",
    "hsdp": "data=-1,fsdp={local}",
}
"""Strategy -> its default mesh; `local` is the number of processes on this machine."""

COLLECTIVES = "^(all_(reduce|gather|to_all)|reduce_scatter|broadcast|barrier)"
"""Names of functions that wait for other processes."""
WAITING = "timed? ?out|connection (closed|reset)|connection was|broken pipe|socket|abort"
"""Messages of their errors when another process has failed."""


@dataclass(frozen=True)
class Parallel:
    """This process, its device, and the mesh of all processes."""

    rank: int
    """Index of this process."""
    sizes: dict[str, int]
    """Mesh axis -> size; the product is the number of processes."""
    device: torch.device
    strategy: str = "single"
    """single, ddp, fsdp (HSDP and tensor parallelism included) or deepspeed."""
    mesh: DeviceMesh | None = None
    """None without torchrun: a single process."""
    checkpoint_group: dist.ProcessGroup | None = None
    """Process group for saves in the background, apart from the collectives of training."""

    @property
    def is_main(self) -> bool:
        """True for the first process."""
        return self.rank == 0

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return math.prod(self.sizes.values())

    @property
    def layout(self) -> str:
        """Mesh in the notation of `--mesh`."""
        return mesh_text(self.sizes)

    @property
    def dp_size(self) -> int:
        """Number of shards of the batch."""
        return self.sizes["data"] * self.sizes["fsdp"]

    @property
    def dp_rank(self) -> int:
        """Index of this process's shard of the batch."""
        return self.rank // self.sizes["tensor"]

    def rows(self, batch_size: int) -> range:
        """Return the rows of the global batch that this process reads.

        Processes that differ only in `tensor` read the same rows.
        """
        size = batch_size // self.dp_size
        return range(self.dp_rank * size, (self.dp_rank + 1) * size)

    @contextmanager
    def explain_timeouts(self) -> Iterator[None]:
        """Raise `PeerError` where a wait for other processes fails inside the block.

        The message names this process and the collective. NCCL's watchdog does so itself, and ends
        the process.
        """
        try:
            yield
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            if self.mesh is None or not re.search(WAITING, str(error), re.IGNORECASE):
                raise
            frames = [frame.name for frame in traceback.extract_tb(error.__traceback__)]
            called = [name for name in frames if re.search(COLLECTIVES, name)]
            where = called[-1] if called else "all_reduce of gradients, in the backward pass"
            raise PeerError(
                f"rank {self.rank} of {self.world_size} waited in {where} for another process, "
                f"which exited or exceeded parallel.timeout: {reason}"
            ) from error

    def shard_local_batch(self, batch: Batch) -> Batch[Tensor]:
        """Copy a batch of NumPy arrays, this process's `rows`, to its device; ids as int64."""

        def copy(array: np.ndarray) -> Tensor:
            tensor = torch.from_numpy(array).to(self.device)
            return tensor if tensor.is_floating_point() else tensor.long()

        return batch.map(copy)

    def sum(self, values: Tensor) -> Tensor:
        """Sum values over the shards of the batch, in place."""
        if self.mesh is not None:
            dist.all_reduce(values)
        return values.div_(self.sizes["tensor"])

    def any_process(self, flag: bool) -> bool:
        """Return whether any process has set the flag; a collective of all processes."""
        return self.sum(torch.tensor(float(flag), device=self.device)).item() > 0

    def gather(self, text: str) -> list[str]:
        """Return the text of every process, by rank."""
        texts = [text] * self.world_size
        if self.mesh is not None:
            dist.all_gather_object(texts, text)
        return texts

    def broadcast(self, text: str) -> str:
        """Return the first process's text in all processes."""
        texts = [text]
        if self.mesh is not None:
            with self.explain_timeouts():
                dist.broadcast_object_list(texts, src=0, group=self.checkpoint_group)
        return texts[0]

    def barrier(self) -> None:
        """Wait until all processes have called this."""
        if self.mesh is not None:
            with self.explain_timeouts():
                dist.barrier(self.checkpoint_group)

    def close(self) -> None:
        """Leave the process group, if there is one."""
        if self.mesh is not None and dist.is_initialized():
            dist.destroy_process_group()


def make_parallel(config: Config, device: torch.device | None = None) -> Parallel:
    """Join the processes that torchrun started, if any, and return the mesh of all processes.

    `device` is this process's, by default its GPU if the machine has GPUs, else the CPU.
    Raises `InputError`, before anything is allocated, if the strategy, the mesh, the number of
    processes and the batch do not fit together.
    """
    world, rank = _from_launcher("WORLD_SIZE", 1), _from_launcher("RANK", 0)
    strategy, sizes = _strategy_and_sizes(config, world)
    check_mesh(config, sizes)
    if strategy != "single" and (missing := [n for n in LAUNCHER if not os.environ.get(n)]):
        raise InputError(
            f"WORLD_SIZE is {world} and {', '.join(missing)} not set; start the processes with "
            "torchrun, or unset WORLD_SIZE for a single one"
        )
    if device is None:
        has_gpu, local_rank = torch.cuda.is_available(), _from_launcher("LOCAL_RANK", 0)
        device = torch.device("cuda", local_rank) if has_gpu else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if strategy == "single":
        return Parallel(rank, sizes, device)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        timeout=timedelta(seconds=config.parallel.timeout),
    )
    mesh = init_device_mesh(device.type, tuple(sizes.values()), mesh_dim_names=AXES)
    return Parallel(rank, sizes, device, strategy, mesh, dist.new_group(backend="gloo"))


LAUNCHER = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Environment variables that torchrun sets, and a process group needs."""


def _from_launcher(name: str, default: int) -> int:
    """Return a number from the environment; the default is the lowest one."""
    text = os.environ.get(name, "")
    try:
        value = int(text) if text else default
    except ValueError:
        value = -1
    if value < default:
        raise InputError(
            f"the environment variable {name} is {text!r}, not an integer of at least {default}; "
            "unset it"
        )
    return value


def _strategy_and_sizes(config: Config, world: int) -> tuple[str, dict[str, int]]:
    strategy, text = config.parallel.strategy, config.parallel.mesh
    # A cluster's environment may have WORLD_SIZE=1 without a launcher.
    launched = world > 1 or all(os.environ.get(name) for name in LAUNCHER)
    if strategy == "auto" and launched:
        named = parse_mesh(text)
        strategy = "fsdp" if named.get("fsdp", 1) != 1 or named.get("tensor", 1) != 1 else "ddp"
    elif strategy == "auto":
        strategy = "single"
    if strategy == "single" and world > 1:
        raise InputError(
            f"parallel.strategy single, but torchrun started {world} processes; use ddp"
        )
    if strategy != "single" and not launched:
        raise InputError(f"parallel.strategy {strategy} needs torchrun, which starts the processes")
    local = os.environ.get("LOCAL_WORLD_SIZE", str(world))
    text = text or DEFAULT_MESHES[strategy].format(local=local)
    count = math.prod(size for size in parse_mesh(text).values() if size > 0)
    if count != world and (world % count or "-1" not in text):
        raise InputError(
            f"mesh {text} needs {count} processes and there are {world}; start as many with "
            "torchrun, or give one axis the size -1"
        )
    sizes = mesh_sizes(text, world)
    if strategy in ("single", "ddp", "deepspeed") and sizes["data"] != world:
        raise InputError(
            f"parallel.strategy {strategy} has only the axis data, not {mesh_text(sizes)}"
        )
    if config.parallel.cpu_offload and strategy not in ("fsdp", "hsdp"):
        raise InputError(
            f"parallel.cpu_offload requires parallel.strategy fsdp or hsdp, not {strategy}"
        )
    if strategy == "deepspeed":
        deepspeed.check(config)
    return {"hsdp": "fsdp"}.get(strategy, strategy), sizes
