"""What `parity.check` compares: a function for each part, which yields lines of the report."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from mooshak.checkpoints import base
from mooshak.config.model import Dtype, ModelConfig
from mooshak.config.sections import (
    Config,
    OptimizerConfig,
    ParallelConfig,
    ScheduleConfig,
    TrainConfig,
)
from mooshak.numerics.schedule import has_weight_decay
from parity.backends import Arrays, Backend, Step, TorchBackend
from parity.distance import distance, global_distance, worst_tensor
from parity.tolerances import EPS, FLOAT32_LOGITS, FLOAT64, RATIO, TINY

STEPS = 20


@dataclass(frozen=True)
class Line:
    """One line of the report."""

    name: str
    dtype: str
    measured: float
    allowed: float
    noise_floor: float | None = None
    """What rounding alone does to this quantity: the other framework's own distance from float64
    where `measured` is one framework's; in float64, the larger of both frameworks' distances of
    float32 from float64, times the ratio of the roundings (`ROUNDING`)."""
    negative_control: float | None = None
    """What the same line shows with the fault `fault` planted."""
    fault: str = ""
    where: str = ""
    """Where it first goes wrong; of a line that passes, where the largest difference is."""
    layout: str = ""
    """The mesh or the processes, where it is about them."""

    @property
    def passed(self) -> bool:
        return bool(self.measured <= self.allowed)


@dataclass(frozen=True)
class ParityCase:
    """What is compared: both sides, and the tokens that they are given."""

    torch: Backend
    jax: Backend
    tokens_nBS: np.ndarray
    decode: int
    max_grad_norm: float = 1.0

    @property
    def inputs_BT(self) -> np.ndarray:
        return self.tokens_nBS[0][:, :-1]

    def config(self, dtype: Dtype) -> Config:
        """A recipe in which everything acts: clipping, weight decay, schedule, accumulation."""
        _, batch, tokens = self.tokens_nBS.shape
        return Config(
            model=self.torch.source.model,
            optimizer=OptimizerConfig(
                learning_rate=1e-3, eps=EPS, weight_decay=0.1, max_grad_norm=self.max_grad_norm
            ),
            schedule=ScheduleConfig(warmup_steps=5),
            train=TrainConfig(
                steps=STEPS,
                batch_size=batch,
                sequence_length=tokens - 1,
                gradient_accumulation_steps=2 if batch % 2 == 0 else 1,
                dtype=dtype,
                loss_chunk=batch * 24,
            ),
            parallel=ParallelConfig(mesh="data=1"),
        )


def forward(q: ParityCase) -> Iterator[Line]:
    """Logits and the hidden states of every layer in float64."""
    ours = q.torch.operations("float64", q.inputs_BT)
    theirs = q.jax.operations("float64", q.inputs_BT)
    distances = {
        key: distance(theirs[key], value)
        if key in theirs and theirs[key].shape == value.shape
        else np.inf
        for key, value in ours.items()
    }
    where = next((place(key) for key, d in distances.items() if not d <= FLOAT64), "")
    for key, name in _hidden(q.torch.source.model):
        yield Line(name, "float64", distances[key], FLOAT64, where=where)


def _hidden(model: ModelConfig) -> list[tuple[str, str]]:
    layers = [(f"layers.{i} out", f"hidden states after layer {i}") for i in range(model.n_layers)]
    first = ("embeddings out", "hidden states after the embeddings")
    return [("logits", "logits"), first, *layers]


@dataclass(frozen=True)
class Outline:
    """What is kept of a training."""

    losses: np.ndarray
    norms: np.ndarray
    """Of the gradients."""
    gradients: Arrays
    """First moments after the first step: the clipped gradients times 1 - beta1."""
    exp_avg_sq: Arrays
    params: Arrays
    """After the last step, as the second moments."""

    @classmethod
    def of(cls, steps: Iterator[Step]) -> "Outline":
        losses, norms, first, last = [], [], None, None
        for last in steps:
            first = last if first is None else first
            losses.append(last.loss)
            norms.append(last.norm)
        assert first is not None and last is not None
        every = np.array(losses), np.array(norms)
        return cls(*every, first.exp_avg, last.exp_avg_sq, last.params)

    def distances(self, truth: "Outline") -> dict[str, float]:
        """Relative differences from another training; the worst tensor's, where there are many."""
        return {
            "losses": distance(self.losses, truth.losses),
            "gradient norms": distance(self.norms, truth.norms),
            "gradients": worst_tensor(self.gradients, truth.gradients)[1],
            "exp_avg_sq": worst_tensor(self.exp_avg_sq, truth.exp_avg_sq)[1],
            "parameters": worst_tensor(self.params, truth.params)[1],
        }


@dataclass(frozen=True)
class Float64Reference:
    """What torch computes in float64, which the other parts show to be what JAX computes."""

    operations: Arrays
    losses: np.ndarray
    gradients: Arrays
    training: Outline

    @classmethod
    def of(cls, q: ParityCase) -> "Float64Reference":
        config = q.config("float64")
        return cls(
            q.torch.operations("float64", q.inputs_BT),
            q.torch.losses(config, q.tokens_nBS),
            q.torch.gradients(config, q.tokens_nBS[0]),
            Outline.of(q.torch.steps(config, q.tokens_nBS)),
        )


