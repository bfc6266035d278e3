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
from mooshak.config.sections import Config, check_mesh
from mooshak.data.packing import Batch
from mooshak.errors import InputError
from mooshak.hardware import Device
from mooshak.mesh import AXES, mesh_sizes
from mooshak.numerics.schedule import has_weight_decay
from mooshak.plan import STRATEGIES, Plan, memory_traffic, ranked, step_times
from mooshak_torch.distributed.fsdp import apply_fsdp
from mooshak_torch.distributed.tensor_parallel import apply_tp
from mooshak_torch.model import COMPUTE_DTYPE, PARAM_DTYPE
from mooshak_torch.objectives import make_objective


def plan(config: Config, gpu: str, gpus: int, strategy: str) -> Plan:
    """The plan of one strategy. Raises `InputError` for a device or a mesh that cannot be."""
    device = hardware.device(gpu)
    if device.torus:
        raise InputError(f"{gpu} is a TPU; python -m mooshak_jax.plan plans for those")
    sizes = mesh_of(config, device, gpus, strategy)
    check_mesh(config, sizes)
    rows = config.train.batch_size // (sizes["data"] * sizes["fsdp"])
    units = held(config, sizes, strategy)
    parts = memory(config, sizes, strategy, units, rows)
    exchanges = communication(config, sizes, strategy, units, rows)
    moved: dict[str, float] = {}
    seconds = 0.0
    for exchange in exchanges:
        moved[exchange.kind] = moved.get(exchange.kind, 0) + exchange.moved
        # Ranks count `tensor` fastest, then `fsdp`, then `data`: a group is within a node or not.
        inside = exchange.span <= device.per_node
        seconds += exchange.moved / (device.link if inside else device.network)
    kept = sizes["fsdp"] * sizes["tensor"]
    traffic = memory_traffic(config, rows, cut=kept, tensor=sizes["tensor"])
    shown = ",".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1)
    layout = f"{strategy} {shown}".strip()
    if strategy in ("fsdp", "hsdp") and not config.parallel.reshard_after_forward:
        layout += ", kept after forward"
    return Plan(
        machine=f"{gpus} x {gpu}",
        layout=layout,
        device=device,
        n_devices=gpus,
        memory=parts,
        capacity=int(device.memory * USABLE),
        moved={kind: round(size) for kind, size in moved.items()},
        flops=config.model.flops_per_token(config.T) * config.T * config.train.batch_size,
        times=step_times(config, device, gpus, traffic, seconds),
    )


USABLE = 0.94
"""Share of a GPU's memory for a program's tensors; CUDA, NCCL and fragmentation have the rest."""


PERSISTENT = 100_000
"""Numbers of a parameter that ZeRO 3 still keeps whole beside its part, by DeepSpeed's default."""
BUCKET = 500_000_000
"""Numbers of the buffer that DeepSpeed reduces gradients from, by its default."""


def sweep(config: Config, gpu: str, gpus: int) -> list[Plan]:
    """The plans of every strategy that goes with the model and the batch, best first."""
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
        raise InputError(f"no strategy for {gpus} x {gpu} goes with this batch: {reasons[0]}")
    return ranked(plans)


def mesh_of(config: Config, device: Device, gpus: int, strategy: str) -> dict[str, int]:
    """The size of every axis of the mesh."""
    node = min(gpus, device.per_node)
    text = config.parallel.mesh or STRATEGIES[strategy].format(node=node)
    sizes = mesh_sizes(text, gpus)
    if math.prod(sizes.values()) != gpus:
        raise InputError(f"mesh {text} has {math.prod(sizes.values())} places for {gpus} GPUs")
    if strategy not in ("fsdp", "hsdp") and sizes["data"] != gpus:
        raise InputError(f"strategy {strategy} has only the axis data, not {text}")
    return sizes


@dataclass(frozen=True)
class Unit:
    """Parameters that are gathered and reduced together."""

    name: str
    numbers: int
    """Parameters, where they are gathered: one `tensor`-th of what that axis cuts."""
    local: int
    """Of them, how many the first rank keeps: none keeps more."""
    width: int
    """Bytes of each when it is gathered."""
    again: bool
    """Whether it is gathered again in the backward pass."""


