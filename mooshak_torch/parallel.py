"""Processes and devices of the torch side: one process, or DDP under torchrun."""

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mooshak.config import Config
from mooshak.errors import InputError


@dataclass(frozen=True)
class Parallel:
    """Where this process stands among all of them."""

    rank: int
    world: int
    device: torch.device
    saving: dist.ProcessGroup | None = None
    """Process group in which checkpoints are written beside the training."""

    @property
    def main(self) -> bool:
        return self.rank == 0

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module with its gradients averaged over the processes."""
        if self.world == 1:
            return module
        devices = [self.device] if self.device.type == "cuda" else None
        return DistributedDataParallel(module, device_ids=devices)

    def without_reduction(self, module: nn.Module, when: bool) -> AbstractContextManager[None]:
        """Leave gradients unreduced inside the block (all micro-batches but the last)."""
        if when and isinstance(module, DistributedDataParallel):
            return module.no_sync()
        return nullcontext()

    def sum(self, values: Tensor) -> Tensor:
        """Sum over the processes, in place."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def close(self) -> None:
        """Leave the process group."""
        if self.world > 1:
            dist.destroy_process_group()


def make_parallel(config: Config) -> Parallel:
    """Join the other processes that torchrun started, if it did.

    Raises `InputError` before anything is allocated when the batch cannot be divided.
    """
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    strategy = config.parallel.strategy
    if strategy == "ddp" and "WORLD_SIZE" not in os.environ:
        raise InputError("parallel.strategy ddp needs processes: start with torchrun")
    if strategy == "single" and world > 1:
        raise InputError(
            f"parallel.strategy single, but torchrun started {world} processes; use ddp"
        )
    rows = config.train.batch_size
    if rows % (world * config.train.accumulation):
        raise InputError(
            f"train.batch_size {rows} is not divisible by {world} processes x train.accumulation "
            f"{config.train.accumulation}"
        )
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        return Parallel(rank, world, device, dist.new_group(backend="gloo"))
    return Parallel(rank, world, device)
