"""Plans of training steps on machines that are not present: lower bounds of time, and output.

The planners of both frameworks determine the memory and the communication of their step; the time
model and the output are shared.
"""

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.table import Table

from mooshak.config.sections import Config
from mooshak.hardware import Device
from mooshak.tables import print_table

STRATEGIES = {
    "single": "data=1",
    "ddp": "data=-1",
    "fsdp": "fsdp=-1",
    "hsdp": "data=-1,fsdp={node}",
    "zero1": "data=-1",
    "zero2": "data=-1",
    "zero3": "data=-1",
}
"""Strategy of the torch planner -> its mesh by default; `node` is the number of GPUs of a node."""

BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes per number in the compute dtype."""


@dataclass(frozen=True)
class Plan:
    """Memory, traffic and time of a training step in a layout; bytes of the fullest device."""

    machine: str
    """Number and kind of the devices."""
    layout: str
    """The mesh or strategy."""
    device: Device
    n_devices: int
    memory: dict[str, int]
    """Part of the device's memory at the peak of the step -> bytes."""
    capacity: int
    """Bytes of device memory available to the program."""
    bytes_sent: dict[str, int] | None
    """Collective -> bytes that a device sends in a step; None if the step cannot be compiled."""
    flops: int
    """FLOPs of the model for one step, over all devices."""
    times: dict[str, float] = field(default_factory=dict)
    """Resource (compute, HBM, links) -> seconds of a step at the full speed of the resource."""

    @property
    def total(self) -> int:
        """Bytes of device memory at the peak."""
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        """True if the step fits into device memory."""
        return self.bytes_sent is not None and self.total <= self.capacity

    @property
    def seconds(self) -> float:
        """Lower bound of the step time: the slowest resource, with everything else overlapped."""
        return max(self.times.values(), default=float("inf"))

    @property
    def bottleneck(self) -> str | None:
        """Resource that takes longest."""
        return max(self.times, key=lambda name: self.times[name]) if self.times else None

    @property
    def mfu(self) -> float:
        """Upper bound of the model FLOPs utilisation (arXiv:2204.02311)."""
        return self.flops / self.n_devices / self.device.flops / self.seconds

    def to_json(self) -> dict[str, object]:
        """Return the plan as a JSON object; times in seconds."""
        sent = self.bytes_sent
        return {
            "machine": self.machine,
            "layout": self.layout,
            "devices": self.n_devices,
            "fits": self.fits,
            "bytes_per_device": self.total,
            "memory": self.memory,
            "capacity": self.capacity,
            "bytes_moved_per_step": None if sent is None else sum(sent.values()),
            "collectives": sent,
            "flops_per_step": self.flops,
            "seconds": self.times,
            "bound": self.bottleneck,
            "mfu_ceiling": self.mfu,
            "hardware": asdict(self.device),
        }


def step_flops(config: Config) -> int:
    """Return the FLOPs of the model for a step, over all devices.

    A frozen matrix has no gradient, which saves 2 FLOPs per weight and token.
    """
    model, frozen = config.model, config.frozen
    products = _product_matrices(config)
    saved = 2 * sum(shape[0] * shape[1] for name, shape in products.items() if name in frozen)
    return config.T * config.train.batch_size * (model.flops_per_token(config.T) - saved)


def _product_matrices(config: Config) -> dict[str, tuple[int, ...]]:
    """Return the matrices that are multiplied with activations: name -> shape."""
    model = config.model
    return {
        name: shape
        for name, shape in model.parameter_shapes().items()
        if len(shape) == 2 and (name != "embeddings.weight" or model.tie_embeddings)
    }


def executed_flops(config: Config) -> int:
    """Return the FLOPs of a step over all devices, with those that `train.remat` recomputes.

    `full` recomputes the layers, `dots` the attention (4 FLOPs per head, channel and
    position that a token attends to).
    """
    model, train = config.model, config.train
    tokens = config.T * train.batch_size
    attention = 4 * model.n_layers * model.n_heads * model.K * model.attended(config.T)
    matrices = sum(
        2 * shape[0] * shape[1]
        for name, shape in model.parameter_shapes().items()
        if name.startswith("layers.") and len(shape) == 2
    )
    recomputed = {"none": 0, "dots": attention, "full": attention + matrices}[train.remat]
    return step_flops(config) + tokens * recomputed


