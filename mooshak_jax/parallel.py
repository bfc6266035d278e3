"""Devices of the JAX side: one mesh, `--mesh data=2`, and where arrays lie on it."""

import contextlib
import re
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mooshak.config import Config
from mooshak.errors import InputError

AXES = ("data",)


@dataclass(frozen=True)
class Parallel:
    """The mesh, and the shardings of what lives on it."""

    mesh: Mesh

    @property
    def main(self) -> bool:
        return jax.process_index() == 0

    @property
    def replicated(self) -> NamedSharding:
        """Whole on every device: parameters and optimizer state."""
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def rows(self) -> NamedSharding:
        """Cut by rows over the axis `data`: batches."""
        return NamedSharding(self.mesh, PartitionSpec("data"))

    def put(self, batch_BS: np.ndarray) -> jax.Array:
        """This process's rows of a batch, as its part of the global array."""
        return jax.make_array_from_process_local_data(self.rows, batch_BS)


def make_parallel(config: Config) -> Parallel:
    """The mesh of the configuration; on a CPU, as many devices are made as it needs.

    Call it before anything touches a device. Raises `InputError` when the mesh does not divide the
    devices or the batch.
    """
    sizes = parse_mesh(config.parallel.mesh)
    wanted = config.parallel.cpu_devices or sizes.get("data", 1)
    made: int = jax.config.jax_num_cpu_devices  # type: ignore[attr-defined]  # set at run time
    if wanted > made:
        # JAX refuses once its devices are counted; what they are then is looked at below.
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", wanted)
    devices = jax.devices()
    data = sizes.get("data", -1)
    if data == -1:
        data = len(devices)
    if data > len(devices) or len(devices) % data:
        raise InputError(
            f"mesh data={data} does not divide the {len(devices)} devices here; choose another "
            "--parallel.mesh, or --parallel.cpu_devices on a CPU"
        )
    rows = config.train.batch_size
    if rows % (data * config.train.accumulation):
        raise InputError(
            f"train.batch_size {rows} is not divisible by mesh data={data} x train.accumulation "
            f"{config.train.accumulation}"
        )
    return Parallel(Mesh(np.array(devices[:data]), AXES))


def parse_mesh(text: str) -> dict[str, int]:
    """`data=2` -> {"data": 2}; one size may be -1, for all the devices that are left."""
    sizes: dict[str, int] = {}
    for part in filter(None, text.split(",")):
        match = re.fullmatch(r"(\w+)=(-1|[1-9]\d*)", part.strip())
        if not match or match[1] not in AXES or match[1] in sizes:
            raise InputError(f"mesh {text!r}: expected axis=size with the axes {', '.join(AXES)}")
        sizes[match[1]] = int(match[2])
    return sizes
