"""Compare the trainers' own optimizer steps, in lockstep."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from mooshak.checkpoints import base
from mooshak.numerics.schedule import has_weight_decay
from parity.backends import Step, TorchBackend
from parity.comparisons.case import STEPS, Line, ParityCase
from parity.distance import Arrays, difference, distance, worst_tensor
from parity.tolerances import FLOAT64


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