def held(config: Config, sizes: dict[str, int], strategy: str) -> list[Unit]:
    """The units of the real modules, cut by the real `cut` and `shard`, as the first rank has them.

    It has the most: what does not divide evenly is dealt out from the first rank on.
    """
    objective = make_objective(config.model, config)
    wide = PARAM_DTYPE[config.train.dtype].itemsize
    if strategy not in ("fsdp", "hsdp"):
        counts = [p.numel() for p in objective.parameters()]
        numbers = sum(counts)
        if strategy != "zero3":
            return [Unit("model", numbers, numbers, wide, again=False)]
        whole = sum(count for count in counts if count <= PERSISTENT)
        return [Unit("model", numbers, -(-numbers // sizes["data"]) + whole, wide, again=True)]
    with fake_process_group(math.prod(sizes.values())):
        mesh = init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=AXES)
        if sizes["tensor"] > 1:
            apply_tp(objective, mesh["tensor"], config)
        apply_fsdp(objective, mesh, config)
        return [unit for name, module in objective.named_modules() for unit in _unit(name, module)]


def _unit(name: str, module: nn.Module) -> list[Unit]:
    """What FSDP2 gathers for a module: its parameters that no module within is gathered for."""
    state = getattr(module, "_get_fsdp_state", lambda: None)()
    group = state and state._fsdp_param_group
    if not group:
        return []
    parameters = [item.sharded_param for item in group.fsdp_params]
    dtype = group.mp_policy.param_dtype or parameters[0].dtype
    return [
        Unit(
            name,
            sum(math.prod(item._orig_size) for item in group.fsdp_params),
            sum(_local(p) for p in parameters),
            dtype.itemsize,
            group._reshard_after_forward,
        )
    ]


def _local(parameter: Any) -> int:
    return (parameter.to_local() if isinstance(parameter, DTensor) else parameter).numel()


@contextlib.contextmanager
def fake_process_group(world: int) -> Iterator[None]:
    """Inside the block this is rank 0 of so many processes, whose collectives do nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()


def memory(
    config: Config, sizes: dict[str, int], strategy: str, units: list[Unit], rows: int
) -> dict[str, int]:
    """What the fullest rank holds at the peak of a step, in bytes."""
    wide = PARAM_DTYPE[config.train.dtype].itemsize
    local, numbers = sum(unit.local for unit in units), sum(unit.numbers for unit in units)
    sharded = strategy in ("fsdp", "hsdp", "zero3")
    slices = -(-numbers // sizes["data"])  # ZeRO's.
    gradients = local
    # ZeRO 1 sums up whole gradients over micro-batches, ZeRO 2 and 3 reduce each.
    if strategy == "zero2" or (
        strategy == "zero1" and config.train.gradient_accumulation_steps == 1
    ):
        gradients = owned_gradients(config, sizes["data"])
    elif strategy == "zero3":
        gradients = slices
    moments = slices if strategy.startswith("zero") else local
    kept, temporary = passing(config, rows // config.train.gradient_accumulation_steps, sharded)
    # Sequence parallelism cuts what stands between the products too; without it this is too much.
    across = sizes["tensor"] if config.parallel.sequence_parallel else 1
    result = {
        "parameters": wide * local,
        "gradients": wide * gradients,
        "optimizer": 2 * wide * moments,
        "activations": kept // across,
        "temporaries": temporary // across,
    }
    if sharded:
        result["gathered"] = gathered(config, units)
        if config.train.gradient_accumulation_steps > 1:
            # Gradients that are not reduced yet are whole.
            result["gathered"] += wide * numbers
    elif strategy == "ddp":
        # DDP adds up gradients in buckets of its own.
        result["buckets"] = wide * numbers
    if strategy.startswith("zero"):
        # DeepSpeed updates a copy of its slice.
        result["optimizer"] += wide * slices
        result["buckets"] = wide * BUCKET
    if config.parallel.cpu_offload and strategy in ("fsdp", "hsdp"):
        result |= dict.fromkeys(("parameters", "gradients", "optimizer"), 0)
    return result


def owned_gradients(config: Config, world: int) -> int:
    """Numbers of the gradients that the fullest rank of ZeRO 1 or 2 keeps beside the bucket.

    Matrices and gains are strung together and cut evenly; of a parameter that is cut through, the
    ranks of both sides keep the whole gradient.
    """
    kept = [0] * world
    for decayed in (True, False):
        shapes = config.model.parameter_shapes()
        counts = [
            math.prod(shape) for name, shape in shapes.items() if has_weight_decay(name) == decayed
        ]
        slice_, start = -(-sum(counts) // world), 0
        for count in counts:
            for rank in range(start // slice_, -(-(start + count) // slice_)):
                kept[rank] += count
            start += count
    return max(kept)


def gathered(config: Config, units: list[Unit]) -> int:
    """Bytes of whole parameters, and of what they are received in and reduced from, at the peak.

    FSDP gathers into a buffer and copies out of it; gradients are reduced in the parameters' dtype.
    Layers are gathered `parallel.prefetch` ahead.
    """
    wide = PARAM_DTYPE[config.train.dtype].itemsize
    layers = [unit for unit in units if ".layers." in unit.name or unit.name.startswith("layers.")]
    others = [unit for unit in units if unit not in layers]
    stay = sum(unit.numbers * unit.width for unit in units if not unit.again)
    sizes = sorted((unit.numbers * unit.width for unit in layers if unit.again), reverse=True)
    reduced = wide * max((unit.numbers for unit in layers), default=0)
    at_once = sizes[: 1 + config.parallel.prefetch]
    in_layers = sum(at_once) + max(sizes, default=0) + reduced
    in_others = max((2 * unit.width + wide) * unit.numbers for unit in others if unit.again)
    return stay + max(in_layers, in_others)


def passing(config: Config, rows: int, sharded: bool) -> tuple[int, int]:
    """Bytes that the forward pass keeps for the backward pass, and that come and go beside them.

    The real objective goes forward and backward on `rows` sequences, with tensors of no memory, as
    on one rank. Under FSDP the layers' matrices are in the compute dtype already.
    """
    config = replace(config, train=replace(config.train, compile=False))
    objective = make_objective(config.model, config)
    layers = set(objective.model.layers.parameters())
    with FakeTensorMode():
        made: dict[Tensor, nn.Parameter] = {}
        for module in objective.modules():
            for name, like in module.named_parameters(recurse=False):
                narrow = sharded and like in layers and like.ndim == 2
                dtype = COMPUTE_DTYPE[config.train.dtype] if narrow else like.dtype
                made.setdefault(like, nn.Parameter(torch.empty(like.shape, dtype=dtype)))
                setattr(module, name, made[like])
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))
        for parameter in made.values():
            # Gradients are counted by themselves; one at a time comes and goes here.
            parameter.register_post_accumulate_grad_hook(_drop)
        zeros_BT = torch.zeros((rows, config.T), dtype=torch.long)
        documents = (zeros_BT, zeros_BT) if config.data.document_mask else ()
        batch = Batch(zeros_BT, zeros_BT, *documents)
        tracker = MemTracker()
        tracker.track_external(objective)
        with tracker, warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            loss = objective(batch)
            kept = _total(tracker, "current")
            loss.backward()
            peak = _total(tracker, "peak")
    return kept, peak - kept


def _drop(parameter: Tensor) -> None:
    parameter.grad = None


def _total(tracker: MemTracker, when: str) -> int:
    """Bytes of everything but parameters and buffers, now or at the peak."""
    (sizes,) = tracker.get_tracker_snapshot(when).values()
    parts = {str(getattr(key, "value", key)): size for key, size in sizes.items()}
    return parts["Total"] - parts["Parameter"] - parts["Buffer"]


@dataclass(frozen=True)
class CollectiveTraffic:
    """Collectives of a step that are alike."""

    kind: str
    moved: float
    """Bytes that each rank sends in a step."""
    span: int
    """Ranks from the first to the last of a group, the end included: do they share a node?"""


def communication(
    config: Config, sizes: dict[str, int], strategy: str, units: list[Unit], rows: int
) -> list[CollectiveTraffic]:
    """What every rank sends in a step, along rings (arXiv:1802.05799, section 3)."""
    wide = PARAM_DTYPE[config.train.dtype].itemsize
    data, fsdp, tensor = (sizes[axis] for axis in AXES)
    parts = config.train.gradient_accumulation_steps
    whole = wide * sum(unit.numbers for unit in units)
    gathers = parts * sum(u.numbers * u.width * (2 if u.again else 1) for u in units)
    everyone = data * fsdp * tensor
    result = []
    if strategy in ("fsdp", "hsdp"):
        along, span = (fsdp - 1) / fsdp, fsdp * tensor
        result.append(CollectiveTraffic("all-gather", gathers * along, span))
        result.append(CollectiveTraffic("reduce-scatter", whole * along, span))
        result.append(
            CollectiveTraffic("all-reduce", 2 * whole / fsdp * (data - 1) / data, everyone)
        )
    elif strategy == "ddp":
        result.append(CollectiveTraffic("all-reduce", 2 * whole * (data - 1) / data, everyone))
    elif strategy != "single":
        # Below stage 3 every rank updates its slice, and all are given the parameters once.
        along = (data - 1) / data
        given = gathers if strategy == "zero3" else whole
        result.append(CollectiveTraffic("all-gather", given * along, everyone))
        result.append(CollectiveTraffic("reduce-scatter", whole * along, everyone))
    if tensor > 1:
        model = config.model
        stream = rows * config.T * model.dim * COMPUTE_DTYPE[config.train.dtype].itemsize
        # Into attention and MLP and out of the MLP, and back; once more where layers are.
        passes = 3 if config.train.remat == "full" else 2
        share = stream * (tensor - 1) / tensor
        turned = model.n_layers * passes * share / tensor
        sent = model.n_layers * passes * 3 * share + 4 * share  # And embedding and loss.
        result.append(CollectiveTraffic("all-gather, reduce-scatter of activations", sent, tensor))
        result.append(CollectiveTraffic("all-to-all of activations", turned, tensor))
    return [exchange for exchange in result if exchange.moved]