def precision(truth: Float64Reference, dtype: Dtype, q: ParityCase) -> Iterator[Line]:
    """How far each framework is in `dtype` from float64, beside how far the other is."""
    sides, exact = (q.torch, q.jax), truth.operations
    found = [side.operations(dtype, q.inputs_BT) for side in sides]
    distances = {key: [distance(f[key], exact[key]) for f in found] for key in exact}
    places = []
    for i in range(2):
        excess = (key for key, d in distances.items() if d[i] > RATIO * max(d[1 - i], TINY))
        places.append(next(map(place, excess), ""))
    for key, name in _hidden(q.torch.source.model):
        limit = FLOAT32_LOGITS if (key, dtype) == ("logits", "float32") else np.inf
        yield from _both(name, dtype, distances[key], places, limit)
    config = q.config(dtype)
    apart = [distance(side.losses(config, q.tokens_nBS), truth.losses) for side in sides]
    yield from _both(f"losses of {STEPS} batches", dtype, apart, places)
    apart = [
        global_distance(side.gradients(config, q.tokens_nBS[0]), truth.gradients) for side in sides
    ]
    yield from _both("all gradients", dtype, apart, places)
    trained = [Outline.of(side.steps(config, q.tokens_nBS)) for side in sides]
    apart = [global_distance(training.params, truth.training.params) for training in trained]
    yield from _both(f"all parameters after {STEPS} AdamW steps", dtype, apart, places)


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


def loss(q: ParityCase) -> Iterator[Line]:
    """The loss of every batch in float64."""
    config = q.config("float64")
    ours, theirs = (side.losses(config, q.tokens_nBS) for side in (q.torch, q.jax))
    measured = distance(theirs, ours)
    where = "" if measured <= FLOAT64 else "loss"
    yield Line(f"losses of {STEPS} batches", "float64", measured, FLOAT64, where=where)


def padding(q: ParityCase) -> Iterator[Line]:
    """The loss of a batch in which three labels in ten are padding, in float64."""
    padding_BT = np.random.default_rng(1).random(q.inputs_BT.shape) < 0.3
    ours, theirs = (
        side.padded_loss("float64", q.tokens_nBS[0], padding_BT) for side in (q.torch, q.jax)
    )
    measured = abs(theirs / ours - 1)
    where = "" if measured <= FLOAT64 else "loss of labels that are padding"
    yield Line("loss of a padded batch", "float64", measured, FLOAT64, where=where)


def log_probs(q: ParityCase) -> Iterator[Line]:
    """Log-probabilities per token, three labels in ten padding, and their gradients in float64.

    The upstream gradient differs from token to token: normal, and zero for every fifth.
    """
    random = np.random.default_rng(1)
    padding_BT = random.random(q.inputs_BT.shape) < 0.3
    weights_BT = random.normal(size=padding_BT.shape) * (random.random(padding_BT.shape) < 0.8)
    (ours, our_gradients), (theirs, their_gradients) = (
        side.log_probs("float64", q.tokens_nBS[0], padding_BT, weights_BT)
        for side in (q.torch, q.jax)
    )
    measured = distance(theirs, ours)
    where = "" if measured <= FLOAT64 else "log-probabilities"
    yield Line("log-probabilities per token", "float64", measured, FLOAT64, where=where)
    where, measured = worst_tensor(their_gradients, our_gradients)
    name = "gradients of weighted log-probabilities, the worst"
    yield Line(name, "float64", measured, FLOAT64, where=where)


def gradients(q: ParityCase) -> Iterator[Line]:
    """Every gradient of the first batch in float64."""
    config = q.config("float64")
    ours, theirs = (side.gradients(config, q.tokens_nBS[0]) for side in (q.torch, q.jax))
    distances = {key: distance(theirs[key], value) for key, value in ours.items()}
    worst = max(distances, key=lambda key: distances[key])
    # Gradients go backwards: the last parameter whose gradient is wrong is nearest to the fault.
    wrong = [key for key in distances if not distances[key] <= FLOAT64]
    where = (wrong or [worst])[-1]
    yield Line("every gradient, the worst", "float64", distances[worst], FLOAT64, where=where)


