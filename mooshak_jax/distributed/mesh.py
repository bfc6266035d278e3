"""Processes and devices of the JAX side: one mesh, `--mesh data=2,fsdp=2,tensor=2`, and where
arrays lie on it.

`RULES` is the one table of what is cut over which axes of the mesh. Parameters say their logical
axes where they are made (mooshak_jax/model.py).
"""

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mooshak.config.sections import Config, check_mesh
from mooshak.data.packing import Batch
from mooshak.errors import InputError
from mooshak.mesh import AXES, mesh_sizes, parse_mesh
from mooshak_jax.distributed.sharding import LOGICAL_AXIS_RULES, partition_spec

SHUTDOWN_SECONDS = 30
"""How long a process that exits waits for the others to exit; then JAX ends all of them."""


@dataclass(frozen=True)
class Parallel:
    """The mesh, and the shardings of what lives on it."""

    mesh: Mesh

    @property
    def is_main(self) -> bool:
        return jax.process_index() == 0

    @property
    def layout(self) -> str:
        """The mesh in the notation of `--mesh`."""
        return ",".join(f"{axis}={size}" for axis, size in self.mesh.shape.items())

    @property
    def replicated(self) -> NamedSharding:
        """Whole on every device: scalars."""
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def rows(self) -> NamedSharding:
        """Cut by rows: batches."""
        return self.sharding("batch")

    @property
    def row_shards(self) -> int:
        """Into how many parts the rows of a batch are cut."""
        return math.prod(self.mesh.shape[axis] for axis in LOGICAL_AXIS_RULES["batch"])

    @property
    def compiler_options(self) -> dict[str, str]:
        """What XLA is told when it compiles a step for these devices.

        On a CPU its own choice is an order of operations that keeps as many as possible ready to
        run beside each other. The order of least memory is faster there, too (docs/performance.md).
        """
        if self.mesh.devices.flat[0].platform != "cpu":
            return {}
        return {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}

    def sharding(self, *axes: str | None) -> NamedSharding:
        """Where an array with these logical axes lies."""
        return NamedSharding(self.mesh, partition_spec(axes))

    def rows_here(self, n_rows: int) -> list[int]:
        """The rows of a batch that this process's devices need, in order.

        Processes that share rows (their devices differ in `tensor` only) name the same ones.
        """
        indices: Mapping[Any, Any] = self.rows.addressable_devices_indices_map((n_rows,))
        return sorted({row for (rows,) in indices.values() for row in range(n_rows)[rows]})

    def shard_local_batch(self, batch: Batch) -> Batch[Array]:
        """A batch of which every process has at least its `rows_here`, in their order."""
        return batch.map(lambda x: jax.make_array_from_process_local_data(self.rows, x))

    def shard_global_batch(self, batch: Batch) -> Batch[Array]:
        """A batch that every process has in full."""
        return batch.map(lambda x: jax.make_array_from_callback(x.shape, self.rows, x.__getitem__))

    def any_process(self, flag: bool) -> bool:
        """Whether the flag is set in any process; all of them ask at the same step."""
        if jax.process_count() == 1:
            return flag
        return bool(multihost_utils.process_allgather(np.array(flag)).any())

    def gather(self, text: str) -> list[str]:
        """What every process says, by rank."""
        if jax.process_count() == 1:
            return [text]
        said = np.frombuffer(text.encode(), np.uint8)
        lengths = multihost_utils.process_allgather(np.int32(len(said)))
        padded = multihost_utils.process_allgather(np.resize(said, max(1, *lengths)))
        return [row[:n].tobytes().decode() for row, n in zip(padded, lengths, strict=True)]

    def broadcast(self, text: str) -> str:
        """What the first process says, to all of them."""
        if jax.process_count() == 1:
            return text
        said = np.frombuffer(text.encode(), np.uint8)
        length = int(multihost_utils.broadcast_one_to_all(np.int32(len(said))))
        told = multihost_utils.broadcast_one_to_all(np.resize(said, length))
        return np.asarray(told).tobytes().decode()

    def barrier(self) -> None:
        """Return when all processes have come here."""
        multihost_utils.sync_global_devices("mooshak")

    def close(self) -> None:
        """Leave the others when all have come here; a process that exits would wait for them."""
        if jax.process_count() > 1:
            jax.distributed.shutdown()

    def activate(self) -> contextlib.AbstractContextManager[Any]:
        """Inside the block, which stands in a compiled function, the model cuts its arrays."""
        return jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh)


