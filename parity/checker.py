"""The lines of `parity.check`: every comparison with its noise floor and its negative control."""

import json
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import product
from pathlib import Path

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from mooshak.checkpoints import base, safetensors
from mooshak.checkpoints.base import Checkpoint
from mooshak.checkpoints.init_from import resolve
from mooshak.config.model import Dtype, ModelConfig
from mooshak.config.parse import load_draft
from mooshak.errors import InputError
from mooshak.files import write_atomically
from mooshak.numerics.init_weights import initial_weight
from mooshak.report.html import TEMPLATES
from mooshak.tables import print_table
from parity.backends import FixedDtype, JaxBackend, TorchBackend
from parity.comparisons import COMPARISONS, WITH_ITSELF, WITH_NOISE_FLOOR
from parity.comparisons.case import STEPS, Line, ParityCase
from parity.comparisons.precision import float64_reference, precision
from parity.convert import convert, open_any
from parity.distance import distance
from parity.faults import inject_fault
from parity.layouts import compare_layouts
from parity.tolerances import ROUNDING

PARTS = ("weights", "precision", *COMPARISONS, "layouts", "round trip")
IN_THIS_PROCESS = tuple(part for part in PARTS if part != "layouts")


def check(
    source: Checkpoint,
    other: Checkpoint | None = None,
    batch: int = 4,
    time: int = 64,
    decode: int = 48,
    parts: Iterable[str] = PARTS,
    controls: bool = True,
    floors: bool = True,
    low: Sequence[Dtype] = ("float32", "bfloat16"),
    devices: tuple[str, str] | None = None,
) -> Iterator[Line]:
    """Yield the lines of the report as they are measured.

    Torch computes with the weights of `source`, JAX with those of `other` (the same by default).
    `controls` adds a negative control to every line, `floors` a noise floor to those of float64;
    `low` are the dtypes that are compared with float64. With `devices`, those of torch and of JAX,
    float32 and bfloat16 are also compared with the CPU, and a part that fails is a line.

    Raises `InputError` for checkpoints of two different models, or a device that is not available.
    """
    jax.config.update("jax_enable_x64", True)
    case = _case(source, other or source, batch, time, decode, devices)
    parts = set(parts)
    if "weights" in parts and other is not None:
        yield weights(source, other)
    measures: list[tuple[str, Callable[[ParityCase], Iterator[Line]], Sequence[str]]] = []
    if "precision" in parts:
        truth = float64_reference(case)
        measures += [
            ("precision", partial(precision, truth, dtype), FAULTS[dtype]) for dtype in low
        ]
    measures += [(name, measure, FAULTS[name]) for name, measure in COMPARISONS.items()]
    for name, measure, faults in measures:
        if name not in parts:
            continue
        try:
            lines = list(measure(case))
            if floors and name in WITH_NOISE_FLOOR:
                lines = with_noise_floors(case, lines, measure, name in WITH_ITSELF)
            yield from with_negative_controls(case, lines, measure, faults) if controls else lines
        except Exception as error:
            if not devices:
                raise
            # Time on an accelerator is scarce: the other parts follow.
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            yield Line(f"{name} failed", "", math.inf, 0.0, where=reason)
    if "layouts" in parts:
        yield from compare_layouts(case)
    if "round trip" in parts:
        yield round_trip(source, controls)


def with_noise_floors(
    case: ParityCase,
    lines: list[Line],
    measure: Callable[[ParityCase], Iterator[Line]],
    with_itself: bool,
) -> list[Line]:
    """Return each line of float64 with its noise floor: the same measure in float32.

    It is the distance of float32 from float64, or where `measure` compares each framework
    `with_itself`, that comparison in float32.
    """
    backends = (case.torch, case.jax)
    pairs = [(FixedDtype(one, "float64"), FixedDtype(one, "float32")) for one in backends]
    if with_itself:
        pairs = [(FixedDtype(case.torch, "float32"), FixedDtype(case.jax, "float32"))]
    floors = dict.fromkeys((line.name for line in lines), 0.0)
    for ours, theirs in pairs:
        for line in measure(replace(case, torch=ours, jax=theirs)):
            floors[line.name] = max(floors[line.name], line.measured * ROUNDING)
    return [replace(line, noise_floor=floors[line.name]) for line in lines]


