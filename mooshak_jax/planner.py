"""The training planner for TPUs: memory of a device, bytes sent, and the bottleneck of a step.

The real train step is compiled for the slice by the TPU's own compiler (libtpu, extra `tpu`).
"""

import math
import re
from collections import defaultdict
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies

from mooshak.checkpoints.base import MOMENTS
from mooshak.config.sections import Config
from mooshak.data.packing import Batch
from mooshak.errors import InputError
from mooshak.hardware import DEVICES, Device
from mooshak.mesh import mesh_text
from mooshak.plan import (
    Plan,
    batch_arrays,
    memory_traffic,
    ranked,
    step_flops,
    step_times,
)
from mooshak_jax.distributed.mesh import Parallel, make_parallel
from mooshak_jax.hlo import Collective, collectives
from mooshak_jax.model import PARAM_DTYPE
from mooshak_jax.objectives import make_objective
from mooshak_jax.params import join, split_trained
from mooshak_jax.step import abstract_state, make_train_step, set_matmul_precision


def plan(config: Config, topology: str) -> Plan:
    """Return the plan of the configured mesh on a TPU slice like v5e:4x4.

    Raises `InputError` for an unknown topology, or a mesh that does not fit.
    """
    device, devices = find_topology(topology)
    parallel = make_parallel(config, devices)
    if parallel.mesh.size != len(devices):
        raise InputError(
            f"mesh {config.parallel.mesh} has {parallel.mesh.size} devices, {topology} has "
            f"{len(devices)}; set one axis to -1"
        )
    set_matmul_precision(config)
    state = abstract_state(config, parallel)
    memory = {"parameters": shard_bytes(state["params"])}
    memory["optimizer"] = sum(shard_bytes(state[moment]) for moment in MOMENTS)
    state_bytes = sum(memory.values())
    common: dict[str, Any] = {
        "machine": f"{len(devices)} x TPU {topology.partition(':')[0]} ({topology})",
        "layout": mesh_text(parallel.sizes),
        "device": device,
        "n_devices": len(devices),
        "flops": step_flops(config),
    }
    try:
        compiled = lowered(config, parallel).compile()
    except jax.errors.JaxRuntimeError as error:
        used, capacity = _out_of_memory(error, state_bytes)
        memory["temporaries"] = used - state_bytes
        return Plan(**common, memory=memory, capacity=capacity, bytes_sent=None)
    stats = compiled.memory_analysis()
    arguments = stats.argument_size_in_bytes - state_bytes
    memory["activations"] = min(activation_bytes(config, parallel), stats.temp_size_in_bytes)
    memory["temporaries"] = stats.temp_size_in_bytes - memory["activations"]
    results = stats.output_size_in_bytes - stats.alias_size_in_bytes
    memory["batch, padding, program"] = arguments + results + stats.generated_code_size_in_bytes
    found = collectives(compiled.as_text())
    bytes_sent: dict[str, float] = defaultdict(float)
    for collective in found:
        bytes_sent[collective.kind] += collective.bytes_sent
    sizes = parallel.sizes
    traffic = memory_traffic(
        config,
        rows=config.train.batch_size // parallel.dp_size,
        n_shards=sizes["fsdp"] * sizes["tensor"],
        tensor=sizes["tensor"],
    )
    links = sum(c.bytes_sent / bandwidth(c, device, parallel, topology) for c in found)
    return Plan(
        **common,
        memory=memory,
        capacity=int(device.memory),
        bytes_sent={kind: round(size) for kind, size in bytes_sent.items()},
        times=step_times(config, device, len(devices), traffic, links),
    )


def sweep(config: Config, topology: str) -> list[Plan]:
    """Return the plans of all meshes of a topology that fit the model and the batch, best first.

    Raises `InputError` if there are none.
    """
    _, devices = find_topology(topology)
    plans, reasons = [], []
    for data, fsdp in _divisors(len(devices)):
        mesh = f"data={data},fsdp={fsdp},tensor={len(devices) // (data * fsdp)}"
        try:
            plans.append(
                plan(replace(config, parallel=replace(config.parallel, mesh=mesh)), topology)
            )
        except InputError as error:
            reasons.append(str(error))
    if not plans:
        raise InputError(f"no mesh of {topology} fits this model and batch: {reasons[0]}")
    return ranked(plans)


