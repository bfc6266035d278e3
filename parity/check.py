"""Prove that the PyTorch and the JAX model are the same function, on a checkpoint or a fresh model.

python -m parity.check SRC [OTHER]

SRC is a checkpoint of any kind, or a configuration (*.yaml), whose model is then drawn with weights
and gains that let faults show. With OTHER, torch computes with SRC's weights and JAX with OTHER's.
What each line means, and why the bounds are what they are, is in docs/parity.md.
"""

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice, product
from pathlib import Path

import jax
import jinja2
import numpy as np
from rich.console import Console
from rich.table import Table

from mooshak import config as configuration
from mooshak import interchange
from mooshak.config import (
    Config,
    Dtype,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    ScheduleConfig,
    TrainConfig,
)
from mooshak.errors import InputError, command
from mooshak.files import write_atomically
from mooshak.initial import initial_weight
from mooshak.interchange import Checkpoint
from mooshak.schedule import decays
from mooshak.tables import print_table
from parity.convert import convert, open_any
from parity.faults import planted
from parity.sides import Arrays, JaxSide, Side, Step, TorchSide

# Allowed differences, all of them. They are never loosened: see docs/parity.md.
FLOAT64 = 1e-12
FLOAT32_LOGITS = 2e-6
RATIO = 2.0
"""Neither framework may be further from float64 than this many times the other."""

STEPS = 20
PARTS = (
    "weights",
    "precision",
    "forward",
    "loss",
    "padding",
    "gradients",
    "training",
    "decoding",
    "round trip",
)

TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("parity", "."),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


@dataclass(frozen=True)
class Line:
    """One line of the report."""

    name: str
    dtype: str
    measured: float
    allowed: float
    floor: float | None = None
    """What the arithmetic alone does to this quantity: the other framework's own distance from
    float64 where `measured` is one framework's, both frameworks' in float32 where it is float64."""
    control: float | None = None
    """What the same line shows with the fault `fault` planted."""
    fault: str = ""
    where: str = ""
    """Where it first goes wrong; of a line that passes, where the largest difference is."""

    @property
    def passed(self) -> bool:
        return bool(self.measured <= self.allowed)


@dataclass(frozen=True)
class Question:
    """What is compared: both sides, and the tokens that they are given."""

    ours: Side
    theirs: Side
    tokens_nBS: np.ndarray
    decode: int
    clip_norm: float = 1.0

    @property
    def inputs_BT(self) -> np.ndarray:
        return self.tokens_nBS[0][:, :-1]

    def config(self, dtype: Dtype) -> Config:
        """A recipe in which everything acts: clipping, weight decay, schedule, accumulation."""
        _, batch, tokens = self.tokens_nBS.shape
        return Config(
            model=self.ours.source.model,
            optimizer=OptimizerConfig(
                learning_rate=1e-3, weight_decay=0.1, clip_norm=self.clip_norm
            ),
            schedule=ScheduleConfig(warmup_steps=5),
            train=TrainConfig(
                steps=STEPS,
                batch_size=batch,
                sequence_length=tokens - 1,
                accumulation=2 if batch % 2 == 0 else 1,
                dtype=dtype,
                loss_chunk=batch * 24,
            ),
            parallel=ParallelConfig(mesh="data=1"),
        )


