"""The comparisons of `parity.check`: a function for each part, which yields lines of the report.

Shapes: B batch, T time, S = T + 1 tokens, n steps.
Longer than 400 lines: every line of the report is defined here, one part after the other.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

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
from mooshak.data.packing import IGNORE_INDEX, Batch, make_batch
from mooshak.numerics.schedule import has_weight_decay
from parity.backends import Backend, CacheCall, ForwardBackward, Step, TorchBackend
from parity.distance import Arrays, difference, distance, global_distance, worst_tensor
from parity.tolerances import EPS, FLOAT32_LOGITS, FLOAT64, RATIO, TINY

STEPS = 20

TOP_P = 0.9
"""Of the lines of nucleus sampling."""


@dataclass(frozen=True)
class Line:
    """One line of the report."""

    name: str
    dtype: str
    measured: float
    allowed: float
    noise_floor: float | None = None
    """The effect of rounding on this quantity: the other framework's own distance from float64
    where `measured` is one framework's; in float64, the larger of both frameworks' distances of
    float32 from float64, times the ratio of the roundings (`ROUNDING`)."""
    negative_control: float | None = None
    """The same measurement with the fault `fault` injected."""
    fault: str = ""
    where: str = ""
    """First place that is wrong; of a line that passes, the place of the largest difference."""
    layout: str = ""
    """The mesh or the processes that the line is about."""

    documents: bool = False
    """True for a line about a layout on packed documents."""

    @property
    def passed(self) -> bool:
        """True if the difference is allowed, and an injected fault exceeds what is allowed."""
        blind = self.negative_control is not None and self.negative_control <= self.allowed
        return bool(np.isfinite(self.measured) and self.measured <= self.allowed and not blind)


@dataclass(frozen=True)
class ParityCase:
    """Both backends and the tokens that they are compared on."""

    torch: Backend
    jax: Backend
    tokens_nBS: np.ndarray
    decode: int
    max_grad_norm: float = 1.0

    @property
    def inputs_BT(self) -> np.ndarray:
        return self.tokens_nBS[0][:, :-1]

    @property
    def batches(self) -> list[Batch[np.ndarray]]:
        """Return one batch per step."""
        return [make_batch(tokens_BS) for tokens_BS in self.tokens_nBS]

    @property
    def packed(self) -> list[Batch[np.ndarray]]:
        """Return the same tokens as rows of packed documents, with document masks."""
        return [make_batch(tokens_BS, segments(tokens_BS.shape)) for tokens_BS in self.tokens_nBS]

    def config(self, dtype: Dtype) -> Config:
        """Return a recipe that uses clipping, weight decay, a schedule and accumulation."""
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


def segments(shape: tuple[int, ...]) -> np.ndarray:
    """Return the documents of rows of T + 1 tokens, one of a single token in most rows.

    Every fifth row is one document: data-parallel ranks get unequal numbers of labels.
    """
    n_rows, n_tokens = shape
    T = n_tokens - 1
    short, long = T // 3, T - 1 - T // 3
    rows = [(short, 1, long), (1, long, short), (long, short, 1), (long, 1, short), (T,)]
    segments_BS = np.ones(shape, np.int32)
    for row in range(n_rows):
        for border in np.cumsum(rows[row % 5])[:-1]:
            segments_BS[row, border:] += 1
    return segments_BS


def forward(q: ParityCase) -> Iterator[Line]:
    """Compare logits and the hidden states of every layer in float64."""
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
    """The compared results of a training."""

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
        """Run the steps."""
        losses, norms, first, last = [], [], None, None
        for last in steps:
            first = last if first is None else first
            losses.append(last.loss)
            norms.append(last.norm)
        assert first is not None and last is not None
        every = np.array(losses), np.array(norms)
        return cls(*every, first.exp_avg, last.exp_avg_sq, last.params)

    def distances(self, truth: "Outline") -> dict[str, float]:
        """Return relative differences from another training: of trees, that of the worst tensor."""
        return {
            f"losses of {STEPS} AdamW steps": distance(self.losses, truth.losses),
            f"gradient norms of {STEPS} AdamW steps": distance(self.norms, truth.norms),
            "clipped gradients of the first step": worst_tensor(self.gradients, truth.gradients)[1],
            f"exp_avg_sq after {STEPS} AdamW steps": worst_tensor(
                self.exp_avg_sq, truth.exp_avg_sq
            )[1],
            f"parameters after {STEPS} AdamW steps": worst_tensor(self.params, truth.params)[1],
        }


@dataclass(frozen=True)
class Float64Reference:
    """Results of torch in float64, which the other parts show to equal those of JAX."""

    operations: Arrays
    losses: np.ndarray
    gradients: Arrays
    training: Outline

    @classmethod
    def of(cls, q: ParityCase) -> "Float64Reference":
        """Compute them."""
        config = q.config("float64")
        return cls(
            q.torch.operations("float64", q.inputs_BT),
            q.torch.losses(config, q.batches),
            q.torch.forward_backward(config, q.batches[0]).gradients,
            Outline.of(q.torch.steps(config, q.batches)),
        )


def precision(truth: Float64Reference, dtype: Dtype, q: ParityCase) -> Iterator[Line]:
    """Compare each framework's distance from float64 in `dtype` with the other framework's."""
    backends, exact = (q.torch, q.jax), truth.operations
    found = [backend.operations(dtype, q.inputs_BT) for backend in backends]
    distances = {key: [distance(f[key], exact[key]) for f in found] for key in exact}
    places = []
    for i in range(2):
        excess = (key for key, d in distances.items() if d[i] > RATIO * max(d[1 - i], TINY))
        places.append(next(map(place, excess), ""))
    for key, name in _hidden(q.torch.source.model):
        limit = FLOAT32_LOGITS if (key, dtype) == ("logits", "float32") else np.inf
        yield from _both(name, dtype, distances[key], places, limit)
    config = q.config(dtype)
    apart = [distance(backend.losses(config, q.batches), truth.losses) for backend in backends]
    yield from _both(f"losses of {STEPS} batches", dtype, apart, places)
    passes = [backend.forward_backward(config, q.batches[0]) for backend in backends]
    apart = [global_distance(one.gradients, truth.gradients) for one in passes]
    yield from _both("all gradients", dtype, apart, places)
    trained = [Outline.of(backend.steps(config, q.batches)) for backend in backends]
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
    """Compare the loss of every batch in float64."""
    config = q.config("float64")
    ours, theirs = (backend.losses(config, q.batches) for backend in (q.torch, q.jax))
    measured = distance(theirs, ours)
    where = "" if measured <= FLOAT64 else "loss"
    yield Line(f"losses of {STEPS} batches", "float64", measured, FLOAT64, where=where)


def _padded(q: ParityCase, padding_BT: np.ndarray) -> Batch[np.ndarray]:
    """Return the first batch with some labels ignored."""
    batch = q.batches[0]
    return batch._replace(labels=np.where(padding_BT, np.int32(IGNORE_INDEX), batch.labels))


def padding(q: ParityCase) -> Iterator[Line]:
    """Compare the loss of a batch in which three labels in ten are padding, in float64."""
    batch = _padded(q, np.random.default_rng(1).random(q.inputs_BT.shape) < 0.3)
    config = q.config("float64")
    ours, theirs = (backend.losses(config, [batch]) for backend in (q.torch, q.jax))
    measured = distance(theirs, ours)
    where = "" if measured <= FLOAT64 else "loss of labels that are padding"
    yield Line("loss of a padded batch", "float64", measured, FLOAT64, where=where)


def log_probs(q: ParityCase) -> Iterator[Line]:
    """Compare log-probabilities per token and their gradients in float64.

    Three labels in ten are padding. The upstream gradient differs from token to token: normal, and
    zero for every fifth.
    """
    random = np.random.default_rng(1)
    batch = _padded(q, random.random(q.inputs_BT.shape) < 0.3)
    weights_BT = random.normal(size=q.inputs_BT.shape)
    weights_BT *= random.random(weights_BT.shape) < 0.8
    (ours, our_gradients), (theirs, their_gradients) = (
        backend.log_probs("float64", batch, weights_BT) for backend in (q.torch, q.jax)
    )
    measured = distance(theirs, ours)
    where = "" if measured <= FLOAT64 else "log-probabilities"
    yield Line("log-probabilities per token", "float64", measured, FLOAT64, where=where)
    where, measured = worst_tensor(their_gradients, our_gradients)
    name = "gradients of weighted log-probabilities, the worst"
    yield Line(name, "float64", measured, FLOAT64, where=where)


def gradients(q: ParityCase) -> Iterator[Line]:
    """Compare every gradient of the first batch in float64."""
    config = q.config("float64")
    ours, theirs = (backend.forward_backward(config, q.batches[0]) for backend in (q.torch, q.jax))
    measured, where = _worst_gradient(theirs.gradients, ours.gradients)
    yield Line("every gradient, the worst", "float64", measured, FLOAT64, where=where)


def _worst_gradient(measured: Arrays, truth: Arrays) -> tuple[float, str]:
    """Return the largest difference of a gradient, and the parameter closest to its cause."""
    distances = {key: distance(measured[key], value) for key, value in truth.items()}
    worst = max(distances, key=lambda key: distances[key])
    # Gradients flow backwards: the last parameter whose gradient is wrong is closest to the fault.
    wrong = [key for key in distances if not distances[key] <= FLOAT64]
    return distances[worst], (wrong or [worst])[-1]


def document_mask(q: ParityCase) -> Iterator[Line]:
    """Compare logits, loss and every gradient of packed documents in float64."""
    config, batch = q.config("float64"), q.packed[0]
    ours, theirs = (backend.forward_backward(config, batch) for backend in (q.torch, q.jax))
    yield from _packed_lines("packed documents", theirs, ours, batch)


def packing(q: ParityCase) -> Iterator[Line]:
    """Compare packed documents with each document alone in float64, in each framework."""
    config, batch = q.config("float64"), q.packed[0]
    for framework, backend in (("torch", q.torch), ("JAX", q.jax)):
        packed = backend.forward_backward(config, batch)
        logits_BTV, loss, grads = np.full_like(packed.logits, np.nan), 0.0, dict[str, Any]()
        for places, documents in _documents(batch):
            found = backend.forward_backward(config, documents)
            for place_, logits_TV in zip(places, found.logits, strict=True):
                logits_BTV[place_] = logits_TV
            loss += found.loss
            grads = {name: grads.get(name, 0.0) + grad for name, grad in found.gradients.items()}
        alone = ForwardBackward(logits_BTV, loss, grads)
        name = f"packed documents from each document alone, {framework}"
        yield from _packed_lines(name, packed, alone, batch)


def _documents(
    batch: Batch[np.ndarray],
) -> Iterator[tuple[list[tuple[int, slice]], Batch[np.ndarray]]]:
    """Yield the documents of each length: their places in a batch, and unpacked, one per row."""
    assert batch.segments is not None
    by_length: dict[int, list[tuple[int, slice]]] = {}
    for row, segments_T in enumerate(batch.segments):
        starts = np.flatnonzero(np.diff(segments_T, prepend=0))
        for start, end in zip(starts, [*starts[1:], len(segments_T)], strict=True):
            by_length.setdefault(end - start, []).append((row, slice(start, end)))
    for places in by_length.values():
        tokens_BT, labels_BT = (
            np.stack([array[place] for place in places]) for array in (batch.tokens, batch.labels)
        )
        yield places, Batch(tokens_BT, labels_BT)


def _packed_lines(
    name: str, measured: ForwardBackward, truth: ForwardBackward, batch: Batch[np.ndarray]
) -> Iterator[Line]:
    """Yield the lines of logits, loss and gradients of a packed batch."""
    apart = distance(measured.logits, truth.logits)
    where = ""
    if not apart <= FLOAT64:
        assert batch.segments is not None and batch.positions is not None
        norm_BT = np.linalg.norm(truth.logits, axis=-1)
        apart_BT = np.linalg.norm(measured.logits - truth.logits, axis=-1)
        row, t = np.argwhere(~(apart_BT <= FLOAT64 * norm_BT))[0]
        document, token = batch.segments[row, t], batch.positions[row, t]
        where = f"row {row}, document {document}, token {token}"
    yield Line(f"logits of {name}", "float64", apart, FLOAT64, where=where)
    apart = difference(measured.loss, truth.loss)
    where = "" if apart <= FLOAT64 else "loss of packed documents"
    yield Line(f"loss of {name}", "float64", apart, FLOAT64, where=where)
    apart, where = _worst_gradient(measured.gradients, truth.gradients)
    yield Line(f"every gradient of {name}, the worst", "float64", apart, FLOAT64, where=where)


def training(q: ParityCase) -> Iterator[Line]:
    """Compare 20 steps of the trainers' own step functions in lockstep, in float64."""
    config = q.config("float64")
    names = ("losses", "gradient norms", "exp_avg", "exp_avg_sq", "parameters")
    worst = dict.fromkeys(names, 0.0)
    fault, before = "", q.torch.source
    past: Arrays = {name: before.read(name).astype(np.float64) for name in before.tensors}
    pairs = zip(q.torch.steps(config, q.batches), q.jax.steps(config, q.batches), strict=True)
    for k, (ours, theirs) in enumerate(pairs):
        apart = {
            "losses": difference(theirs.loss, ours.loss),
            "gradient norms": difference(theirs.norm, ours.norm),
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
    """Return the first quantity that differs in step k, in the order of computation."""
    if not difference(theirs.loss, ours.loss) <= FLOAT64:
        ratio = theirs.loss / ours.loss
        if abs(ratio - round(ratio)) < 1e-9 or abs(1 / ratio - round(1 / ratio)) < 1e-9:
            return f"accumulation: the loss is {ratio:.3g} times as large in JAX"
        match = _batch_of(q, k, theirs.loss, past), _batch_of(q, k, ours.loss, past)
        for framework, batch in zip(("JAX", "torch"), match, strict=True):
            if batch not in (None, k):
                return f"data order: {framework} computes with batch {batch}"
        return "the loss"
    if not difference(theirs.norm, ours.norm) <= FLOAT64:
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
    """Return the index of the batch that has this loss under the parameters before step k."""
    here = replace(q.torch.source, read=lambda name, rows=base.FULL_SLICE: params[name][rows])
    losses_n = TorchBackend(here).losses(q.config("float64"), q.batches)
    nearest = int(np.abs(losses_n - loss).argmin())
    return nearest if abs(losses_n[nearest] / loss - 1) < 1e-9 else None


def _factor(measured: Arrays, truth: Arrays) -> float | None:
    """Return c where measured = c truth in every tensor and c is not 1; None otherwise."""
    dots = sum(float((measured[n] * truth[n]).sum()) for n in truth)
    factor = dots / sum(float((truth[n] ** 2).sum()) for n in truth)
    scaled = {n: factor * truth[n] for n in truth}
    same = worst_tensor(measured, scaled)[1] < 1e-9 and abs(factor - 1) > 1e-9
    return factor if same else None


def cache(q: ParityCase) -> Iterator[Line]:
    """Compare logits with the KV cache with logits without a cache, in float64."""
    tokens_BT = q.inputs_BT[:, :24]
    half = tokens_BT.shape[1] // 2
    calls = [CacheCall(0, tokens_BT[:, :half])]
    calls += [CacheCall(t, tokens_BT[:, t : t + 1]) for t in range(half, tokens_BT.shape[1])]
    for framework, backend in (("torch", q.torch), ("JAX", q.jax)):
        truth = backend.operations("float64", tokens_BT)["logits"]  # Uses no cache.
        found = np.concatenate(backend.cached_logits("float64", calls), 1)
        measured = distance(found, truth)
        where = "" if measured <= FLOAT64 else f"KV cache of {framework}"
        name = f"logits with KV cache from those without, {framework}"
        yield Line(name, "float64", measured, FLOAT64, where=where)


def roll_back(q: ParityCase) -> Iterator[Line]:
    """Compare logits after a roll-back of the KV cache with logits without a cache, in float64.

    Half of the tokens are read, then others that are rejected; the caches are truncated, and the
    rest follows: two tokens per call in all rows, or one token per call in a single row.
    """
    for n_rows, n_new in ((len(q.inputs_BT), 2), (1, 1)):
        # Four positions fewer than the model has: room for a cache that is not truncated.
        tokens_BT, rejected_BT = (batch[:n_rows, :-5][:, :24] for batch in q.tokens_nBS[:2])
        half = tokens_BT.shape[1] // 2
        calls = [CacheCall(0, tokens_BT[:, :half])]
        calls += [CacheCall(t, rejected_BT[:, t : t + 1]) for t in range(half, half + 4)]
        n_before = len(calls)
        ends = range(half + n_new, tokens_BT.shape[1] + 1, n_new)
        calls += [CacheCall(end - n_new, tokens_BT[:, end - n_new : end]) for end in ends]
        what = f"{n_rows} rows" if n_rows > 1 else f"one row, {n_new} token per call"
        for framework, backend in (("torch", q.torch), ("JAX", q.jax)):
            truth = backend.operations("float64", tokens_BT)["logits"][:, half : ends[-1]]
            found = backend.cached_logits("float64", calls)[n_before:]
            measured = distance(np.concatenate(found, 1), truth)
            where = "" if measured <= FLOAT64 else f"roll-back of the KV cache of {framework}"
            name = f"logits after a roll-back of the KV cache ({what}), {framework}"
            yield Line(name, "float64", measured, FLOAT64, where=where)


def decoding(q: ParityCase) -> Iterator[Line]:
    """Count tokens that differ, greedy and sampled."""
    prompts = q.tokens_nBS[0][:, :8].tolist()
    settings = (("greedy", 0.0, 1.0), ("sampled", 1.0, 1.0), (f"top_p {TOP_P} sampled", 1.0, TOP_P))
    for dtype in ("float64", "float32"):
        for name, temperature, top_p in settings:
            ours, theirs = (
                backend.generate(dtype, prompts, q.decode, temperature, top_p)
                for backend in (q.torch, q.jax)
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
    "document_mask": document_mask,
    "packing": packing,
    "training": training,
    "cache": cache,
    "roll_back": roll_back,
    "decoding": decoding,
}


WITH_NOISE_FLOOR = tuple(part for part in COMPARISONS if part != "decoding")
"""Parts whose lines have a noise floor; tokens either differ or do not."""

WITH_ITSELF = ("packing", "cache", "roll_back")
"""Parts that compare each framework with itself."""


def place(key: str) -> str:
    """Return `layers.3.attention.wq rope out` as `layer 3 attention, RoPE of q`."""
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