def find_topology(topology: str) -> tuple[Device, list[Any]]:
    """Return the specification and the devices of a TPU slice like v5e:4x4.

    Raises `InputError` for an unknown slice, or without libtpu.
    """
    name, _, shape = topology.partition(":")
    if name not in DEVICES or not DEVICES[name].torus or not re.fullmatch(r"\d+(x\d+)*", shape):
        known = ", ".join(name for name, device in DEVICES.items() if device.torus)
        raise InputError(
            f"topology {topology!r} must be KIND:SHAPE like v5e:4x4; kinds are {known}"
        )
    # A host has 2 x 2 chips, or fewer in a smaller slice.
    x, y, *_ = (*map(int, shape.split("x")), 1)
    hosts = (min(x, 2), min(y, 2), 1)
    try:
        slice_ = topologies.get_topology_desc(topology, "tpu", chips_per_host_bounds=hosts)
        return DEVICES[name], slice_.devices
    except jax.errors.JaxRuntimeError as error:
        raise InputError(f"topology {topology}: {str(error).splitlines()[0]}") from error
    except Exception as error:
        raise InputError(
            f"the TPU compiler cannot be loaded ({error}); install the extra `tpu`"
        ) from error


def lowered(config: Config, parallel: Parallel) -> Any:
    """Return the train step, lowered for abstract arguments on the mesh."""
    batch = abstract_batch(config, config.train.batch_size, parallel.batch_sharding)
    rate = jax.ShapeDtypeStruct((), PARAM_DTYPE[config.train.dtype], sharding=parallel.replicated)
    step: Any = make_train_step(config, parallel)
    return step.lower(abstract_state(config, parallel), batch, rate)


def abstract_batch(config: Config, n_rows: int, sharding: Any = None) -> Batch:
    """Return shapes, dtypes and sharding of a batch of `n_rows` rows."""
    dtypes = {int: jnp.int32, float: jnp.float32}
    return Batch(
        **{
            name: jax.ShapeDtypeStruct(shape, dtypes[kind], sharding=sharding)
            for name, (kind, shape) in batch_arrays(config, n_rows).items()
        }
    )


def shard_bytes(tree: Any) -> int:
    """Return the bytes of one device's shards of a tree of arrays."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def activation_bytes(config: Config, parallel: Parallel) -> int:
    """Return the bytes that a device saves for the backward pass of one micro-batch.

    These are the residuals of `jax.vjp` but for parameters and values computed from parameters
    only; each has the batch as an axis and is sharded over the full mesh.
    """
    train = config.train
    rows = train.batch_size // train.gradient_accumulation_steps
    params = abstract_state(config, parallel)["params"]
    trained, frozen = split_trained(params, config.frozen)
    objective = make_objective(config.model, config)

    def residuals(trained: Any, frozen: Any, batch: Any) -> Any:
        with parallel.activate():
            return jax.vjp(lambda p: objective(join(p, frozen), batch), trained)[1]

    batch = abstract_batch(config, rows)
    saved = jax.tree.leaves(jax.eval_shape(residuals, trained, frozen, batch))
    weights = {leaf.shape for leaf in jax.tree.leaves(params)}
    total = sum(math.prod(a.shape) * a.dtype.itemsize for a in saved if a.shape not in weights)
    return total // parallel.mesh.size


def bandwidth(collective: Collective, device: Device, parallel: Parallel, topology: str) -> float:
    """Return the bytes per second that a device can send within its group of the collective.

    It has one link in each dimension of the torus that the group spans, and two if the slice wraps
    around in that dimension.
    """
    shape = [int(side) for side in topology.partition(":")[2].split("x")]
    places = np.array([d.coords for d in parallel.mesh.devices.flat])
    group = places[list(collective.groups[0])]
    links = 0
    for side, positions in zip(shape, group.T, strict=False):
        extent = len(set(positions.tolist()))
        if extent > 1:
            links += 2 if extent == side and side % device.wrap == 0 else 1
    return device.link * max(1, links)


def _out_of_memory(error: Exception, state_bytes: int) -> tuple[int, int]:
    """Return needed and available bytes, from the compiler's error for a program too large.

    The compiler reports temporaries only, or the total. Reraises any other error.
    """
    temporaries = re.search(r"temporaries \((.*?)\) exceeds available HBM \((.*?)\)", str(error))
    sizes = temporaries or re.search(r"Used (\S+) of (\S+) hbm", str(error))
    if sizes is None:
        raise error
    units = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    used, capacity = (int(float(size[:-1]) * units[size[-1]]) for size in sizes.groups())
    return used + (state_bytes if temporaries else 0), capacity


def _divisors(n: int) -> list[tuple[int, int]]:
    """Return all pairs (a, b) whose product divides n."""
    return [(a, b) for a in range(1, n + 1) for b in range(1, n + 1) if n % (a * b) == 0]
