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
from mooshak.plan import Plan, memory_traffic, ranked, step_times
from mooshak_jax.distributed.mesh import Parallel, make_parallel
from mooshak_jax.hlo import Collective, collectives
from mooshak_jax.model import PARAM_DTYPE
from mooshak_jax.objectives import make_objective
from mooshak_jax.step import abstract_state, make_train_step, set_matmul_precision


def plan(config: Config, topology: str) -> Plan:
    """The plan of one mesh. Raises `InputError` for a topology or a mesh that cannot be."""
    device, devices = machine(topology)
    parallel = make_parallel(config, devices)
    if parallel.mesh.size != len(devices):
        raise InputError(
            f"mesh {config.parallel.mesh} has {parallel.mesh.size} devices, {topology} has "
            f"{len(devices)}; give an axis -1"
        )
    set_matmul_precision(config)
    state = abstract_state(config, parallel)
    parts = {"parameters": held(state["params"])}
    parts["optimizer"] = sum(held(state[moment]) for moment in MOMENTS)
    flops = config.model.flops_per_token(config.T) * config.T * config.train.batch_size
    layout = ",".join(f"{axis}={size}" for axis, size in parallel.mesh.shape.items() if size > 1)
    common: dict[str, Any] = {
        "machine": f"{len(devices)} x TPU {topology.partition(':')[0]} ({topology})",
        "layout": layout or "data=1",
        "device": device,
        "n_devices": len(devices),
        "flops": flops,
    }
    try:
        compiled = lowered(config, parallel).compile()
    except jax.errors.JaxRuntimeError as error:
        used, capacity = _refused(error, sum(parts.values()))
        parts["temporaries"] = used - sum(parts.values())
        return Plan(**common, memory=parts, capacity=capacity, moved=None)
    stats = compiled.memory_analysis()
    kept = activations(config, parallel)
    arguments = stats.argument_size_in_bytes - sum(parts.values())
    parts["activations"] = min(kept, stats.temp_size_in_bytes)
    parts["temporaries"] = stats.temp_size_in_bytes - parts["activations"]
    results = stats.output_size_in_bytes - stats.alias_size_in_bytes
    parts["batch, padding, program"] = arguments + results + stats.generated_code_size_in_bytes
    found = collectives(compiled.as_text())
    moved: dict[str, float] = defaultdict(float)
    for collective in found:
        moved[collective.kind] += collective.moved
    sizes = parallel.sizes
    traffic = memory_traffic(
        config,
        rows=config.train.batch_size // parallel.dp_size,
        cut=sizes["fsdp"] * sizes["tensor"],
        tensor=sizes["tensor"],
    )
    links = sum(c.moved / bandwidth(c, device, parallel, topology) for c in found)
    return Plan(
        **common,
        memory=parts,
        capacity=int(device.memory),
        moved={kind: round(size) for kind, size in moved.items()},
        times=step_times(config, device, len(devices), traffic, links),
    )


def sweep(config: Config, topology: str) -> list[Plan]:
    """The plans of all meshes of a topology that go with the model and the batch, best first."""
    _, devices = machine(topology)
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
        raise InputError(f"no mesh of {topology} goes with this model and batch: {reasons[0]}")
    return ranked(plans)


def machine(topology: str) -> tuple[Device, list[Any]]:
    """The figures and the devices of a slice like v5e:4x4; raises `InputError` if there is none."""
    name, _, shape = topology.partition(":")
    if name not in DEVICES or not DEVICES[name].torus or not re.fullmatch(r"\d+(x\d+)*", shape):
        known = ", ".join(name for name, device in DEVICES.items() if device.torus)
        raise InputError(
            f"topology {topology!r} must be KIND:SHAPE like v5e:4x4; kinds are {known}"
        )
    # A host has 2 x 2 chips, or fewer where the slice is smaller.
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
    """The real train step for abstract arguments that lie on the mesh."""
    batch = abstract_batch(config, config.train.batch_size, parallel.batch_sharding)
    rate = jax.ShapeDtypeStruct((), PARAM_DTYPE[config.train.dtype], sharding=parallel.replicated)
    step: Any = make_train_step(config, parallel)
    return step.lower(abstract_state(config, parallel), batch, rate)


def abstract_batch(config: Config, n_rows: int, sharding: Any = None) -> Batch:
    """Shapes and dtypes of a batch of `n_rows` rows."""
    array_BT = jax.ShapeDtypeStruct((n_rows, config.T), jnp.int32, sharding=sharding)
    return Batch(*[array_BT] * (4 if config.data.document_mask else 2))


def held(tree: Any) -> int:
    """Bytes of one device's shards of a tree of arrays."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def activations(config: Config, parallel: Parallel) -> int:
    """Bytes that a device keeps from the forward pass for the backward pass of one micro-batch.

    They are what JAX's differentiation keeps, without parameters and what is made of them alone;
    every one of them has the batch as an axis, and is cut over the whole mesh.
    """
    train = config.train
    rows = train.batch_size // train.gradient_accumulation_steps
    params = abstract_state(config, parallel)["params"]
    objective = make_objective(config.model, config)

    def residuals(params: Any, batch: Any) -> Any:
        with parallel.activate():
            return jax.vjp(lambda p: objective(p, batch), params)[1]

    kept = jax.tree.leaves(jax.eval_shape(residuals, params, abstract_batch(config, rows)))
    weights = {leaf.shape for leaf in jax.tree.leaves(params)}
    total = sum(math.prod(a.shape) * a.dtype.itemsize for a in kept if a.shape not in weights)
    return total // parallel.mesh.size


def bandwidth(collective: Collective, device: Device, parallel: Parallel, topology: str) -> float:
    """Bytes per second that a device of the collective can send to the others of its group.

    In every dimension of the torus in which the group extends it has a link, and two where the
    slice is closed to a ring.
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


def _refused(error: Exception, state: int) -> tuple[int, int]:
    """What a program needs and what there is, in bytes, where the compiler says it is too large.

    It counts temporaries alone, or all that the program needs.
    """
    beside = re.search(r"temporaries \((.*?)\) exceeds available HBM \((.*?)\)", str(error))
    sizes = beside or re.search(r"Used (\S+) of (\S+) hbm", str(error))
    if sizes is None:
        raise error
    units = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    used, capacity = (int(float(size[:-1]) * units[size[-1]]) for size in sizes.groups())
    return used + (state if beside else 0), capacity


def _divisors(n: int) -> list[tuple[int, int]]:
    return [(a, b) for a in range(1, n + 1) for b in range(1, n + 1) if n % (a * b) == 0]