def check(
    source: Checkpoint,
    other: Checkpoint | None = None,
    batch: int = 4,
    time: int = 64,
    decode: int = 48,
    parts: Iterable[str] = PARTS,
    controls: bool = True,
    low: Sequence[Dtype] = ("float32", "bfloat16"),
) -> Iterator[Line]:
    """The lines of the report, as they are measured.

    Torch computes with the weights of `source`, JAX with those of `other` (the same by default).
    `controls` measures every line again with a fault planted; `low` are the dtypes that are
    compared with float64. Raises `InputError` for checkpoints of two models.
    """
    model = source.model
    if other is not None and other.model != model:
        raise InputError(f"{other.path} is a checkpoint of another model than {source.path}")
    time = min(time, model.max_seq_len - 1)
    decode = min(decode, model.max_seq_len - 8)
    jax.config.update("jax_enable_x64", True)
    random = np.random.default_rng(0)
    tokens_nBS = random.integers(0, model.vocab_size, (STEPS, batch, time + 1), dtype=np.int32)
    question = Question(TorchSide(source), JaxSide(other or source), tokens_nBS, decode)
    question = replace(question, clip_norm=_clip_norm(question))
    parts = set(parts)
    if "weights" in parts and other is not None:
        yield weights(source, other)
    measures: list[tuple[str, Callable[[Question], Iterator[Line]], Sequence[str]]] = []
    if "precision" in parts:
        truth = Truth.of(question)
        measures += [
            ("precision", partial(precision, truth, dtype), FAULTS[dtype]) for dtype in low
        ]
    measures += [(name, measure, FAULTS[name]) for name, measure in MEASURES.items()]
    for name, measure, faults in measures:
        if name in parts:
            lines = list(measure(question))
            yield from with_controls(question, lines, measure, faults) if controls else lines
    if "round trip" in parts:
        yield round_trip(source, controls)


def with_controls(
    question: Question,
    lines: list[Line],
    measure: Callable[[Question], Iterator[Line]],
    faults: Sequence[str],
) -> list[Line]:
    """Each line with what it shows when a fault is planted: the first that it does not let pass."""
    for fault, framework in product(faults, ("JAX", "torch")):
        if all(line.control is not None and line.control > line.allowed for line in lines):
            break
        with planted(fault, framework):
            faulty = {(line.name, line.dtype): line.measured for line in measure(question)}
        lines = [
            line
            if line.control is not None and line.control > line.allowed
            else replace(line, control=faulty[line.name, line.dtype], fault=fault)
            for line in lines
        ]
    return lines


def _clip_norm(question: Question) -> float:
    """Half of the first gradient's norm: it is clipped."""
    gradients = question.ours.gradients(question.config("float64"), question.tokens_nBS[0])
    norm = np.linalg.norm([np.linalg.norm(g.ravel()) for g in gradients.values()])
    return float(norm) / question.inputs_BT.size / 2


def weights(source: Checkpoint, other: Checkpoint) -> Line:
    """The largest difference of a tensor, optimizer included, between two checkpoints."""
    common = [key for key in source.tensors if key in other.tensors]
    distances = {key: distance(other.read(key), source.read(key)) for key in common}
    worst = max(distances, key=lambda key: distances[key])
    first = next((key for key in common if distances[key]), worst)
    return Line("weights of SRC and OTHER", "stored", distances[worst], 0.0, where=first)


def forward(q: Question) -> Iterator[Line]:
    """Logits and the hidden states of every layer in float64."""
    ours = q.ours.operations("float64", q.inputs_BT)
    theirs = q.theirs.operations("float64", q.inputs_BT)
    distances = {
        key: distance(theirs[key], value)
        if key in theirs and theirs[key].shape == value.shape
        else np.inf
        for key, value in ours.items()
    }
    where = next((place(key) for key, d in distances.items() if not d <= FLOAT64), "")
    for key, name in _hidden(q.ours.source.model):
        yield Line(name, "float64", distances[key], FLOAT64, where=where)


def _hidden(model: ModelConfig) -> list[tuple[str, str]]:
    layers = [(f"layers.{i} out", f"hidden states after layer {i}") for i in range(model.n_layers)]
    first = ("embeddings out", "hidden states after the embeddings")
    return [("logits", "logits"), first, *layers]


@dataclass(frozen=True)
class Truth:
    """What torch computes in float64, which the other parts show to be what JAX computes."""

    operations: Arrays
    losses: np.ndarray
    gradients: Arrays
    params: Arrays

    @classmethod
    def of(cls, q: Question) -> "Truth":
        config = q.config("float64")
        return cls(
            q.ours.operations("float64", q.inputs_BT),
            q.ours.losses(config, q.tokens_nBS),
            q.ours.gradients(config, q.tokens_nBS[0]),
            _last(q.ours.steps(config, q.tokens_nBS)).params,
        )