def with_negative_controls(
    case: ParityCase,
    lines: list[Line],
    measure: Callable[[ParityCase], Iterator[Line]],
    faults: Sequence[str],
) -> list[Line]:
    """Return each line with its measurement under the first injected fault that it detects."""
    for fault, framework in product(faults, ("JAX", "torch")):
        if all(
            line.negative_control is not None and line.negative_control > line.allowed
            for line in lines
        ):
            break
        with inject_fault(fault, framework):
            faulty = {(line.name, line.dtype): line.measured for line in measure(case)}
        lines = [
            line
            if line.negative_control is not None and line.negative_control > line.allowed
            else replace(line, negative_control=faulty[line.name, line.dtype], fault=fault)
            for line in lines
        ]
    return lines


def _case(
    source: Checkpoint,
    other: Checkpoint,
    batch: int,
    time: int,
    decode: int,
    devices: tuple[str, str] | None,
) -> ParityCase:
    model = source.model
    if other.model != model:
        raise InputError(f"{other.path} is a checkpoint of another model than {source.path}")
    shape = (STEPS, batch, min(time, model.max_seq_len - 1) + 1)
    tokens_nBS = np.random.default_rng(0).integers(0, model.vocab_size, shape, dtype=np.int32)
    decode = min(decode, model.max_seq_len - 8)
    on_cpu = TorchBackend(source), JaxBackend(other)
    case = ParityCase(*on_cpu, tokens_nBS, decode)
    if devices:
        here = TorchBackend(source, devices[0]), JaxBackend(other, devices[1])
        case = ParityCase(*here, tokens_nBS, decode, on_cpu=on_cpu)
    return replace(case, max_grad_norm=_clip_norm(case))


def _clip_norm(case: ParityCase) -> float:
    """Return half of the first gradient's norm, which makes clipping act."""
    found = case.torch.forward_backward(case.config("float64"), case.batches[0])
    norm = np.linalg.norm([np.linalg.norm(g.ravel()) for g in found.gradients.values()])
    return float(norm) / case.inputs_BT.size / 2


def weights(source: Checkpoint, other: Checkpoint) -> Line:
    """Compare the tensors of two checkpoints, optimizer included."""
    common = [key for key in source.tensors if key in other.tensors]
    distances = {key: distance(other.read(key), source.read(key)) for key in common}
    worst = max(distances, key=lambda key: distances[key])
    first = next((key for key in common if distances[key]), worst)
    return Line("weights of SOURCE and OTHER", "stored", distances[worst], 0.0, where=first)


def round_trip(source: Checkpoint, controls: bool = True) -> Line:
    """Count tensors whose bits change from torch to JAX to torch to interchange."""
    with tempfile.TemporaryDirectory(prefix="parity-") as directory:
        path = Path(directory) / "start"
        safetensors.write_checkpoint(path, source)
        for i, kind in enumerate(("torch", "jax", "torch", "safetensors")):
            convert(path, Path(directory) / f"{i}-{kind}", kind)
            path = Path(directory) / f"{i}-{kind}"
        end = open_any(path)

        def changed(read: Callable[[str], np.ndarray]) -> list[str]:
            return [key for key in source.tensors if not _same_bits(read(key), end.read(key))]

        found, same_state = changed(source.read), end.trainer_state == source.trainer_state
        name = "round trip torch, JAX, torch: tensors that change"
        where = (found or [""])[0] if same_state else "trainer_state.json"
        line = Line(name, "bits", float(len(found) + (not same_state)), 0.0, where=where)
        if not controls:
            return line
        first = next(iter(source.tensors))

        def one_bit(key: str) -> np.ndarray:
            array = np.array(source.read(key))
            if key == first:
                array.reshape(-1).view(np.uint8)[0] ^= 1
            return array

        return replace(line, negative_control=float(len(changed(one_bit))), fault="one bit flipped")


