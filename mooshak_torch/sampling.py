"""Sampling of the next token: temperature, then filters in transformers' order, then a draw.

The order is top_k, top_p, min_p, typical_p, each on the distribution that the earlier ones leave.
Tokens of equal probability are kept or removed together. Settings are arrays, one number for each
row, so that rows of a batch may differ. Computed in float64 for every dtype of the model: otherwise
rounding could move a uniform number across the boundary between two tokens.

Mirror: mooshak_jax/sampling.py. Shapes: B rows, V vocabulary, C candidates, N most probable.
"""

import numpy as np
import torch
from torch import Tensor

from mooshak.config.generate import MAX_TOP
from mooshak.generation.adjustments import Adjustments
from mooshak.generation.parameters import SamplingParameters

CANDIDATES = 256
"""Most probable tokens that are sorted first; all tokens are sorted only if these do not decide."""


def sample(
    logits_BV: Tensor,
    uniform_B: Tensor,
    parameters: SamplingParameters,
    adjustments: Adjustments | None = None,
) -> Tensor:
    """Return the next token of each row, int64 [B]: the argmax at temperature 0, else a draw.

    `uniform_B` are numbers in [0, 1): the draw is the first token, by id, at which the sum of the
    probabilities of the kept tokens exceeds that share of their total.
    """
    logits_BV = adjust(logits_BV.double(), adjustments)
    greedy_B = logits_BV.argmax(-1)
    if parameters.is_greedy:
        return greedy_B
    scores_BV = filter_scores(logits_BV, parameters)
    weights_BV = torch.exp(scores_BV - scores_BV.amax(-1, keepdim=True))
    sums_BV = weights_BV.cumsum(-1)
    drawn_B = (sums_BV <= uniform_B.unsqueeze(1) * sums_BV[:, -1:]).sum(-1)
    # A share that rounds to the total: the last token that has a probability.
    last_B = (sums_BV < sums_BV[:, -1:]).sum(-1)
    temperature_B = _column(parameters.temperature_B, logits_BV)[:, 0]
    return torch.where(temperature_B == 0, greedy_B, drawn_B.minimum(last_B))


def adjust(logits_BV: Tensor, adjustments: Adjustments | None) -> Tensor:
    """Return float64 logits with their adjustments (mooshak/generation/adjustments.py)."""
    if adjustments is None:
        return logits_BV
    device = logits_BV.device
    bias_BV, penalty_BV, offset_BV = (torch.from_numpy(a).to(device) for a in adjustments)
    biased_BV = logits_BV + bias_BV
    penalised_BV = torch.where(biased_BV > 0, biased_BV / penalty_BV, biased_BV * penalty_BV)
    return penalised_BV + offset_BV


def filter_scores(logits_BV: Tensor, parameters: SamplingParameters) -> Tensor:
    """Return the logits divided by the temperature, minus infinity for tokens that are removed."""
    temperature_B1 = _column(parameters.temperature_B, logits_BV)
    scores_BV = logits_BV / torch.where(temperature_B1 == 0, 1.0, temperature_B1)
    if parameters.uses_order:
        scores_BV = _top_k_and_top_p(scores_BV, parameters)
    if parameters.uses_min_p:
        log_min_p_B1 = _column(parameters.min_p_B, scores_BV).log()
        lowest_B1 = scores_BV.amax(-1, keepdim=True) + log_min_p_B1
        scores_BV = scores_BV.masked_fill(scores_BV < lowest_B1, -torch.inf)
    if parameters.uses_typical_p:
        scores_BV = _typical(scores_BV, parameters)
    return scores_BV


def _top_k_and_top_p(scores_BV: Tensor, parameters: SamplingParameters) -> Tensor:
    top_k_B1 = _column(parameters.top_k_B, scores_BV).long()
    top_p_B1 = _column(parameters.top_p_B, scores_BV)
    n_tokens = scores_BV.shape[1]
    top_k_B1 = torch.where(top_k_B1 == 0, n_tokens, top_k_B1.clamp(max=n_tokens))
    log_z_B1 = scores_BV.logsumexp(-1, keepdim=True)

    def lowest_kept(sorted_BC: Tensor) -> tuple[Tensor, Tensor]:
        """Return the lowest score that is kept, and whether these candidates decide it."""
        n = sorted_BC.shape[1]
        kth_B1 = sorted_BC.gather(1, (top_k_B1 - 1).clamp(max=n - 1))
        by_k_B1 = torch.where(top_k_B1 <= n, kth_B1, -torch.inf)
        # top_p is a share of what top_k keeps, ties with the k-th token included.
        kept_BC = sorted_BC.masked_fill(sorted_BC < by_k_B1, -torch.inf)
        total_B1 = torch.where(top_k_B1 <= n, kept_BC.logsumexp(-1, keepdim=True), log_z_B1)
        sums_BC = (kept_BC - total_B1).exp().cumsum(-1)
        enough_BC = sums_BC >= top_p_B1
        rank_B1 = (~enough_BC).sum(-1, keepdim=True).clamp(max=n - 1)
        by_p_B1 = torch.where(top_p_B1 < 1, sorted_BC.gather(1, rank_B1), -torch.inf)
        # A tie with the last candidate, in float32, may continue beyond it.
        last_B1 = sorted_BC[:, -1:]
        k_decides_B1 = (top_k_B1 == n_tokens) | (
            (top_k_B1 <= n) & (kth_B1.float() > last_B1.float())
        )
        reached_B1 = enough_BC[:, -1:] & (by_p_B1.float() > last_B1.float())
        decided_B1 = k_decides_B1 & ((top_p_B1 >= 1) | reached_B1)
        return torch.maximum(by_k_B1, by_p_B1), decided_B1 | (last_B1 == -torch.inf)

    lowest_B1, decided_B1 = lowest_kept(_largest(scores_BV))
    if scores_BV.shape[1] > CANDIDATES and not decided_B1.all():
        lowest_B1, _ = lowest_kept(scores_BV.sort(-1, descending=True).values)
    return scores_BV.masked_fill(scores_BV < lowest_B1, -torch.inf)