def precision(truth: Truth, dtype: Dtype, q: Question) -> Iterator[Line]:
    """How far each framework is in `dtype` from float64, beside how far the other is."""
    sides, exact = (q.ours, q.theirs), truth.operations
    found = [side.operations(dtype, q.inputs_BT) for side in sides]
    distances = {key: [distance(f[key], exact[key]) for f in found] for key in exact}
    places = []
    for i in range(2):
        excess = (key for key, d in distances.items() if d[i] > RATIO * max(d[1 - i], TINY))
        places.append(next(map(place, excess), ""))
    for key, name in _hidden(q.ours.source.model):
        limit = FLOAT32_LOGITS if (key, dtype) == ("logits", "float32") else np.inf
        yield from _both(name, dtype, distances[key], places, limit)
    config = q.config(dtype)
    apart = [distance(side.losses(config, q.tokens_nBS), truth.losses) for side in sides]
    yield from _both(f"losses of {STEPS} batches", dtype, apart, places)
    apart = [_all(side.gradients(config, q.tokens_nBS[0]), truth.gradients) for side in sides]
    yield from _both("all gradients", dtype, apart, places)
    apart = [_all(_last(side.steps(config, q.tokens_nBS)).params, truth.params) for side in sides]
    yield from _both(f"all parameters after {STEPS} AdamW steps", dtype, apart, places)


TINY = 2.0**-24
"""Half a unit in float32's last place: below it, which of two roundings is nearer is chance."""


def _both(
    name: str, dtype: Dtype, apart: list[float], places: list[str], limit: float = np.inf
) -> Iterator[Line]:
    for i, framework in enumerate(("torch", "JAX")):
        allowed = min(limit, RATIO * max(apart[1 - i], TINY))
        yield Line(
            f"{name}, {framework} from float64",
            dtype,
            apart[i],
            allowed,
            apart[1 - i],
            where=places[i],
        )


def loss(q: Question) -> Iterator[Line]:
    """The loss of every batch in float64."""
    config = q.config("float64")
    ours, theirs = (side.losses(config, q.tokens_nBS) for side in (q.ours, q.theirs))
    measured = distance(theirs, ours)
    where = "" if measured <= FLOAT64 else "loss"
    yield Line(f"losses of {STEPS} batches", "float64", measured, FLOAT64, where=where)


def padding(q: Question) -> Iterator[Line]:
    """The loss of a batch in which three labels in ten are padding, in float64."""
    padding_BT = np.random.default_rng(1).random(q.inputs_BT.shape) < 0.3
    ours, theirs = (
        side.padded_loss("float64", q.tokens_nBS[0], padding_BT) for side in (q.ours, q.theirs)
    )
    measured = abs(theirs / ours - 1)
    where = "" if measured <= FLOAT64 else "loss of labels that are padding"
    yield Line("loss of a padded batch", "float64", measured, FLOAT64, where=where)


def gradients(q: Question) -> Iterator[Line]:
    """Every gradient of the first batch in float64."""
    config = q.config("float64")
    ours, theirs = (side.gradients(config, q.tokens_nBS[0]) for side in (q.ours, q.theirs))
    distances = {key: distance(theirs[key], value) for key, value in ours.items()}
    worst = max(distances, key=lambda key: distances[key])
    # Gradients go backwards: the last parameter whose gradient is wrong is nearest to the fault.
    wrong = [key for key in distances if not distances[key] <= FLOAT64]
    where = (wrong or [worst])[-1]
    yield Line("every gradient, the worst", "float64", distances[worst], FLOAT64, where=where)


