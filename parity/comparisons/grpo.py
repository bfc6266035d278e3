"""Compare GRPO: losses of sampled answers, their gradients, and steps on packed rows."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from mooshak.config.grpo import GRPOConfig
from mooshak.config.sections import Config, DataConfig
from mooshak.data.packing import IGNORE_INDEX, Batch
from mooshak.data.samples import make_rows
from mooshak.numerics import grpo as formulas
from parity.backends import ForwardBackward
from parity.comparisons.case import Line, ParityCase
from parity.comparisons.places import worst_gradient
from parity.comparisons.sft import conversation_rows
from parity.comparisons.steps import compare_steps
from parity.distance import difference
from parity.tolerances import FLOAT64

GRPO = GRPOConfig(temperature=0.7, beta=0.3, epsilon=0.3, epsilon_high=0.6, loss_type="grpo")

DENOMINATOR = {
    "micro-batches": "step {}: denominator of each micro-batch, not of the batch",
    "padding": "step {}: prompts and padding count in the denominator",
}


def grpo(q: ParityCase) -> Iterator[Line]:
    """Compare loss, every gradient and 20 steps of GRPO with a KL term in float64.

    The ratios are those of a later update: a part of them is clipped.
    """
    config = replace(q.config("float64"), data=DataConfig(format="prompts"), grpo=GRPO)
    batches = [sampled_rows(tokens_BS, k, config) for k, tokens_BS in enumerate(q.tokens_nBS)]
    ours, theirs = (one.forward_backward(config, batches[0]) for one in (q.torch, q.jax))
    apart = difference(theirs.loss, ours.loss)
    where = "" if apart <= FLOAT64 else _diagnosis(batches[0], ours, theirs)
    yield Line("loss of GRPO", "float64", apart, FLOAT64, where=where)
    apart, worst = worst_gradient(theirs.gradients, ours.gradients)
    name = "every gradient of GRPO, the worst"
    yield Line(name, "float64", apart, FLOAT64, where=where or worst)
    yield compare_steps(
        (q.torch, q.jax),
        config,
        batches,
        "of GRPO",
        where,
        lambda k, ours, theirs: _denominator(batches[k], k, theirs.loss / ours.loss),
    )


def sampled_rows(tokens_BS: np.ndarray, number: int, config: Config) -> Batch[np.ndarray]:
    """Return packed answers with drawn log-probabilities and advantages."""
    samples = conversation_rows(tokens_BS)
    batch, draw = make_rows(samples, config.T), np.random.default_rng(number)
    shape, n_samples = batch.labels.shape, max(map(len, samples))
    lengths = [sample.n_labels for row in samples for sample in row]
    weights = iter(formulas.token_weights(lengths, config.grpo))
    weights_BT = np.zeros(shape)
    for row, here in enumerate(samples):
        for segment, _ in enumerate(here, 1):
            assert batch.segments is not None
            weights_BT[row, batch.segments[row] == segment] = next(weights)
    near = -np.log(config.model.vocab_size)
    return batch._replace(
        weights=weights_BT * (batch.labels != IGNORE_INDEX),
        advantages=draw.normal(size=(len(samples), n_samples)),
        old_log_probs=draw.normal(near, 0.5, shape),
        reference=draw.normal(near, 0.5, shape),
    )


def _denominator(batch: Batch[np.ndarray], k: int, ratio: float) -> str:
    """Return the mistake in the denominator of losses that have this ratio."""
    share = int((batch.labels != IGNORE_INDEX).sum()) / batch.labels.size
    is_padding = min(abs(ratio - share), abs(1 / ratio - share)) < 1e-9
    return DENOMINATOR["padding" if is_padding else "micro-batches"].format(k)


def _diagnosis(batch: Batch[np.ndarray], ours: ForwardBackward, theirs: ForwardBackward) -> str:
    """Return the mistake whose loss in one framework follows from the logits of the other."""
    for framework, sound, loss in (("JAX", ours, theirs.loss), ("torch", theirs, ours.loss)):
        for name, mistaken in _mistakes(batch, sound.logits).items():
            if difference(mistaken, loss) <= 1e-9:
                return f"{name}, in {framework}"
    return "loss of GRPO"


def _mistakes(batch: Batch[np.ndarray], logits_BTV: np.ndarray) -> dict[str, float]:
    """Return the losses, written out in NumPy, of typical mistakes."""
    tokens = _tokens(batch, logits_BTV, GRPO.temperature)
    without_kl = replace(GRPO, beta=0.0)
    late = np.roll(tokens.old_log_probs, 1, axis=1)
    one = formulas.kl_estimates(tokens, np)
    return {
        "the temperature is missing in the ratio": _loss(batch, _tokens(batch, logits_BTV, 1.0)),
        "old log-probabilities one token late": _loss(batch, tokens._replace(old_log_probs=late)),
        "the reference is the model that is trained": _loss(batch, tokens, without_kl),
        "the KL estimator has no ratio": _loss(batch, tokens, without_kl)
        + GRPO.beta * _sum(batch, one),
    }


def _tokens(
    batch: Batch[np.ndarray], logits_BTV: np.ndarray, temperature: float
) -> formulas.Tokens:
    assert batch.segments is not None and batch.advantages is not None
    scores_BTV = logits_BTV / temperature
    log_z_BT = np.log(np.exp(scores_BTV).sum(-1))
    labels_BT1 = np.maximum(batch.labels, 0)[..., None]
    log_probs_BT = np.take_along_axis(scores_BTV, labels_BT1, -1)[..., 0] - log_z_BT
    padded_BS = np.pad(batch.advantages, ((0, 0), (1, 0)))
    advantages_BT = np.take_along_axis(padded_BS, batch.segments, 1)
    return formulas.Tokens(log_probs_BT, batch.old_log_probs, batch.reference, advantages_BT)


def _loss(batch: Batch[np.ndarray], tokens: formulas.Tokens, config: GRPOConfig = GRPO) -> float:
    return _sum(batch, formulas.token_losses(tokens, config, np, lambda values: values)[0])


def _sum(batch: Batch[np.ndarray], losses_BT: np.ndarray) -> float:
    assert batch.weights is not None
    return float((losses_BT * batch.weights).sum())
