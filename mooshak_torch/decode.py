"""Decode tokens with the PyTorch model: prefill, then one step a token, greedy or sampled."""

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mooshak.generation.text import pad_prompts
from mooshak.numerics.sampling_noise import noise
from mooshak_torch.distributed.compile import require_compiler
from mooshak_torch.kv_cache import KVCache
from mooshak_torch.model import Linear, Model, make_caches
from mooshak_torch.ops.matmul import pack_weights_for_decode


def generate(
    model: Model,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    compiled: bool = False,
) -> np.ndarray:
    """Continue prompts of token ids by `new_tokens` each; return int32 [prompts, new_tokens].

    Row b is sampled with the noise of sample number b. Errors are those of `generate_tokens`.
    """
    samples = range(len(prompts))
    steps = generate_tokens(
        model, prompts, samples, new_tokens, temperature, top_p, seed, compiled=compiled
    )
    return np.stack([token_B for token_B, _ in steps], axis=1).astype(np.int32)


@torch.no_grad()
def generate_tokens(
    model: Model,
    prompts: Sequence[Sequence[int]],
    samples: Sequence[int],
    new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    logprobs: bool = False,
    compiled: bool = False,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the next token of each row, int64 [B], and its log-probability, float64 [B].

    The prompts are token ids, each continued at its own position. Temperature 0 is greedy; else row
    b has the noise of sample number samples[b]. Without `logprobs` the second array is NaN.
    `compiled` tokens come faster, after torch.compile has had its time. Raises `InputError` when a
    prompt is empty or the text would outgrow the model's positions, or where there is nothing to
    compile with.
    """
    step = _compiled_step() if compiled else _step
    tokens_BT, lengths_B = pad_prompts(prompts, new_tokens, model.config)
    uniform_BT = np.stack([noise(seed, sample, new_tokens) for sample in samples])
    device = model.embeddings.weight.device
    caches = make_caches(model, len(prompts), tokens_BT.shape[1] + new_tokens)
    positions_B = torch.from_numpy(lengths_B).to(device) - 1
    rows_B = torch.arange(len(prompts), device=device)
    # Of the prompts only the last positions go through the output head.
    hidden_BTD = model.hidden_states(torch.from_numpy(tokens_BT).to(device).long(), caches=caches)
    logits_BV = model.logits(hidden_BTD[rows_B, positions_B].unsqueeze(1))[:, 0]
    matrices = (m.weight for m in model.modules() if isinstance(m, Linear))
    decoder = pack_weights_for_decode(model, matrices, len(prompts), new_tokens)
    unknown_B = np.full(len(prompts), np.nan)
    for t in range(new_tokens):
        uniform_B = torch.from_numpy(uniform_BT[:, t]).to(device)
        token_B = sample(logits_BV, uniform_B, temperature, top_p)
        yield token_B.cpu().numpy(), token_log_prob(logits_BV, token_B) if logprobs else unknown_B
        if t + 1 == new_tokens:
            break
        positions_B = positions_B + 1
        logits_BV = step(decoder, token_B, positions_B, caches)


def _step(model: Model, token_B: Tensor, positions_B: Tensor, caches: list[KVCache]) -> Tensor:
    """Logits [B, V] of what follows one more token each."""
    logits_B1V: Tensor = model(token_B.unsqueeze(1), positions_B.unsqueeze(1), caches)
    return logits_B1V[:, 0]


@cache
def _compiled_step() -> Callable[..., Tensor]:
    require_compiler("--compile")
    # The whole model at once, and on a CPU called from C++: a processor that reads all weights for
    # every token has forgotten the interpreter's code by the next operation.
    options: dict[str, Any] = {} if torch.cuda.is_available() else {"cpp_wrapper": True}
    return torch.compile(_step, options=options)


def sample(logits_BV: Tensor, uniform_B: Tensor, temperature: float, top_p: float) -> Tensor:
    """Next tokens: the largest logit, or the inverse CDF over the sorted probabilities.

    Computed in float64, whatever the model's dtype: a uniform number between two close sums would
    fall on different sides otherwise.
    """
    if temperature == 0.0:
        return logits_BV.argmax(-1)
    p_BV = torch.softmax(logits_BV.double() / temperature, dim=-1)
    sorted_BV, order_BV = torch.sort(p_BV, dim=-1, descending=True, stable=True)
    sums_BV = sorted_BV.cumsum(-1)
    # The nucleus (arXiv:1904.09751): the fewest tokens that reach top_p.
    nucleus_B = torch.sum(sums_BV < top_p, -1).clamp(max=sums_BV.shape[1] - 1)
    mass_B1 = sums_BV.gather(1, nucleus_B.unsqueeze(1))
    rank_B = torch.sum(sums_BV <= uniform_B.unsqueeze(1) * mass_B1, -1).minimum(nucleus_B)
    return order_BV.gather(1, rank_B.unsqueeze(1)).squeeze(1)


def token_log_prob(logits_BV: Tensor, token_B: Tensor) -> np.ndarray:
    """Return log p of each row's token, float64 [B]."""
    log_p_BV = torch.log_softmax(logits_BV.double(), dim=-1)
    return log_p_BV.gather(1, token_B.unsqueeze(1)).squeeze(1).cpu().numpy()