def training(q: Question) -> Iterator[Line]:
    """20 steps of the trainers' own step functions side by side, in float64."""
    config = q.config("float64")
    names = ("losses", "gradient norms", "exp_avg", "exp_avg_sq", "parameters")
    worst = dict.fromkeys(names, 0.0)
    fault, before = "", q.ours.source
    past: Arrays = {name: before.read(name).astype(np.float64) for name in before.tensors}
    pairs = zip(
        q.ours.steps(config, q.tokens_nBS), q.theirs.steps(config, q.tokens_nBS), strict=True
    )
    for k, (ours, theirs) in enumerate(pairs):
        apart = {
            "losses": abs(theirs.loss / ours.loss - 1),
            "gradient norms": abs(theirs.norm / ours.norm - 1),
            "exp_avg": _worst(theirs.exp_avg, ours.exp_avg)[1],
            "exp_avg_sq": _worst(theirs.exp_avg_sq, ours.exp_avg_sq)[1],
            "parameters": _worst(theirs.params, ours.params)[1],
        }
        if not fault and not max(apart.values()) <= FLOAT64:
            fault = f"step {k}, " + _diagnosis(q, k, ours, theirs, past)
        past = ours.params
        worst = {name: max(worst[name], apart[name]) for name in names}
        last = _worst(theirs.params, ours.params)[0]
    for name in names:
        title = f"{name} of {STEPS} AdamW steps, the worst"
        where = fault or (last if name == "parameters" else "")
        yield Line(title, "float64", worst[name], FLOAT64, where=where)


def _diagnosis(q: Question, k: int, ours: Step, theirs: Step, past: Arrays) -> str:
    """What is the first to differ in a step that began alike, in the order of computation."""
    ratio = theirs.loss / ours.loss
    if abs(ratio - 1) > FLOAT64:
        if abs(ratio - round(ratio)) < 1e-9 or abs(1 / ratio - round(1 / ratio)) < 1e-9:
            return f"accumulation: the loss is {ratio:.3g} times as large in JAX"
        match = _batch_of(q, k, theirs.loss, past), _batch_of(q, k, ours.loss, past)
        for framework, batch in zip(("JAX", "torch"), match, strict=True):
            if batch not in (None, k):
                return f"data order: {framework} computes with batch {batch}"
        return "the loss"
    if abs(theirs.norm / ours.norm - 1) > FLOAT64:
        return f"the gradient: its norm is {theirs.norm / ours.norm:.3g} times as large in JAX"
    name, apart = _worst(theirs.exp_avg, ours.exp_avg)
    if apart > FLOAT64:
        factor = _factor(theirs.exp_avg, ours.exp_avg)
        if factor is not None:
            return f"clipping or beta1: the gradient is {factor:.7g} times as large in JAX"
        return f"exp_avg of {name}"
    name, apart = _worst(theirs.exp_avg_sq, ours.exp_avg_sq)
    if apart > FLOAT64:
        return f"exp_avg_sq of {name}: beta2"
    updates = [{n: p[n] - past[n] for n in past} for p in (theirs.params, ours.params)]
    wrong = {n for n in past if distance(updates[0][n], updates[1][n]) > 1e-9}
    if factor := _factor(*updates):
        return f"learning rate: the update is {factor:.7g} times as large in JAX"
    if all(decays(n) for n in wrong):
        return "weight decay of matrices"
    if not any(decays(n) for n in wrong):
        return "weight decay of gains"
    return "bias correction or epsilon of AdamW"


def _batch_of(q: Question, k: int, loss: float, params: Arrays) -> int | None:
    """The number of the batch that has this loss under the parameters before step k."""
    here = replace(q.ours.source, read=lambda name, rows=interchange.EVERY: params[name][rows])
    losses_n = TorchSide(here).losses(q.config("float64"), q.tokens_nBS)
    nearest = int(np.abs(losses_n - loss).argmin())
    return nearest if abs(losses_n[nearest] / loss - 1) < 1e-9 else None


def _factor(measured: Arrays, truth: Arrays) -> float | None:
    """The number c with measured = c truth in every tensor, if there is one other than 1."""
    dots = sum(float((measured[n] * truth[n]).sum()) for n in truth)
    factor = dots / sum(float((truth[n] ** 2).sum()) for n in truth)
    scaled = {n: factor * truth[n] for n in truth}
    same = _worst(measured, scaled)[1] < 1e-9 and abs(factor - 1) > 1e-9
    return factor if same else None