def _typical(scores_BV: Tensor, parameters: SamplingParameters) -> Tensor:
    """Keep the tokens whose surprise is closest to the entropy (arXiv:2202.00666)."""
    mass_B1 = _column(parameters.typical_p_B, scores_BV)
    log_p_BV = scores_BV - scores_BV.logsumexp(-1, keepdim=True)
    p_BV = log_p_BV.exp()
    entropy_B1 = -torch.where(p_BV > 0, p_BV * log_p_BV, 0.0).sum(-1, keepdim=True)
    distance_BV = (-log_p_BV - entropy_B1).abs()
    distances_BV, order_BV = distance_BV.sort(dim=-1, stable=True)
    sums_BV = p_BV.gather(1, order_BV).cumsum(-1)
    rank_B1 = (sums_BV < mass_B1).sum(-1, keepdim=True).clamp(max=sums_BV.shape[1] - 1)
    farthest_B1 = torch.where(mass_B1 < 1, distances_BV.gather(1, rank_B1), torch.inf)
    return scores_BV.masked_fill(distance_BV > farthest_B1, -torch.inf)


def _largest(scores_BV: Tensor) -> Tensor:
    """Return the largest scores of each row, by their float32 values, in descending order [B, C].

    Any token whose float32 score is larger than the last one's is among them.
    """
    n = min(CANDIDATES, scores_BV.shape[1])
    order_BC = scores_BV.float().topk(n).indices
    return scores_BV.gather(1, order_BC).sort(-1, descending=True).values


def _column(values_B: object, like: Tensor) -> Tensor:
    """Return numbers of the rows as a column, float64 [B, 1], on the device of `like`."""
    return torch.as_tensor(values_B, dtype=torch.float64, device=like.device).unsqueeze(1)


def returned_scores(
    logits_BV: Tensor,
    parameters: SamplingParameters,
    adjustments: Adjustments | None,
    processed_B: np.ndarray,
) -> Tensor:
    """Return the logits of the log-probabilities that are returned: processed in some rows."""
    if not processed_B.any():
        return logits_BV
    scores_BV = filter_scores(adjust(logits_BV.double(), adjustments), parameters)
    processed_B1 = torch.from_numpy(processed_B).to(logits_BV.device).unsqueeze(1)
    return torch.where(processed_B1, scores_BV, logits_BV.double())


def log_probs(logits_BV: Tensor, token_B: Tensor, top: bool) -> list[Tensor]:
    """Return the fields of `TokenLogProbs`, on the device; without `top` only the tokens' own."""
    return [token_log_prob(logits_BV, token_B), *(most_probable(logits_BV) if top else ())]


def token_log_prob(logits_BV: Tensor, token_B: Tensor) -> Tensor:
    """Return log p(token) in each row, float64 [B]."""
    log_p_BV = torch.log_softmax(logits_BV.double(), dim=-1)
    return log_p_BV.gather(1, token_B.unsqueeze(1)).squeeze(1)


def most_probable(logits_BV: Tensor) -> tuple[Tensor, Tensor]:
    """Return the ids and log-probabilities of the most probable tokens, [B, N] each.

    In descending order, equal ones by id; N is `MAX_TOP`, or V if that is less.
    """
    log_p_BV = torch.log_softmax(logits_BV.double(), dim=-1)
    n = min(CANDIDATES, log_p_BV.shape[1])
    by_id_BC = log_p_BV.float().topk(n).indices.sort(-1).values
    values_BC = log_p_BV.gather(1, by_id_BC)
    order_BN = values_BC.sort(dim=-1, descending=True, stable=True).indices[:, :MAX_TOP]
    return by_id_BC.gather(1, order_BN), values_BC.gather(1, order_BN)
