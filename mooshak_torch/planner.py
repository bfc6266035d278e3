"""The training planner for GPUs: memory of the fullest rank, bytes sent, and the bottleneck.

The real modules are built on a mesh of fake processes, and the real forward and backward pass run
on tensors that have shapes and no memory.
"""

import contextlib
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from mooshak import hardware
from mooshak.config.mesh_checks import check_mesh
from mooshak.config.sections import Config
from mooshak.data.packing import Batch
from mooshak.errors import InputError
from mooshak.hardware import Device
from mooshak.mesh import AXES, mesh_sizes, mesh_text
from mooshak.numerics.schedule import has_weight_decay
from mooshak.plan import (
    STRATEGIES,
    Plan,
    batch_arrays,
    memory_traffic,
    ranked,
    step_flops,
    step_times,
)
from mooshak_torch.distributed.fsdp import apply_fsdp
from mooshak_torch.distributed.tensor_parallel import apply_tp
from mooshak_torch.model import COMPUTE_DTYPE, PARAM_DTYPE
from mooshak_torch.objectives import make_objective


def plan(config: Config, gpu: str, gpus: int, strategy: str) -> Plan:
    """Return the plan of one strategy on `gpus` GPUs of the kind `gpu`.

    Raises `InputError` for an unknown device, or a mesh that does not fit.
    """
    device = hardware.device(gpu)
    if device.torus:
        raise InputError(f"{gpu} is a TPU; python -m mooshak_jax.plan plans for those")
    sizes = plan_mesh(config, device, gpus, strategy)
    check_mesh(config, sizes)
    rows = config.train.batch_size // (sizes["data"] * sizes["fsdp"])
    units = parameter_units(config, sizes, strategy)
    memory = memory_parts(config, sizes, strategy, units, rows)
    bytes_sent: dict[str, float] = {}
    seconds = 0.0
    for traffic in collective_traffic(config, sizes, strategy, units, rows):
        bytes_sent[traffic.kind] = bytes_sent.get(traffic.kind, 0) + traffic.bytes_sent
        # Ranks vary fastest in `tensor`, then `fsdp`, then `data`: a short span is within a node.
        within_node = traffic.span <= device.per_node
        seconds += traffic.bytes_sent / (device.link if within_node else device.network)
    n_shards = sizes["fsdp"] * sizes["tensor"]
    hbm_bytes = memory_traffic(config, rows, n_shards=n_shards, tensor=sizes["tensor"])
    layout = strategy if gpus == 1 else f"{strategy} {mesh_text(sizes)}"
    if strategy in ("fsdp", "hsdp") and not config.parallel.reshard_after_forward:
        layout += ", not resharded after forward"
    return Plan(
        machine=f"{gpus} x {gpu}",
        layout=layout,
        device=device,
        n_devices=gpus,
        memory=memory,
        capacity=int(device.memory * USABLE),
        bytes_sent={kind: round(size) for kind, size in bytes_sent.items()},
        flops=step_flops(config),
        times=step_times(config, device, gpus, hbm_bytes, seconds),
    )


USABLE = 0.94
"""Share of a GPU's memory for tensors; the rest is for CUDA, NCCL and fragmentation."""


PERSISTENT = 100_000
"""Largest parameter, in elements, that ZeRO 3 does not shard (DeepSpeed's default)."""
BUCKET = 500_000_000
"""Elements of the buffer in which DeepSpeed reduces gradients (DeepSpeed's default)."""


def sweep(config: Config, gpu: str, gpus: int) -> list[Plan]:
    """Return the plans of all strategies that fit the model and the batch, best first.

    Raises `InputError` if there are none.
    """
    plans, reasons = [], []
    for strategy in STRATEGIES if gpus > 1 else ("single",):
        if strategy == "single" and gpus > 1:
            continue
        for reshard in (True, False) if strategy in ("fsdp", "hsdp") else (True,):
            parallel = replace(config.parallel, reshard_after_forward=reshard)
            try:
                plans.append(plan(replace(config, parallel=parallel), gpu, gpus, strategy))
            except InputError as error:
                reasons.append(str(error))
    if not plans:
        raise InputError(f"no strategy for {gpus} x {gpu} fits this batch: {reasons[0]}")
    return ranked(plans)