def make_parallel(config: Config, devices: Sequence[Any] | None = None) -> Parallel:
    """Join the other processes, if there are any, and lay the mesh over all devices.

    On a CPU, as many devices are made as the mesh needs. `devices` are those of a machine that is
    not there, for a plan. Call it before anything touches a device. Raises `InputError` before
    anything is allocated when the mesh fits neither the devices nor the batch and the model.
    """
    parallel = config.parallel
    if devices is None:
        _join(config)
        devices = _devices(config)
    sizes = mesh_sizes(parallel.mesh, len(devices))
    if jax.process_count() > 1 and math.prod(sizes.values()) != len(devices):
        raise InputError(
            f"mesh {parallel.mesh} has {math.prod(sizes.values())} devices, the "
            f"{jax.process_count()} processes have {len(devices)}; every one must be in it"
        )
    if sizes["data"] % parallel.num_slices:
        raise InputError(
            f"mesh data={sizes['data']} is not divisible by parallel.num_slices "
            f"{parallel.num_slices}: data is the axis that spans slices"
        )
    check_mesh(config, sizes)
    if config.model.dim % sizes["fsdp"]:
        raise InputError(f"model.dim {config.model.dim} is not divisible by fsdp={sizes['fsdp']}")
    return _lay_out(sizes, devices, parallel.num_slices)


def make_mesh(text: str, devices: Sequence[Any]) -> Parallel:
    """Return the mesh of one process without a training, such as `fsdp=2,tensor=2`.

    Raises `InputError` where it is no mesh, or does not divide the devices.
    """
    return _lay_out(mesh_sizes(text, len(devices)), devices)


def _lay_out(sizes: Mapping[str, int], devices: Sequence[Any], num_slices: int = 1) -> Parallel:
    shape = tuple(sizes[axis] for axis in AXES)
    chosen = list(devices)[: math.prod(shape)]
    if chosen[0].platform != "tpu":
        grid = np.array(chosen).reshape(shape)
    elif num_slices > 1:
        within = (shape[0] // num_slices, *shape[1:])
        across = (num_slices, 1, 1)
        grid = mesh_utils.create_hybrid_device_mesh(
            within, across, chosen, allow_split_physical_axes=True
        )
    else:
        grid = mesh_utils.create_device_mesh(shape, chosen, allow_split_physical_axes=True)
    return Parallel(Mesh(grid, AXES))


def _join(config: Config) -> None:
    """Meet the other processes, which the configuration names, or (auto) the TPU or Slurm."""
    parallel = config.parallel
    if parallel.coordinator_address is None or jax.distributed.is_initialized():
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        if parallel.coordinator_address == "auto":
            jax.distributed.initialize(shutdown_timeout_seconds=SHUTDOWN_SECONDS)
        else:
            jax.distributed.initialize(
                parallel.coordinator_address,
                parallel.num_processes,
                parallel.process_id,
                shutdown_timeout_seconds=SHUTDOWN_SECONDS,
            )
    except (ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"parallel.coordinator_address {parallel.coordinator_address}: {reason}"
        ) from error


def _devices(config: Config) -> list[Any]:
    """All devices; of a CPU, cut into as many as the mesh needs, those that it needs."""
    n_processes = config.parallel.num_processes or 1
    needed = max(1, math.prod(parse_mesh(config.parallel.mesh).values()))
    wanted = config.parallel.cpu_devices or -(-needed // n_processes)
    made: int = jax.config.jax_num_cpu_devices  # type: ignore[attr-defined]  # set at run time
    if wanted > made:
        # JAX refuses once its devices are counted; what they are then is looked at afterwards.
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", wanted)
    devices = jax.devices()
    alone = jax.process_count() == 1 and devices[0].platform == "cpu"
    return devices[:wanted] if alone else devices
