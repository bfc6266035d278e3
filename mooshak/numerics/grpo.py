"""Formulas of GRPO and its relatives: one text for torch, JAX and NumPy.

`xp` is the module of the arrays: `torch`, `jax.numpy` or `numpy`. Log-probabilities are in nats, of
the full softmax at the sampling temperature: top_k and top_p choose samples, but are not in the
ratio. Shapes: P prompts, G samples of a prompt, N samples; others any, one place per token.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from mooshak.config.grpo import GRPOConfig

METRICS = ("entropy", "clip_ratio/low_mean", "clip_ratio/high_mean")
"""Means over the tokens of a step that are logged, under TRL's names."""

KL = "kl"
"""The same, if `grpo.beta` is not 0."""

STD_EPSILON = 1e-4
"""Added to the standard deviation that divides advantages, as in TRL."""


def metric_names(grpo: GRPOConfig) -> tuple[str, ...]:
    """Return the names of the metrics of the objective."""
    return (*METRICS, KL) if grpo.beta else METRICS


def group_advantages(rewards_PG: np.ndarray, grpo: GRPOConfig) -> np.ndarray:
    """Return reward - mean of the group, scaled as `grpo.scale_rewards` says, float64 [P, G].

    The standard deviation is that of a sample (n - 1). Equal rewards have exactly the advantage 0.
    """
    equal_P1 = np.ptp(rewards_PG, axis=1, keepdims=True) == 0
    centred_PG = np.where(equal_P1, 0.0, rewards_PG - rewards_PG.mean(axis=1, keepdims=True))
    if grpo.scale_rewards == "none":
        return centred_PG
    axis = 1 if grpo.scale_rewards == "group" else None
    result: np.ndarray = centred_PG / (rewards_PG.std(axis, ddof=1, keepdims=True) + STD_EPSILON)
    return result


def token_weights(lengths: Sequence[int], grpo: GRPOConfig) -> np.ndarray:
    """Return the weight of each token of samples of these lengths, float64 [N].

    The loss of a step is the sum of weight x token loss, divided by the number of tokens.
    """
    lengths_N = np.array(lengths, np.float64)
    if grpo.loss_type == "dapo":
        return np.ones(len(lengths_N))
    longest_N = lengths_N if grpo.loss_type == "grpo" else float(grpo.max_completion_length)
    result: np.ndarray = lengths_N.mean() / (longest_N * np.ones(len(lengths_N)))
    return result


class Tokens(NamedTuple):
    """Sampled tokens under the model and its predecessors; arrays of one shape."""

    log_probs: Any
    """log p(token) under the model."""
    old_log_probs: Any
    """The same under the model that sampled it, a constant."""
    reference_log_probs: Any
    """The same under the reference, a constant; not used without `grpo.beta`."""
    advantages: Any
    """That of the token's sample."""


def token_losses(
    tokens: Tokens, grpo: GRPOConfig, xp: Any, sequence_mean: Callable[[Any], Any]
) -> tuple[Any, dict[str, Any]]:
    """Return the loss of each token, and the metrics of each token by name (`metric_names`).

    It is -min(r A, clip(r) A) + beta KL with the ratio r = p / p_old of the token or, with
    `importance_sampling_level` sequence, of its sample. `sequence_mean` replaces the value of each
    token by the mean over the tokens of its sample.
    """
    log_ratios = tokens.log_probs - tokens.old_log_probs
    token_ratios = xp.exp(log_ratios)
    is_of_tokens = grpo.importance_sampling_level == "token"
    ratios = token_ratios if is_of_tokens else xp.exp(sequence_mean(log_ratios))
    low, high = grpo.clip_bounds
    A, one, zero = tokens.advantages, xp.ones_like(ratios), xp.zeros_like(ratios)
    losses = -xp.minimum(ratios * A, xp.clip(ratios, low, high) * A)
    metrics = {
        "entropy": -tokens.log_probs,
        "clip_ratio/low_mean": xp.where((ratios < low) & (A < 0), one, zero),
        "clip_ratio/high_mean": xp.where((ratios > high) & (A > 0), one, zero),
    }
    if grpo.beta:
        metrics[KL] = token_ratios * kl_estimates(tokens, xp)
        losses = losses + grpo.beta * metrics[KL]
    return losses, metrics


def kl_estimates(tokens: Tokens, xp: Any) -> Any:
    """Return p_ref / p - log(p_ref / p) - 1 of each token (k3).

    Its mean over tokens drawn from p is the KL divergence KL(p || p_ref) of the next token, but the
    mean of its gradient is that of KL(p_ref || p). Times the ratio p / p_old, with the gradient of
    both factors, value and gradient are those of KL(p || p_ref), also for tokens drawn from an
    earlier p_old: d(r k3) = r log(p / p_ref) d log p (arXiv:2512.02556; TRL:
    use_bias_correction_kl).
    """
    difference = tokens.reference_log_probs - tokens.log_probs
    return xp.expm1(difference) - difference