def plan_mesh(config: Config, device: Device, gpus: int, strategy: str) -> dict[str, int]:
    """Return mesh axis -> size. Raises `InputError` if the mesh does not fit GPUs and strategy."""
    node = min(gpus, device.per_node)
    text = config.parallel.mesh or STRATEGIES[strategy].format(node=node)
    sizes = mesh_sizes(text, gpus)
    if math.prod(sizes.values()) != gpus:
        raise InputError(f"mesh {text} is for {math.prod(sizes.values())} GPUs, not {gpus}")
    if strategy not in ("fsdp", "hsdp") and sizes["data"] != gpus:
        raise InputError(f"strategy {strategy} has only the axis data, not {text}")
    return sizes


@dataclass(frozen=True)
class Unit:
    """Group of parameters that are gathered and reduced together."""

    name: str
    n_params: int
    """Parameters of the gathered unit on a rank: one `tensor`-th of what that axis shards."""
    n_trained: int
    """Those of them that have a gradient."""
    n_local: int
    """Trained parameters that the first rank stores; no rank stores more."""
    local_bytes: int
    """Bytes of all parameters that the first rank stores."""
    itemsize: int
    """Bytes of a gathered parameter."""
    regathered: bool
    """True if it is gathered again in the backward pass."""


def parameter_units(config: Config, sizes: dict[str, int], strategy: str) -> list[Unit]:
    """Return the units of the first rank, from modules sharded by `apply_tp` and `apply_fsdp`.

    The first rank has the most: uneven shards are longer on lower ranks.
    """
    objective = make_objective(config.model, config)
    wide = PARAM_DTYPE[config.train.dtype].itemsize
    if strategy not in ("fsdp", "hsdp"):
        parameters = list(objective.parameters())
        counts = [p.numel() for p in parameters]
        n_params = sum(counts)
        if strategy != "zero3":
            n_trained = sum(p.numel() for p in parameters if p.requires_grad)
            stored = sum(p.numel() * p.itemsize for p in parameters)
            return [Unit("model", n_params, n_trained, n_trained, stored, wide, regathered=False)]
        n_local = -(-n_params // sizes["data"]) + sum(n for n in counts if n <= PERSISTENT)
        return [Unit("model", n_params, n_params, n_local, wide * n_local, wide, regathered=True)]
    with fake_process_group(math.prod(sizes.values())):
        mesh = init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=AXES)
        if sizes["tensor"] > 1:
            apply_tp(objective, mesh["tensor"], config)
        apply_fsdp(objective, mesh, config)
        return [unit for name, module in objective.named_modules() for unit in _unit(name, module)]


def _unit(name: str, module: nn.Module) -> list[Unit]:
    """Return the unit that FSDP2 gathers for a module: its parameters without nested units."""
    state = getattr(module, "_get_fsdp_state", lambda: None)()
    group = state and state._fsdp_param_group
    if not group:
        return []
    parameters = [item.sharded_param for item in group.fsdp_params]
    dtype = group.mp_policy.param_dtype or parameters[0].dtype
    sizes = [math.prod(item._orig_size) for item in group.fsdp_params]
    return [
        Unit(
            name,
            sum(sizes),
            sum(n for n, p in zip(sizes, parameters, strict=True) if p.requires_grad),
            sum(_local(p) for p in parameters if p.requires_grad),
            sum(_local(p) * p.itemsize for p in parameters),
            dtype.itemsize,
            group._reshard_after_forward,
        )
    ]


def _local(parameter: Any) -> int:
    """Return the number of elements of this rank's shard."""
    return (parameter.to_local() if isinstance(parameter, DTensor) else parameter).numel()