def decoding(q: Question) -> Iterator[Line]:
    """Logits with the KV cache against those without; tokens that differ, greedy and sampled."""
    tokens_BT = q.inputs_BT[:, :24]
    for side in (q.ours, q.theirs):
        truth = side.operations("float64", tokens_BT)["logits"]  # No cache here.
        measured = distance(side.cached_logits("float64", tokens_BT), truth)
        where = "" if measured <= FLOAT64 else f"KV cache of {side.name}"
        name = f"logits with KV cache from those without, {side.name}"
        yield Line(name, "float64", measured, FLOAT64, where=where)
    prompts = q.tokens_nBS[0][:, :8].tolist()
    for dtype in ("float64", "float32"):
        for name, temperature in (("greedy", 0.0), ("sampled", 1.0)):
            ours, theirs = (
                side.generate(dtype, prompts, q.decode, temperature) for side in (q.ours, q.theirs)
            )
            different = ours != theirs
            rows, steps = np.nonzero(different)
            first = int(steps.min()) if len(steps) else 0
            where = f"token {first} of row {rows[steps.argmin()]}" if len(steps) else ""
            title = f"{name} tokens that differ, of {ours.size}"
            yield Line(title, dtype, float(different.sum()), 0.0, where=where)


def round_trip(source: Checkpoint, controls: bool = True) -> Line:
    """Tensors that change bits from torch to JAX to torch to interchange."""
    with tempfile.TemporaryDirectory(prefix="parity-") as directory:
        path = Path(directory) / "start"
        interchange.write_checkpoint(path, source)
        for i, kind in enumerate(("torch", "jax", "torch", "safetensors")):
            convert(path, Path(directory) / f"{i}-{kind}", kind)
            path = Path(directory) / f"{i}-{kind}"
        end = open_any(path)

        def changed(read: Callable[[str], np.ndarray]) -> list[str]:
            return [key for key in source.tensors if not _same_bits(read(key), end.read(key))]

        found, kept = changed(source.read), end.trainer_state == source.trainer_state
        name = "round trip torch, JAX, torch: tensors that change"
        where = (found or [""])[0] if kept else "trainer_state.json"
        line = Line(name, "bits", float(len(found) + (not kept)), 0.0, where=where)
        if not controls:
            return line
        first = next(iter(source.tensors))

        def one_bit(key: str) -> np.ndarray:
            array = np.array(source.read(key))
            if key == first:
                array.reshape(-1).view(np.uint8)[0] ^= 1
            return array

        return replace(line, control=float(len(changed(one_bit))), fault="one bit flipped")


MEASURES: dict[str, Callable[[Question], Iterator[Line]]] = {
    "forward": forward,
    "loss": loss,
    "padding": padding,
    "gradients": gradients,
    "training": training,
    "decoding": decoding,
}

FAULTS = {
    "float32": ("bfloat16 products inside float32", "embedding times sqrt(width)"),
    "bfloat16": ("RoPE turns neighbours, not halves", "embedding times sqrt(width)"),
    "forward": ("RoPE theta 1 % off", "embedding times sqrt(width)"),
    "loss": ("labels not shifted",),
    "padding": ("padding counts in the loss",),
    "gradients": ("RMSNorm epsilon 1e-6",),
    "training": ("1e-6 added to the norm that clips", "learning rate of the next step"),
    "decoding": ("KV cache one position late",),
}
"""Part or dtype -> the faults that are planted, in JAX and then in torch, as its controls."""


def place(key: str) -> str:
    """`layers.3.attention.wq rope out` as `layer 3 attention, RoPE of q`."""
    path, _, end = key.rpartition(" ")
    match = re.match(r"layers\.(\d+)\.?(.*)", path)
    if not match:
        return key if not path else path if end == "out" else f"input of {path}"
    layer, operation = f"layer {match[1]}", match[2]
    out = {
        "": "output",
        "attention.wq rope": "attention, RoPE of q",
        "attention.wk rope": "attention, RoPE of k",
        "attention": "attention, softmax(q k) v",
        "mlp": "mlp, w2",
    }
    into = {
        "": "input",
        "mlp_norm": ", input of mlp_norm: x + attention",
        "mlp.w2": "mlp, silu(w1 x) * w3 x",
        "attention.wo": "attention, softmax(q k) v",
        "output_norm": ", input of output_norm: h + mlp",
    }
    if end == "out":
        text = out.get(operation, operation.replace(".", ", "))
    else:
        text = into.get(operation, f", input of {operation.replace('.', ', ')}")
    return layer + ("" if text.startswith(",") else " ") + text


