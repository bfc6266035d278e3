"""Devices of the JAX side: one mesh, `--mesh data=2`, and where arrays lie on it."""

import contextlib
import math
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mooshak.config import Config
from mooshak.mesh import check_mesh, mesh_sizes, parse_mesh


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
    wanted = config.parallel.cpu_devices or max(
        1, math.prod(parse_mesh(config.parallel.mesh).values())
    )
    made: int = jax.config.jax_num_cpu_devices  # type: ignore[attr-defined]  # set at run time
    if wanted > made:
        # JAX refuses once its devices are counted; what they are then is looked at below.
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", wanted)
    devices = jax.devices()
    sizes = mesh_sizes(config.parallel.mesh, len(devices))
    check_mesh(config, sizes)
    return Parallel(Mesh(np.array(devices[: sizes["data"]]), ("data",)))
