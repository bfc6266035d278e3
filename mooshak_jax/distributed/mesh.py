"""Processes and devices in JAX: one mesh, `--mesh data=2,fsdp=2,tensor=2`.

Mirror: mooshak_torch/distributed/mesh.py. `data` replicates the model, `fsdp` shards parameters,
gradients and optimizer state, and both shard the batch. `tensor` shards heads, MLP width and
vocabulary. mooshak_jax/distributed/sharding.py has the table of what is sharded over which axes.
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

from mooshak.config.mesh_checks import check_mesh
from mooshak.config.model import ModelConfig
from mooshak.config.sections import Config, ParallelConfig
from mooshak.data.packing import Batch
from mooshak.errors import InputError
from mooshak.mesh import AXES, mesh_sizes, mesh_text, parse_mesh
from mooshak_jax.distributed.sharding import LOGICAL_AXIS_RULES, partition_spec

SHUTDOWN_SECONDS = 30
"""Seconds that a process waits at exit for the others; then JAX ends all of them."""


@dataclass(frozen=True)
class Parallel:
    """This process, and the mesh of all devices with the shardings of arrays on it."""

    mesh: Mesh

    @property
    def rank(self) -> int:
        """Index of this process."""
        return jax.process_index()

    @property
    def sizes(self) -> dict[str, int]:
        """Mesh axis -> size; the product is the number of devices."""
        return dict(self.mesh.shape)

    @property
    def is_main(self) -> bool:
        """True for the first process."""
        return self.rank == 0

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return jax.process_count()

    @property
    def layout(self) -> str:
        """Mesh in the notation of `--mesh`."""
        return mesh_text(self.sizes)

    @property
    def dp_size(self) -> int:
        """Number of shards of the batch."""
        return math.prod(self.sizes[axis] for axis in LOGICAL_AXIS_RULES["batch"])

    @property
    def replicated(self) -> NamedSharding:
        """Sharding of scalars: a copy on every device."""
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def batch_sharding(self) -> NamedSharding:
        """Sharding of batches: by rows."""
        return self.sharding("batch")

    @property
    def compiler_options(self) -> dict[str, str]:
        """Options of XLA for a step on these devices.

        On a CPU XLA by default orders operations for concurrency. The order of least memory is
        faster, too (docs/performance.md).
        """
        if self.mesh.devices.flat[0].platform != "cpu":
            return {}
        return {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}

    def sharding(self, *axes: str | None) -> NamedSharding:
        """Return the sharding of an array with these logical axes."""
        return NamedSharding(self.mesh, partition_spec(axes))

    def rows(self, batch_size: int) -> list[int]:
        """Return the rows of the global batch that this process reads.

        Processes whose devices differ only in `tensor` read the same rows.
        """
        indices: Mapping[Any, Any] = self.batch_sharding.addressable_devices_indices_map(
            (batch_size,)
        )
        return sorted({row for (rows,) in indices.values() for row in range(batch_size)[rows]})

    def shard_local_batch(self, batch: Batch) -> Batch[Array]:
        """Return the global batch from NumPy arrays of this process's `rows`."""
        sharding = self.batch_sharding
        return batch.map(lambda x: jax.make_array_from_process_local_data(sharding, x))

    def shard_global_batch(self, batch: Batch) -> Batch[Array]:
        """Return the global batch from NumPy arrays that every process has in full."""
        sharding = self.batch_sharding
        return batch.map(lambda x: jax.make_array_from_callback(x.shape, sharding, x.__getitem__))

    def any_process(self, flag: bool) -> bool:
        """Return whether any process has set the flag; a collective of all processes."""
        if self.world_size == 1:
            return flag
        return bool(multihost_utils.process_allgather(np.array(flag)).any())

    def gather(self, text: str) -> list[str]:
        """Return the text of every process, by rank."""
        if self.world_size == 1:
            return [text]
        data = np.frombuffer(text.encode(), np.uint8)
        lengths = multihost_utils.process_allgather(np.int32(len(data)))
        padded = multihost_utils.process_allgather(np.resize(data, max(1, *lengths)))
        return [row[:n].tobytes().decode() for row, n in zip(padded, lengths, strict=True)]

    def broadcast(self, text: str) -> str:
        """Return the first process's text in all processes."""
        if self.world_size == 1:
            return text
        data = np.frombuffer(text.encode(), np.uint8)
        length = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
        data = multihost_utils.broadcast_one_to_all(np.resize(data, length))
        return np.asarray(data).tobytes().decode()

    def barrier(self) -> None:
        """Wait until all processes have called this."""
        multihost_utils.sync_global_devices("mooshak")

    def close(self) -> None:
        """Disconnect once all processes have called this; otherwise an exit waits for them."""
        if self.world_size > 1:
            jax.distributed.shutdown()

    def activate(self) -> contextlib.AbstractContextManager[Any]:
        """Enable `constrain` and `gather` of the model inside the block, in a compiled function."""
        return jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh)