def memory_traffic(config: Config, rows: int, n_shards: int, tensor: int) -> int:
    """Return a lower bound of the bytes that a device reads and writes in its memory in a step.

    Every matrix product reads its operands and writes its result: in the forward pass, for the
    gradients of both operands, and in the recomputation of remat full; a frozen matrix has no
    gradient. AdamW reads and writes parameters, gradients and both moments. Everything else is
    assumed to be fused into these.

    The device has `rows` sequences, in `train.gradient_accumulation_steps` micro-batches, and one
    of `n_shards` shards of the parameters; its products use 1 / `tensor` of each matrix.
    """
    train, frozen = config.train, config.frozen
    width, tokens = BYTES[train.dtype], rows * config.T
    total = 0
    for name, shape in _product_matrices(config).items():
        products = 4 if train.remat == "full" and name.startswith("layers.") else 3
        products -= name in frozen
        weights = shape[0] * shape[1] // tensor * train.gradient_accumulation_steps
        edges = tokens * (shape[0] + shape[1])
        total += products * width * (weights + edges // tensor)
    wide = 8 if train.dtype == "float64" else 4
    return total + 8 * wide * trained_count(config) // n_shards


def trained_count(config: Config) -> int:
    """Return the number of parameters that are trained."""
    frozen, shapes = config.frozen, config.model.parameter_shapes()
    return sum(math.prod(shape) for name, shape in shapes.items() if name not in frozen)


def batch_arrays(config: Config, n_rows: int) -> dict[str, tuple[type, tuple[int, int]]]:
    """Return field -> int or float, and shape, of the arrays of a batch."""
    text: tuple[str, ...] = ("tokens", "labels")
    if config.data.document_mask or config.data.format != "text":
        text += ("segments", "positions")
    arrays: dict[str, tuple[type, tuple[int, int]]]
    arrays = dict.fromkeys(text, (int, (n_rows, config.T)))
    if config.data.format == "preferences":
        arrays["reference"] = (float, (n_rows, 2))
    if config.data.format == "prompts":
        of_tokens = ("reference", "weights", "old_log_probs")
        arrays |= dict.fromkeys(of_tokens, (float, (n_rows, config.T)))
        arrays["advantages"] = (float, (n_rows, 1))
    return arrays


def step_times(
    config: Config, device: Device, n_devices: int, traffic: int, links: float
) -> dict[str, float]:
    """Return the seconds of a step's FLOPs, of its memory traffic in bytes, and of its links."""
    return {
        "compute": executed_flops(config) / n_devices / device.flops,
        "HBM": traffic / device.memory_bandwidth,
        "ICI" if device.torus else "network": links,
    }


def add_output_options(parser: argparse.ArgumentParser, varied: str) -> None:
    """Add --sweep, --plot and --json, which `print_plans` reads."""
    parser.add_argument("--sweep", action="store_true", help=f"compare every {varied}, best first")
    text = "with --sweep: file of the figure"
    parser.add_argument("--plot", type=Path, default=Path("plan.svg"), metavar="FILE", help=text)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def print_plans(plans: Sequence[Plan], config: Config, arguments: argparse.Namespace) -> None:
    """Print plans as the command's options say: JSON, the table of a sweep, or one plan."""
    if arguments.json:
        print_json(plans, arguments.sweep)
    elif arguments.sweep:
        print_sweep(plans, arguments.plot)
    else:
        print_plan(plans[0], config)


def print_plan(plan: Plan, config: Config) -> None:
    """Print a plan: whether it fits, its memory, the bytes sent, and the bottleneck."""
    verdict = "fits" if plan.fits else "does not fit"
    print(f"{plan.machine}, {plan.layout}: {verdict}, {_gb(plan.total)} of {_gb(plan.capacity)}")
    train = config.train
    n_parameters, n_trained = config.model.parameter_count(), trained_count(config)
    trained = "" if n_trained == n_parameters else f" ({n_trained:,} trained)"
    print(
        f"{n_parameters:,} parameters{trained}, {train.batch_size} sequences of {config.T}"
        f" tokens, {train.dtype}, remat {train.remat}, gradient accumulation "
        f"{train.gradient_accumulation_steps}"
    )
    table = Table("per device", "what", "bytes")
    for name, size in plan.memory.items():
        table.add_row("memory", name, _gb(size))
    for name, size in (plan.bytes_sent or {}).items():
        table.add_row("sent in a step", name, _gb(size))
    print_table(table)
    if plan.times:
        table = Table("per step", "amount", "peak per second and device", "seconds, at least")
        figures = {
            "compute": (f"{executed_flops(config):.4g} FLOP", f"{plan.device.flops:.4g} FLOP"),
            "HBM": ("operands, results, AdamW", _gb(plan.device.memory_bandwidth)),
        }
        links = (
            f"{_gb(plan.device.link)} per link"
            if plan.device.torus
            else f"{_gb(plan.device.link)} in a node, {_gb(plan.device.network)} between nodes"
        )
        for name, seconds in plan.times.items():
            amount, speed = figures.get(name, ("bytes sent, as above", links))
            table.add_row(name, amount, speed, f"{seconds:.4f}")
        print_table(table)
        mfu = f"MFU at most {plan.mfu:.0%} of {plan.flops:.4g} FLOP a step"
        print(f"bound by {plan.bottleneck}; {mfu}")
    print(f"figures of the device: {plan.device.source}")


def print_sweep(plans: Sequence[Plan], plot: Path) -> None:
    """Print the table of several plans, best first, and draw them."""
    table = Table("", "layout", "fits", "per device", "sent in a step", "bound by", "MFU at most")
    for place, plan in enumerate(plans, 1):
        sent = "" if plan.bytes_sent is None else _gb(sum(plan.bytes_sent.values()))
        mfu = f"{plan.mfu:.0%}" if plan.times else ""
        fits = "yes" if plan.fits else "no"
        row = (str(place), plan.layout, fits, _gb(plan.total), sent, plan.bottleneck or "", mfu)
        table.add_row(*row)
    print_table(table)
    draw(plans, plot)
    print(f"figure: {plot}")


def ranked(plans: Sequence[Plan]) -> list[Plan]:
    """Return the plans in order: those that fit, by time of a step, then by memory."""
    return sorted(plans, key=lambda plan: (not plan.fits, round(plan.seconds, 4), plan.total))


def draw(plans: Sequence[Plan], path: Path) -> None:
    """Draw the memory of every plan by part, with the capacity, and its times by resource."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 1.2 + 0.4 * len(plans)), layout="constrained")
    memory, times = figure.subplots(1, 2, sharey=True)
    labels = [plan.layout for plan in plans]
    parts = list(dict.fromkeys(part for plan in plans for part in plan.memory))
    left = [0.0] * len(plans)
    for part in parts:
        sizes = [plan.memory.get(part, 0) / 1e9 for plan in plans]
        memory.barh(labels, sizes, left=left, label=part)
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    memory.axvline(plans[0].capacity / 1e9, color="black", linestyle="--", label="capacity")
    memory.set_xlabel("GB per device")
    memory.invert_yaxis()
    memory.legend(fontsize="small")
    resources = list(dict.fromkeys(name for plan in plans for name in plan.times))
    for shift, name in enumerate(resources):
        rows = [i + 0.25 * (shift - 1) for i in range(len(plans))]
        times.barh(rows, [plan.times.get(name, 0) for plan in plans], height=0.25, label=name)
    times.set_xlabel("seconds of a step, at least")
    if resources:
        times.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def print_json(plans: Sequence[Plan], sweep: bool) -> None:
    """Print one JSON object: the plan, or `{"plans": [...]}`, best first."""
    objects = [plan.to_json() for plan in plans]
    print(json.dumps({"plans": objects} if sweep else objects[0], indent=2))


def _gb(size: float) -> str:
    return f"{size / 1e9:,.3f} GB"