FAULTS = {
    "float32": ("bfloat16 products inside float32", "embedding times sqrt(width)"),
    "bfloat16": ("RoPE turns neighbours, not halves", "embedding times sqrt(width)"),
    "forward": ("RoPE theta 1 % off", "embedding times sqrt(width)"),
    "loss": ("labels not shifted",),
    "padding": ("padding counts in the loss",),
    "log_probs": ("padding counts in the loss",),
    "gradients": ("RMSNorm epsilon 1e-6",),
    "document_mask": ("documents see each other",),
    "packing": ("documents see each other",),
    "preferences": ("chosen and rejected swapped",),
    "grpo": ("old log-probabilities one token late",),
    "training": ("1e-6 added to the norm that clips", "learning rate of the next step"),
    "sft": ("end token without label",),
    "sft_packing": ("segments leaking",),
    "cache": ("KV cache one position late",),
    "roll_back": ("KV cache not truncated",),
    "decoding": ("KV cache one position late", "noise of the next sample"),
    "engines": ("noise of the next sample",),
}
"""Part or dtype -> the faults injected as negative controls, in JAX and then in torch."""


def _same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def random_checkpoint(model: ModelConfig, seed: int = 0) -> Checkpoint:
    """Return a model with initial weights and random gains around one.

    Its matrices have standard deviation 1 / sqrt(width), 0.07 for the demo. At 0.02 and with gains
    of one, removing RoPE or swapping two norms would stay below any tolerance.
    """

    def read(name: str, rows: slice = base.FULL_SLICE) -> np.ndarray:
        return initial_weight(model, seed, name, rows, dtype=np.float64, gain_std=0.2)

    tensors = {n: (np.dtype(np.float64), s) for n, s in model.parameter_shapes().items()}
    return Checkpoint(Path("(random)"), "random", model, None, tensors, read)


def write_report(lines: list[Line], directory: Path, title: str) -> None:
    """Write `report.json`, `report.md` and `report.html`, which is self-contained."""
    directory.mkdir(parents=True, exist_ok=True)
    rows = [asdict(line) | {"passed": line.passed} for line in lines]
    report = {"source": title, "passed": all(line.passed for line in lines), "lines": rows}
    write_atomically(directory / "report.json", json.dumps(report, indent=2) + "\n")
    head = f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}\n"
    write_atomically(
        directory / "report.md",
        f"# Parity of {title}\n\n"
        + head
        + "".join(f"| {' | '.join(_cells(line))} |\n" for line in lines),
    )

    failed = [line for line in lines if not line.passed]
    page = TEMPLATES.get_template("check.html").render(lines=lines, failed=failed, title=title)
    write_atomically(directory / "report.html", page)


COLUMNS = ("quantity", "dtype", "measured", "allowed", "noise floor", "with a fault", "")


def _cells(line: Line) -> list[str]:
    label = "first wrong" if not line.passed else "largest"
    return [
        line.name + (f" ({label}: {line.where})" if line.where else ""),
        line.dtype,
        _number(line.measured),
        _number(line.allowed),
        "" if line.noise_floor is None else _number(line.noise_floor),
        "" if line.negative_control is None else f"{_number(line.negative_control)} ({line.fault})",
        "pass" if line.passed else "FAIL",
    ]


def _number(value: float) -> str:
    """Format a difference with two digits, and a count with all of them."""
    return f"{value:.0f}" if float(value).is_integer() else f"{value:.2g}"


def run(
    path: Path, other_path: Path | None, out: Path | None, quick: bool, device: str = "cpu"
) -> tuple[list[Line], list[Line]]:
    """Measure and print the lines of a checkpoint or configuration; write the report to `out`.

    Meshes and processes are compared on the CPU only. With device tpu, PyTorch runs on the CPU.

    Returns the lines that failed, and all of them.
    """
    if path.suffix in (".yaml", ".yml"):
        source = random_checkpoint(resolve(load_draft(path)).model)
    else:
        source = open_any(path)
    other = None if other_path is None else open_any(other_path)
    parts = IN_THIS_PROCESS if quick or device != "cpu" else PARTS
    devices = None if device == "cpu" else ("cpu" if device == "tpu" else device, device)
    low: tuple[Dtype, ...] = ("float32",) if quick else ("float32", "bfloat16")
    table = Table(*COLUMNS, title=f"parity of {path}")
    lines = []
    with Console(stderr=True).status("measuring") as status:
        for line in check(
            source,
            other,
            parts=parts,
            controls=not quick,
            floors=not quick,
            low=low,
            devices=devices,
        ):
            status.update(f"measured: {line.name}, {line.dtype}")
            lines.append(line)
            table.add_row(*_cells(line), style="" if line.passed else "bold red")
    print_table(table)
    if out:
        write_report(lines, out, str(path))
    return [line for line in lines if not line.passed], lines