def training(q: ParityCase) -> Iterator[Line]:
    """20 steps of the trainers' own step functions side by side, in float64."""
    config = q.config("float64")
    names = ("losses", "gradient norms", "exp_avg", "exp_avg_sq", "parameters")
    worst = dict.fromkeys(names, 0.0)
    fault, before = "", q.torch.source
    past: Arrays = {name: before.read(name).astype(np.float64) for name in before.tensors}
    pairs = zip(q.torch.steps(config, q.tokens_nBS), q.jax.steps(config, q.tokens_nBS), strict=True)
    for k, (ours, theirs) in enumerate(pairs):
        apart = {
            "losses": abs(theirs.loss / ours.loss - 1),
            "gradient norms": abs(theirs.norm / ours.norm - 1),
            "exp_avg": worst_tensor(theirs.exp_avg, ours.exp_avg)[1],
            "exp_avg_sq": worst_tensor(theirs.exp_avg_sq, ours.exp_avg_sq)[1],
            "parameters": worst_tensor(theirs.params, ours.params)[1],
        }
        if not fault and not max(apart.values()) <= FLOAT64:
            fault = f"step {k}, " + _diagnosis(q, k, ours, theirs, past)
        past = ours.params
        worst = {name: max(worst[name], apart[name]) for name in names}
        last = worst_tensor(theirs.params, ours.params)[0]
    for name in names:
        title = f"{name} of {STEPS} AdamW steps, the worst"
        where = fault or (last if name == "parameters" else "")
        yield Line(title, "float64", worst[name], FLOAT64, where=where)


def _diagnosis(q: ParityCase, k: int, ours: Step, theirs: Step, past: Arrays) -> str:
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
    name, apart = worst_tensor(theirs.exp_avg, ours.exp_avg)
    if apart > FLOAT64:
        factor = _factor(theirs.exp_avg, ours.exp_avg)
        if factor is not None:
            return f"clipping or beta1: the gradient is {factor:.7g} times as large in JAX"
        return f"exp_avg of {name}"
    name, apart = worst_tensor(theirs.exp_avg_sq, ours.exp_avg_sq)
    if apart > FLOAT64:
        return f"exp_avg_sq of {name}: beta2"
    updates = [{n: p[n] - past[n] for n in past} for p in (theirs.params, ours.params)]
    wrong = {n for n in past if distance(updates[0][n], updates[1][n]) > 1e-9}
    if factor := _factor(*updates):
        return f"learning rate: the update is {factor:.7g} times as large in JAX"
    if all(has_weight_decay(n) for n in wrong):
        return "weight decay of matrices"
    if not any(has_weight_decay(n) for n in wrong):
        return "weight decay of gains"
    return "bias correction or epsilon of AdamW"


def _batch_of(q: ParityCase, k: int, loss: float, params: Arrays) -> int | None:
    """The number of the batch that has this loss under the parameters before step k."""
    here = replace(q.torch.source, read=lambda name, rows=base.FULL_SLICE: params[name][rows])
    losses_n = TorchBackend(here).losses(q.config("float64"), q.tokens_nBS)
    nearest = int(np.abs(losses_n - loss).argmin())
    return nearest if abs(losses_n[nearest] / loss - 1) < 1e-9 else None


def _factor(measured: Arrays, truth: Arrays) -> float | None:
    """The number c with measured = c truth in every tensor, if there is one other than 1."""
    dots = sum(float((measured[n] * truth[n]).sum()) for n in truth)
    factor = dots / sum(float((truth[n] ** 2).sum()) for n in truth)
    scaled = {n: factor * truth[n] for n in truth}
    same = worst_tensor(measured, scaled)[1] < 1e-9 and abs(factor - 1) > 1e-9
    return factor if same else None


def cache(q: ParityCase) -> Iterator[Line]:
    """Logits with the KV cache against those without, in float64."""
    tokens_BT = q.inputs_BT[:, :24]
    for framework, side in (("torch", q.torch), ("JAX", q.jax)):
        truth = side.operations("float64", tokens_BT)["logits"]  # No cache here.
        measured = distance(side.cached_logits("float64", tokens_BT), truth)
        where = "" if measured <= FLOAT64 else f"KV cache of {framework}"
        name = f"logits with KV cache from those without, {framework}"
        yield Line(name, "float64", measured, FLOAT64, where=where)


def decoding(q: ParityCase) -> Iterator[Line]:
    """Tokens that differ, greedy and sampled."""
    prompts = q.tokens_nBS[0][:, :8].tolist()
    for dtype in ("float64", "float32"):
        for name, temperature in (("greedy", 0.0), ("sampled", 1.0)):
            ours, theirs = (
                side.generate(dtype, prompts, q.decode, temperature) for side in (q.torch, q.jax)
            )
            different = ours != theirs
            rows, steps = np.nonzero(different)
            first = int(steps.min()) if len(steps) else 0
            where = f"token {first} of row {rows[steps.argmin()]}" if len(steps) else ""
            title = f"{name} tokens that differ, of {ours.size}"
            yield Line(title, dtype, float(different.sum()), 0.0, where=where)


COMPARISONS: dict[str, Callable[[ParityCase], Iterator[Line]]] = {
    "forward": forward,
    "loss": loss,
    "padding": padding,
    "log_probs": log_probs,
    "gradients": gradients,
    "training": training,
    "cache": cache,
    "decoding": decoding,
}


WITH_NOISE_FLOOR = ("forward", "loss", "padding", "log_probs", "gradients", "training", "cache")
"""Parts whose lines have a floor; tokens either differ or do not."""


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