@contextlib.contextmanager
def fake_process_group(world: int) -> Iterator[None]:
    """Make this process rank 0 of a fake group of `world`, whose collectives do nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()


def memory_parts(
    config: Config, sizes: dict[str, int], strategy: str, units: list[Unit], rows: int
) -> dict[str, int]:
    """Return the memory of the fullest rank at the peak of a step: part -> bytes.

    `rows` are the sequences of a rank in a step.
    """
    wide = PARAM_DTYPE[config.train.dtype].itemsize
    n_local, n_params = sum(unit.n_local for unit in units), sum(unit.n_params for unit in units)
    n_trained = sum(unit.n_trained for unit in units)
    sharded = strategy in ("fsdp", "hsdp", "zero3")
    zero_shard = -(-n_params // sizes["data"])
    gradients = n_local
    # ZeRO 1 accumulates full gradients over micro-batches, ZeRO 2 and 3 reduce each micro-batch's.
    if strategy == "zero2" or (
        strategy == "zero1" and config.train.gradient_accumulation_steps == 1
    ):
        gradients = zero_gradients(config, sizes["data"])
    elif strategy == "zero3":
        gradients = zero_shard
    moments = zero_shard if strategy.startswith("zero") else n_local
    micro_batch = rows // config.train.gradient_accumulation_steps
    saved, temporary = activation_bytes(config, micro_batch, sharded)
    # Sequence parallelism also shards activations between matrix products. Without it this divides
    # nothing, an overestimate.
    n_shards = sizes["tensor"] if config.parallel.sequence_parallel else 1
    result = {
        "parameters": sum(unit.local_bytes for unit in units),
        "gradients": wide * gradients,
        "optimizer": 2 * wide * moments,
        "activations": saved // n_shards,
        "temporaries": temporary // n_shards,
    }
    if sharded:
        result["gathered"] = gathered_bytes(config, units)
        if config.train.gradient_accumulation_steps > 1:
            # Gradients that are not reduced yet are not sharded.
            result["gathered"] += wide * n_trained
    elif strategy == "ddp":
        # DDP reduces gradients in its own buckets.
        result["buckets"] = wide * n_trained
    if strategy.startswith("zero"):
        # DeepSpeed updates a copy of its shard.
        result["optimizer"] += wide * zero_shard
        result["buckets"] = wide * BUCKET
    if config.parallel.cpu_offload and strategy in ("fsdp", "hsdp"):
        result |= dict.fromkeys(("parameters", "gradients", "optimizer"), 0)
    return result


def zero_gradients(config: Config, world: int) -> int:
    """Return the gradient elements that the fullest rank of ZeRO 1 or 2 stores, without bucket.

    Matrices and gains are each concatenated and split evenly. Ranks that share a parameter each
    store its full gradient.
    """
    stored = [0] * world
    for decayed in (True, False):
        shapes = config.model.parameter_shapes()
        counts = [
            math.prod(shape) for name, shape in shapes.items() if has_weight_decay(name) == decayed
        ]
        shard, start = -(-sum(counts) // world), 0
        for count in counts:
            for rank in range(start // shard, -(-(start + count) // shard)):
                stored[rank] += count
            start += count
    return max(stored)


def gathered_bytes(config: Config, units: list[Unit]) -> int:
    """Return the bytes of gathered parameters and of communication buffers at the peak.

    FSDP gathers into a buffer and copies out of it; gradients are reduced in the parameters' dtype.
    Layers are gathered `parallel.prefetch` ahead.
    """
    wide = PARAM_DTYPE[config.train.dtype].itemsize
    layers = [unit for unit in units if ".layers." in unit.name or unit.name.startswith("layers.")]
    others = [unit for unit in units if unit not in layers]
    resident = sum(unit.n_params * unit.itemsize for unit in units if not unit.regathered)
    sizes = sorted((u.n_params * u.itemsize for u in layers if u.regathered), reverse=True)
    reduced = wide * max((unit.n_trained for unit in layers), default=0)
    prefetched = sizes[: 1 + config.parallel.prefetch]
    in_layers = sum(prefetched) + max(sizes, default=0) + reduced
    in_others = max(
        2 * u.itemsize * u.n_params + wide * u.n_trained for u in others if u.regathered
    )
    return resident + max(in_layers, in_others)


def activation_bytes(config: Config, rows: int, sharded: bool) -> tuple[int, int]:
    """Return the bytes saved for the backward pass, and those of temporaries beyond them.

    Measured on a forward and backward pass of the objective on `rows` sequences with fake tensors,
    as on one rank. With `sharded` (FSDP) the layers' matrices already have the compute dtype.
    """
    config = replace(config, train=replace(config.train, compile=False))
    objective = make_objective(config.model, config)
    layers = set(objective.model.layers.parameters())
    with FakeTensorMode():
        made: dict[Tensor, Tensor] = {}
        for module in objective.modules():
            for name, like in list(module.named_parameters(recurse=False)):
                narrow = sharded and like in layers and like.ndim == 2
                dtype = COMPUTE_DTYPE[config.train.dtype] if narrow else like.dtype
                if like not in made:
                    value = torch.empty(like.shape, dtype=dtype)
                    made[like] = nn.Parameter(value) if like.requires_grad else value
                if like.requires_grad:
                    setattr(module, name, made[like])
                else:  # The tracker wants a gradient of each parameter.
                    delattr(module, name)
                    module.register_buffer(name, made[like])
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))
        for parameter in made.values():
            # `memory_parts` counts gradients; here each is freed at once.
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(_drop_gradient)
        arrays, dtypes = batch_arrays(config, rows).items(), {int: torch.long, float: torch.float32}
        batch = Batch(**{k: torch.zeros(shape, dtype=dtypes[d]) for k, (d, shape) in arrays})
        tracker = MemTracker()
        tracker.track_external(objective)
        with tracker, warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            loss = objective(batch)
            saved = _total(tracker, "current")
            loss.backward()
            peak = _total(tracker, "peak")
    return saved, peak - saved


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def _total(tracker: MemTracker, when: str) -> int:
    """Return the bytes of all tensors but parameters and buffers, now or at the peak."""
    (sizes,) = tracker.get_tracker_snapshot(when).values()
    parts = {str(getattr(key, "value", key)): size for key, size in sizes.items()}
    return parts["Total"] - parts["Parameter"] - parts["Buffer"]


@dataclass(frozen=True)
class CollectiveTraffic:
    """Collectives of one kind in a step, in groups of the same span."""

    kind: str
    bytes_sent: float
    """Bytes that each rank sends in a step."""
    span: int
    """Ranks from the first to the last of a group, inclusive; decides if it is within a node."""


def collective_traffic(
    config: Config, sizes: dict[str, int], strategy: str, units: list[Unit], rows: int
) -> list[CollectiveTraffic]:
    """Return the bytes that a rank sends in a step, in rings (arXiv:1802.05799, section 3).

    `rows` are the sequences of a rank in a step.
    """
    wide = PARAM_DTYPE[config.train.dtype].itemsize
    data, fsdp, tensor = (sizes[axis] for axis in AXES)
    n_micro_batches = config.train.gradient_accumulation_steps
    full = wide * sum(unit.n_trained for unit in units)
    gathers = sum(u.n_params * u.itemsize * (2 if u.regathered else 1) for u in units)
    gathers *= n_micro_batches
    world = data * fsdp * tensor
    result = []
    if strategy in ("fsdp", "hsdp"):
        share, span = (fsdp - 1) / fsdp, fsdp * tensor
        result.append(CollectiveTraffic("all-gather", gathers * share, span))
        result.append(CollectiveTraffic("reduce-scatter", full * share, span))
        result.append(CollectiveTraffic("all-reduce", 2 * full / fsdp * (data - 1) / data, world))
    elif strategy == "ddp":
        result.append(CollectiveTraffic("all-reduce", 2 * full * (data - 1) / data, world))
    elif strategy != "single":
        # Below stage 3 each rank updates its shard, and the parameters are gathered once.
        share = (data - 1) / data
        gathered = gathers if strategy == "zero3" else full
        result.append(CollectiveTraffic("all-gather", gathered * share, world))
        result.append(CollectiveTraffic("reduce-scatter", full * share, world))
    if tensor > 1:
        model = config.model
        hidden = rows * config.T * model.dim * COMPUTE_DTYPE[config.train.dtype].itemsize
        # Each pass: before attention, before and after the MLP. A third pass with remat full.
        passes = 3 if config.train.remat == "full" else 2
        share = hidden * (tensor - 1) / tensor
        transposed = model.n_layers * passes * share / tensor
        sent = model.n_layers * passes * 3 * share + 4 * share  # 4: embedding and loss.
        result.append(CollectiveTraffic("all-gather, reduce-scatter of activations", sent, tensor))
        result.append(CollectiveTraffic("all-to-all of activations", transposed, tensor))
    return [traffic for traffic in result if traffic.bytes_sent]