def distance(measured: np.ndarray, truth: np.ndarray) -> float:
    """Relative difference by the Frobenius norm, computed in float64."""
    truth = truth.astype(np.float64)
    difference = np.linalg.norm((measured.astype(np.float64) - truth).ravel())
    norm = np.linalg.norm(truth.ravel())
    return float(difference / norm) if norm else float(difference)


def _worst(measured: Arrays, truth: Arrays) -> tuple[str, float]:
    assert measured.keys() == truth.keys()
    distances = {key: distance(measured[key], truth[key]) for key in truth}
    where = max(distances, key=lambda key: distances[key])
    return where, distances[where]


def _all(measured: Arrays, truth: Arrays) -> float:
    """Relative difference of all tensors as one vector."""
    parts = [distance(measured[key], truth[key]) for key in truth]
    norms = [np.linalg.norm(truth[key].ravel()) for key in truth]
    return float(np.linalg.norm(np.multiply(parts, norms)) / np.linalg.norm(norms))


def _last(steps: Iterator[Step]) -> Step:
    return next(islice(steps, STEPS - 1, None))


def _same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def drawn(model: ModelConfig, seed: int = 0) -> Checkpoint:
    """A model that never was a checkpoint: initial weights, and gains drawn around one.

    Its matrices have standard deviation 1 / sqrt(width), 0.07 for the demo. At 0.02 and with gains
    of one, removing RoPE or swapping two norms would hide below any tolerance.
    """

    def read(name: str, rows: slice = interchange.EVERY) -> np.ndarray:
        return initial_weight(model, seed, name, rows, dtype=np.float64, gain_std=0.2)

    tensors = {n: (np.dtype(np.float64), s) for n, s in model.parameter_shapes().items()}
    return Checkpoint(Path("(drawn)"), "drawn", model, None, tensors, read)


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


COLUMNS = ("what", "dtype", "measured", "allowed", "floor", "with a fault", "")


def _cells(line: Line) -> list[str]:
    label = "first wrong" if not line.passed else "largest"
    return [
        line.name + (f" ({label}: {line.where})" if line.where else ""),
        line.dtype,
        f"{line.measured:.2g}",
        f"{line.allowed:.2g}",
        "" if line.floor is None else f"{line.floor:.2g}",
        "" if line.control is None else f"{line.control:.2g} ({line.fault})",
        "pass" if line.passed else "FAIL",
    ]


@command
def main() -> None:
    # JAX is imported by now: the environment variable would be read no more.
    jax.config.update("jax_platforms", "cpu")
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("source", type=Path, help="a checkpoint of any kind, or a *.yaml")
    parser.add_argument("other", type=Path, nargs="?", help="a checkpoint for JAX to compute with")
    parser.add_argument("--out", type=Path, help="directory for report.json, .md, .html")
    parser.add_argument(
        "--quick", action="store_true", help="without bfloat16 and without planted faults"
    )
    args = parser.parse_args()
    if args.source.suffix in (".yaml", ".yml"):
        source = drawn(configuration.load(args.source).model)
    else:
        source = open_any(args.source)
    other = None if args.other is None else open_any(args.other)
    table = Table(*COLUMNS, title=f"parity of {args.source}")
    lines = []
    low: tuple[Dtype, ...] = ("float32",) if args.quick else ("float32", "bfloat16")
    with Console(stderr=True).status("measuring") as status:
        for line in check(source, other, controls=not args.quick, low=low):
            status.update(f"measured: {line.name}, {line.dtype}")
            lines.append(line)
            table.add_row(*_cells(line), style="" if line.passed else "bold red")
    print_table(table)
    if args.out:
        write_report(lines, args.out, str(args.source))
    if failed := [line for line in lines if not line.passed]:
        where = f"; first difference: {failed[0].where}" if failed[0].where else ""
        print(f"{len(failed)} of {len(lines)} lines failed: {failed[0].name}{where}")
        sys.exit(1)


if __name__ == "__main__":
    main()