def make_parallel(config: Config, devices: Sequence[Any] | None = None) -> Parallel:
    """Join the other processes, if any, and return the mesh of all devices.

    On a CPU it creates as many devices as the mesh needs. A plan passes the `devices` of an absent
    machine. Call it before anything uses a device. Raises `InputError`, before anything is
    allocated, if the mesh, the devices, the batch and the model do not fit together.
    """
    parallel = config.parallel
    if devices is None:
        join(parallel)
        devices = _devices(config)
    sizes = mesh_sizes(parallel.mesh, len(devices))
    _check_all_used(sizes, len(devices))
    if sizes["data"] % parallel.num_slices:
        raise InputError(
            f"mesh data={sizes['data']} is not divisible by parallel.num_slices "
            f"{parallel.num_slices}: data is the axis that spans slices"
        )
    check_mesh(config, sizes)
    check_fsdp(config.model, sizes)
    return _arrange(sizes, devices, parallel.num_slices)


def make_mesh(text: str, devices: Sequence[Any]) -> Parallel:
    """Return a mesh like `fsdp=2,tensor=2` over the devices of one process, or of all of several.

    Raises `InputError` if the text is not a mesh, or does not divide the devices.
    """
    sizes = mesh_sizes(text, len(devices))
    _check_all_used(sizes, len(devices))
    return _arrange(sizes, devices)


def check_fsdp(model: ModelConfig, sizes: Mapping[str, int]) -> None:
    """Raise `InputError` unless the axis fsdp divides the model's width."""
    if model.dim % sizes["fsdp"]:
        raise InputError(f"model.dim {model.dim} is not divisible by fsdp={sizes['fsdp']}")


def _check_all_used(sizes: Mapping[str, int], n_devices: int) -> None:
    """Raise `InputError` unless the mesh has every device of several processes."""
    if jax.process_count() > 1 and math.prod(sizes.values()) != n_devices:
        raise InputError(
            f"mesh {mesh_text(sizes)} has {math.prod(sizes.values())} devices, the "
            f"{jax.process_count()} processes have {n_devices}; every one must be in it"
        )


def _arrange(sizes: Mapping[str, int], devices: Sequence[Any], num_slices: int = 1) -> Parallel:
    """Arrange devices by their interconnect: `num_slices` spans the axis data."""
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


def join(parallel: ParallelConfig) -> None:
    """Join the other processes, if any, by the configuration or (auto) by TPU or Slurm metadata.

    Call it before anything uses a device. Raises `InputError` if that fails.
    """
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
    """Return all devices; of a single CPU process, as many virtual ones as the mesh needs."""
    n_processes = config.parallel.num_processes or 1
    n_needed = max(1, math.prod(parse_mesh(config.parallel.mesh).values()))
    n_wanted = config.parallel.cpu_devices or -(-n_needed // n_processes)
    n_now: int = jax.config.jax_num_cpu_devices  # type: ignore[attr-defined]  # set at run time
    if n_wanted > n_now:
        # JAX raises an error once devices exist; `mesh_sizes` then checks their number.
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", n_wanted)
    devices = jax.devices()
    single = jax.process_count() == 1 and devices[0].platform == "cpu"
    return devices[:n_wanted] if single else devices
