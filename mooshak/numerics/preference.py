"""Losses of preferences: one text of formulas for torch, JAX and NumPy.

`xp` is the module of the arrays: `torch`, `jax.numpy` or `numpy`; the formulas use only functions
that all three have, and no in-place operation. Log-probabilities are in nats.
Shapes: any; a pair has the same place in all arrays.
"""

from typing import Any, NamedTuple

from mooshak.config.dpo import DPOConfig

ACCURACY = "rewards/accuracies"
"""Share of the pairs whose chosen answer has the larger reward."""

METRICS = ("rewards/chosen", "rewards/rejected", "rewards/margins", ACCURACY)
"""Means over the pairs of a step that are logged, under TRL's names."""

KTO_METRICS = ("kl", ACCURACY)
"""The same of `kto`: the baseline, and the share of answers on the right side of it."""


def metric_names(dpo: DPOConfig) -> tuple[str, ...]:
    """Return the names of the metrics of a loss."""
    return KTO_METRICS if dpo.loss == "kto" else METRICS


class Pairs(NamedTuple):
    """Log-probabilities of the answers of pairs."""

    chosen: Any
    """log p(chosen answer) under the model, summed over its tokens."""
    rejected: Any
    reference_chosen: Any
    """The same under the reference; not used by a loss without a reference."""
    reference_rejected: Any
    n_chosen: Any
    """Tokens of the chosen answer, at least 1, as floating-point numbers."""
    n_rejected: Any


def pair_losses(pairs: Pairs, dpo: DPOConfig, xp: Any) -> tuple[Any, dict[str, Any]]:
    """Return the loss of each pair, and the metrics of each pair by name (`METRICS`)."""
    chosen, rejected = log_ratios(pairs, dpo)
    losses = LOSSES[dpo.loss](chosen, rejected, dpo, xp)
    rewards = dpo.beta * chosen, dpo.beta * rejected
    margins = rewards[0] - rewards[1]
    return losses, dict(zip(METRICS, (*rewards, margins, _is_positive(margins, xp)), strict=True))


def log_ratios(pairs: Pairs, dpo: DPOConfig) -> tuple[Any, Any]:
    """Return log(p / p_ref) of the answers, or log p without a reference, by length if it says."""
    chosen, rejected = pairs.chosen, pairs.rejected
    if dpo.has_reference:
        chosen, rejected = chosen - pairs.reference_chosen, rejected - pairs.reference_rejected
    if dpo.is_normalized:
        chosen, rejected = chosen / pairs.n_chosen, rejected / pairs.n_rejected
    return chosen, rejected


def kto_losses(
    pairs: Pairs, weights: Any, baseline: Any, dpo: DPOConfig, xp: Any
) -> tuple[Any, dict[str, Any]]:
    """Return the KTO loss (arXiv:2402.01306, equation 8) of each `chosen` answer, and the metrics.

    `weights` are positive for desirable answers and negative for undesirable ones. `baseline` is
    the reference point z, without a gradient: the mean over the global batch of the log-ratios of
    `rejected`, which are answers to other prompts, at least 0.
    """
    answer, _ = log_ratios(pairs, dpo)
    sign = xp.sign(weights)
    margins = dpo.beta * sign * (answer - baseline)
    losses = weights * sign * xp.exp(log_sigmoid(-margins, xp))
    kl = xp.zeros_like(answer) + baseline
    return losses, dict(zip(KTO_METRICS, (kl, _is_positive(margins, xp)), strict=True))


def _is_positive(x: Any, xp: Any) -> Any:
    """Return 1 where x > 0, else 0, in the dtype of x."""
    return xp.where(x > 0, xp.ones_like(x), xp.zeros_like(x))


def log_sigmoid(x: Any, xp: Any) -> Any:
    """Return log(1 / (1 + exp(-x))), exact for large |x|, too."""
    return -xp.logaddexp(xp.zeros_like(x), -x)


def _sigmoid(chosen: Any, rejected: Any, dpo: DPOConfig, xp: Any) -> Any:
    """DPO (arXiv:2305.18290, equation 7), with label smoothing as in cDPO."""
    h, e = dpo.beta * (chosen - rejected), dpo.label_smoothing
    return -(1 - e) * log_sigmoid(h, xp) - e * log_sigmoid(-h, xp)


def _robust(chosen: Any, rejected: Any, dpo: DPOConfig, xp: Any) -> Any:
    """Robust DPO (arXiv:2403.00409): an unbiased estimate under flipped pairs."""
    h, e = dpo.beta * (chosen - rejected), dpo.label_smoothing
    return (-(1 - e) * log_sigmoid(h, xp) + e * log_sigmoid(-h, xp)) / (1 - 2 * e)


def _ipo(chosen: Any, rejected: Any, dpo: DPOConfig, xp: Any) -> Any:
    """IPO (arXiv:2310.12036, equation 17)."""
    return (chosen - rejected - 1 / (2 * dpo.beta)) ** 2


def _apo_zero(chosen: Any, rejected: Any, dpo: DPOConfig, xp: Any) -> Any:
    """APO-zero (arXiv:2408.06266): 1 - sigmoid of chosen + sigmoid of rejected."""
    down, up = log_sigmoid(-dpo.beta * chosen, xp), log_sigmoid(dpo.beta * rejected, xp)
    return xp.exp(down) + xp.exp(up)


def _simpo(chosen: Any, rejected: Any, dpo: DPOConfig, xp: Any) -> Any:
    """SimPO (arXiv:2405.14734, equation 6)."""
    h, e = dpo.beta * (chosen - rejected) - dpo.gamma, dpo.label_smoothing
    return -(1 - e) * log_sigmoid(h, xp) - e * log_sigmoid(-h, xp)


def _orpo(chosen: Any, rejected: Any, dpo: DPOConfig, xp: Any) -> Any:
    """ORPO (arXiv:2403.07691, equation 6): cross entropy of chosen, and the log odds ratio."""
    log_odds = (chosen - _log1mexp(chosen, xp)) - (rejected - _log1mexp(rejected, xp))
    return -chosen - dpo.beta * log_sigmoid(log_odds, xp)


def _log1mexp(x: Any, xp: Any) -> Any:
    """Return log(1 - exp(x)) for x < 0."""
    return xp.log(-xp.expm1(x))


LOSSES = {
    "sigmoid": _sigmoid,
    "robust": _robust,
    "ipo": _ipo,
    "apo_zero": _apo_zero,
    "simpo": _simpo,
    "orpo": _orpo,
}
"""`dpo.loss` -> the function of the log-ratios (or, without a reference, log-probabilities)."""
