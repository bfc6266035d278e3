"""Sampling of the next token: temperature, then filters in transformers' order, then a draw.

The order is top_k, top_p, min_p, typical_p, each on the distribution that the earlier ones leave.
Tokens of equal probability are kept or removed together. Settings are arrays, one number for each
row, so that rows of a batch may differ, and other numbers compile nothing. Computed in float64 for
every dtype of the model, with `jax_enable_x64` on: otherwise rounding could move a uniform number
across the boundary between two tokens.

Mirror: mooshak_torch/sampling.py. Shapes: B rows, V vocabulary, C candidates, N most probable.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mooshak.config.generate import MAX_TOP
from mooshak.generation.adjustments import Adjustments
from mooshak.generation.parameters import SamplingParameters

CANDIDATES = 256
"""Most probable tokens that are sorted first; all tokens are sorted only if these do not decide."""


def sample(
    logits_BV: Array,
    uniform_B: Array | np.ndarray,
    parameters: SamplingParameters,
    adjustments: Adjustments | None = None,
) -> Array:
    """Return the next token of each row, int64 [B]: the argmax at temperature 0, else a draw.

    `uniform_B` are numbers in [0, 1): the draw is the first token, by id, at which the sum of the
    probabilities of the kept tokens exceeds that share of their total.
    """
    if parameters.is_greedy:
        return _argmax(logits_BV, adjustments)
    logits_BV = adjust(logits_BV.astype(jnp.float64), adjustments)
    scores_BV = filter_scores(logits_BV, parameters)
    return _draw(logits_BV, scores_BV, uniform_B, parameters.temperature_B)


@jax.jit
def _argmax(logits_BV: Array, adjustments: Adjustments | None) -> Array:
    return jnp.argmax(adjust(logits_BV.astype(jnp.float64), adjustments), -1)


@jax.jit
def _draw(logits_BV: Array, scores_BV: Array, uniform_B: Array, temperature_B: Array) -> Array:
    weights_BV = jnp.exp(scores_BV - scores_BV.max(-1, keepdims=True))
    sums_BV = jnp.cumsum(weights_BV, -1)
    drawn_B = (sums_BV <= uniform_B[:, None] * sums_BV[:, -1:]).sum(-1)
    # A share that rounds to the total: the last token that has a probability.
    last_B = (sums_BV < sums_BV[:, -1:]).sum(-1)
    greedy_B = jnp.argmax(logits_BV, -1)
    return jnp.where(temperature_B == 0, greedy_B, jnp.minimum(drawn_B, last_B))


@jax.jit
def adjust(logits_BV: Array, adjustments: Adjustments | None) -> Array:
    """Return float64 logits with their adjustments (mooshak/generation/adjustments.py)."""
    if adjustments is None:
        return logits_BV
    biased_BV = logits_BV + adjustments.bias_BV
    penalty_BV = adjustments.penalty_BV
    penalised_BV = jnp.where(biased_BV > 0, biased_BV / penalty_BV, biased_BV * penalty_BV)
    return penalised_BV + adjustments.offset_BV


def filter_scores(logits_BV: Array, parameters: SamplingParameters) -> Array:
    """Return the logits divided by the temperature, minus infinity for tokens that are removed.

    Every step is a program of its own: scores are compared with a sorted copy of them, and XLA may
    compute them again, with other rounding, where a program does not read them from memory.
    """
    scores_BV = _divide(logits_BV, parameters.temperature_B)
    if parameters.uses_order:
        scores_BV = _top_k_and_top_p(scores_BV, parameters.top_k_B, parameters.top_p_B)
    if parameters.uses_min_p:
        scores_BV = _min_p(scores_BV, parameters.min_p_B)
    if parameters.uses_typical_p:
        scores_BV = _typical(scores_BV, parameters.typical_p_B)
    return scores_BV


@jax.jit
def _divide(logits_BV: Array, temperature_B: Array) -> Array:
    temperature_B1 = _column(temperature_B)
    return logits_BV / jnp.where(temperature_B1 == 0, 1.0, temperature_B1)


@jax.jit
def _min_p(scores_BV: Array, min_p_B: Array) -> Array:
    lowest_B1 = scores_BV.max(-1, keepdims=True) + jnp.log(_column(min_p_B))
    return jnp.where(scores_BV < lowest_B1, -jnp.inf, scores_BV)


@jax.jit
def _top_k_and_top_p(scores_BV: Array, top_k_B: Array, top_p_B: Array) -> Array:
    n_tokens = scores_BV.shape[1]
    top_k_B1, top_p_B1 = jnp.asarray(top_k_B)[:, None], _column(top_p_B)
    top_k_B1 = jnp.where(top_k_B1 == 0, n_tokens, jnp.minimum(top_k_B1, n_tokens))
    log_z_B1 = _log_sum_exp(scores_BV)

    def lowest_kept(sorted_BC: Array) -> tuple[Array, Array]:
        """Return the lowest score that is kept, and whether these candidates decide it."""
        n = sorted_BC.shape[1]
        kth_B1 = jnp.take_along_axis(sorted_BC, jnp.minimum(top_k_B1 - 1, n - 1), 1)
        by_k_B1 = jnp.where(top_k_B1 <= n, kth_B1, -jnp.inf)
        # top_p is a share of what top_k keeps, ties with the k-th token included.
        kept_BC = jnp.where(sorted_BC < by_k_B1, -jnp.inf, sorted_BC)
        total_B1 = jnp.where(top_k_B1 <= n, _log_sum_exp(kept_BC), log_z_B1)
        sums_BC = jnp.cumsum(jnp.exp(kept_BC - total_B1), -1)
        enough_BC = sums_BC >= top_p_B1
        rank_B1 = jnp.minimum((~enough_BC).sum(-1, keepdims=True), n - 1)
        by_p_B1 = jnp.where(top_p_B1 < 1, jnp.take_along_axis(sorted_BC, rank_B1, 1), -jnp.inf)
        # A tie with the last candidate, in float32, may continue beyond it.
        last_B1 = sorted_BC[:, -1:]
        k_decides_B1 = (top_k_B1 == n_tokens) | (
            (top_k_B1 <= n) & (_narrow(kth_B1) > _narrow(last_B1))
        )
        reached_B1 = enough_BC[:, -1:] & (_narrow(by_p_B1) > _narrow(last_B1))
        decided_B1 = k_decides_B1 & ((top_p_B1 >= 1) | reached_B1)
        return jnp.maximum(by_k_B1, by_p_B1), decided_B1 | (last_B1 == -jnp.inf)

    lowest_B1, decided_B1 = lowest_kept(_largest(scores_BV))
    if n_tokens > CANDIDATES:
        lowest_B1 = jax.lax.cond(
            decided_B1.all(),
            lambda: lowest_B1,
            lambda: lowest_kept(-jnp.sort(-scores_BV, -1))[0],
        )
    return jnp.where(scores_BV < lowest_B1, -jnp.inf, scores_BV)


@jax.jit
def _typical(scores_BV: Array, typical_p_B: Array) -> Array:
    """Keep the tokens whose surprise is closest to the entropy (arXiv:2202.00666)."""
    mass_B1 = _column(typical_p_B)
    log_p_BV = scores_BV - _log_sum_exp(scores_BV)
    p_BV = jnp.exp(log_p_BV)
    entropy_B1 = -jnp.where(p_BV > 0, p_BV * log_p_BV, 0.0).sum(-1, keepdims=True)
    distance_BV = jnp.abs(-log_p_BV - entropy_B1)
    index_BV = jnp.broadcast_to(jnp.arange(scores_BV.shape[1]), scores_BV.shape)
    # Only what the sort returns is compared (see `filter_scores`): ranks, and sorted distances.
    distances_BV, order_BV = jax.lax.sort((distance_BV, index_BV), num_keys=1, is_stable=True)
    rank_BV: Array = jax.lax.sort((order_BV, index_BV), num_keys=1)[1]
    sums_BV = jnp.cumsum(jnp.take_along_axis(p_BV, order_BV, 1), -1)
    rank_B1 = jnp.minimum((sums_BV < mass_B1).sum(-1, keepdims=True), sums_BV.shape[1] - 1)
    farthest_B1 = jnp.take_along_axis(distances_BV, rank_B1, 1)
    n_kept_B1 = (distances_BV <= farthest_B1).sum(-1, keepdims=True)
    return jnp.where((rank_BV >= n_kept_B1) & (mass_B1 < 1), -jnp.inf, scores_BV)


def _largest(scores_BV: Array) -> Array:
    """Return the largest scores of each row, by their float32 values, in descending order [B, C].

    Any token whose float32 score is larger than the last one's is among them. XLA has a fast top-k
    for float32 only.
    """
    n = min(CANDIDATES, scores_BV.shape[1])
    order_BC: Any = jax.lax.top_k(_narrow(scores_BV), n)[1]
    return -jnp.sort(-jnp.take_along_axis(scores_BV, order_BC, 1), -1)


def _narrow(scores: Array) -> Array:
    return scores.astype(jnp.float32)


def _log_sum_exp(scores: Array) -> Array:
    return jax.nn.logsumexp(scores, axis=-1, keepdims=True)


def _column(values_B: Array) -> Array:
    """Return numbers of the rows as a column, float64 [B, 1]."""
    return jnp.asarray(values_B, jnp.float64)[:, None]


def returned_scores(
    logits_BV: Array,
    parameters: SamplingParameters,
    adjustments: Adjustments | None,
    processed_B: np.ndarray,
) -> Array:
    """Return the logits of the log-probabilities that are returned: processed in some rows."""
    if not processed_B.any():
        return logits_BV
    scores_BV = filter_scores(adjust(logits_BV.astype(jnp.float64), adjustments), parameters)
    return _choose_rows(processed_B, scores_BV, logits_BV)


@jax.jit
def _choose_rows(chosen_B: Array, scores_BV: Array, logits_BV: Array) -> Array:
    return jnp.where(chosen_B[:, None], scores_BV, logits_BV.astype(jnp.float64))


def log_probs(logits_BV: Array, token_B: Array | np.ndarray, top: bool) -> list[Array]:
    """Return the fields of `TokenLogProbs`, on the device; without `top` only the tokens' own."""
    return [token_log_prob(logits_BV, token_B), *(most_probable(logits_BV) if top else ())]


@jax.jit
def token_log_prob(logits_BV: Array, token_B: Array) -> Array:
    """Return log p(token) in each row, float64 [B]."""
    log_p_BV = jax.nn.log_softmax(logits_BV.astype(jnp.float64), axis=-1)
    return jnp.take_along_axis(log_p_BV, token_B[:, None], axis=1)[:, 0]


@jax.jit
def most_probable(logits_BV: Array) -> tuple[Array, Array]:
    """Return the ids and log-probabilities of the most probable tokens, [B, N] each.

    In descending order, equal ones by id; N is `MAX_TOP`, or V if that is less.
    """
    log_p_BV = jax.nn.log_softmax(logits_BV.astype(jnp.float64), axis=-1)
    n = min(CANDIDATES, log_p_BV.shape[1])
    candidates_BC: Any = jax.lax.top_k(_narrow(log_p_BV), n)[1]
    by_id_BC = jnp.sort(candidates_BC, -1)
    negative_BC = -jnp.take_along_axis(log_p_BV, by_id_BC, 1)
    negative_BN, top_BN = (
        a_BC[:, :MAX_TOP]
        for a_BC in jax.lax.sort((negative_BC, by_id_BC), num_keys=1, is_stable=True)
    )
    return top_BN, -negative_BN
