"""Decode tokens with the PyTorch model: prefill, then one step per token, greedy or sampled.

Mirror: mooshak_jax/decode.py. Shapes: B rows, T time, D model width, V vocabulary.
"""

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
    """Continue each prompt of token ids by `new_tokens`; return int32 [prompts, new_tokens].

    Row b uses the noise of sample number b. Raises the errors of `generate_tokens`.
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

    Prompts of different lengths are each continued at their own position. Temperature 0 is greedy;
    otherwise row b uses the noise of sample number samples[b]. Without `logprobs` the second array
    is NaN. `compiled` uses torch.compile for the decode step. FSDP modules must be unsharded, since
    their hooks do not run. Raises `InputError` for an empty prompt, a text that exceeds the model's
    positions, or a missing compiler.
    """
    step = _compiled_step() if compiled else _step
    tokens_BT, lengths_B = pad_prompts(prompts, new_tokens, model.config)
    uniform_BT = np.stack([noise(seed, sample, new_tokens) for sample in samples])
    device = model.embeddings.weight.device
    caches = make_caches(model, len(prompts), tokens_BT.shape[1] + new_tokens)
    positions_B = torch.from_numpy(lengths_B).to(device) - 1
    rows_B = torch.arange(len(prompts), device=device)
    # Only the last position of each prompt is passed to the output head.
    hidden_BTD = model.hidden_states(torch.from_numpy(tokens_BT).to(device).long(), caches=caches)
    logits_BV = model.logits(hidden_BTD[rows_B, positions_B].unsqueeze(1))[:, 0]
    for layer_cache in caches:
        layer_cache.truncate(lengths_B.tolist())  # Drop the padding.
    decoder = model
    if not compiled:  # Inductor knows no packed weights.
        matrices = (m.weight for m in model.modules() if isinstance(m, Linear))
        decoder = pack_weights_for_decode(model, matrices, len(prompts), new_tokens)
    unknown_B = torch.full((len(prompts),), torch.nan, dtype=torch.float64)
    for t in range(new_tokens):
        uniform_B = torch.from_numpy(uniform_BT[:, t]).to(device)
        token_B = sample(logits_BV, uniform_B, temperature, top_p)
        log_prob_B = token_log_prob(logits_BV, token_B) if logprobs else unknown_B
        # An accelerator computes the next step while the host waits for this token and decodes it.
        if t + 1 < new_tokens:
            positions_B = positions_B + 1
            logits_BV = step(decoder, token_B, positions_B, caches)
        yield token_B.cpu().numpy(), log_prob_B.cpu().numpy()


def _step(model: Model, token_B: Tensor, positions_B: Tensor, caches: list[KVCache]) -> Tensor:
    """Return the logits [B, V] after one more token in each row."""
    logits_B1V: Tensor = model(token_B.unsqueeze(1), positions_B.unsqueeze(1), caches)
    return logits_B1V[:, 0]


@cache
def _compiled_step() -> Callable[..., Tensor]:
    require_compiler("--compile")
    # The full model in one graph, on a CPU with a C++ wrapper: reading all weights for each token
    # evicts the interpreter's code from the caches.
    options: dict[str, Any] = {} if torch.cuda.is_available() else {"cpp_wrapper": True}
    return torch.compile(_step, options=options)


def sample(logits_BV: Tensor, uniform_B: Tensor, temperature: float, top_p: float) -> Tensor:
    """Return the next token of each row, [B]: the argmax, or nucleus sampling by inverse CDF.

    `uniform_B` are numbers in [0, 1). Computed in float64 for every dtype of the model: otherwise
    rounding could move a uniform number across the boundary between two tokens.
    """
    if temperature == 0.0:
        return logits_BV.argmax(-1)
    p_BV = torch.softmax(logits_BV.double() / temperature, dim=-1)
    sorted_BV, order_BV = torch.sort(p_BV, dim=-1, descending=True, stable=True)
    sums_BV = sorted_BV.cumsum(-1)
    # Nucleus (arXiv:1904.09751): the fewest tokens whose probabilities sum to top_p.
    nucleus_B = torch.sum(sums_BV < top_p, -1).clamp(max=sums_BV.shape[1] - 1)
    mass_B1 = sums_BV.gather(1, nucleus_B.unsqueeze(1))
    rank_B = torch.sum(sums_BV <= uniform_B.unsqueeze(1) * mass_B1, -1).minimum(nucleus_B)
    return order_BV.gather(1, rank_B.unsqueeze(1)).squeeze(1)


def token_log_prob(logits_BV: Tensor, token_B: Tensor) -> Tensor:
    """Return log p(token) in each row, float64 [B]."""
    log_p_BV = torch.log_softmax(logits_BV.double(), dim=-1)
    return log_p_BV.gather(1, token_B.unsqueeze(1)).squeeze(1)
