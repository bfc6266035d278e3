"""Decode tokens with the PyTorch model: prefill, then one step per token, greedy or sampled.

Mirror: mooshak_jax/decode.py. Shapes: B rows, T time, D model width, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mooshak.config.generate import GenerateConfig
from mooshak.generation.adjustments import RowAdjustments, stack_adjustments
from mooshak.generation.log_probs import TokenLogProbs
from mooshak.generation.parameters import SamplingParameters
from mooshak.generation.text import pad_prompts
from mooshak.numerics.sampling_noise import noise
from mooshak_torch.distributed.compile import require_compiler
from mooshak_torch.kv_cache import KVCache
from mooshak_torch.model import Linear, Model, make_caches
from mooshak_torch.ops.matmul import pack_weights_for_decode
from mooshak_torch.sampling import log_probs, returned_scores, sample


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
    settings = GenerateConfig(
        max_new_tokens=new_tokens, temperature=temperature, top_p=top_p, seed=seed
    )
    steps = generate_tokens(model, prompts, range(len(prompts)), settings, compiled=compiled)
    return np.stack([token_B for token_B, _ in steps], axis=1).astype(np.int32)


def generate_tokens(
    model: Model,
    prompts: Sequence[Sequence[int]],
    samples: Sequence[int],
    settings: GenerateConfig,
    adjusters: Sequence[RowAdjustments] = (),
    compiled: bool = False,
) -> Iterator[tuple[np.ndarray, TokenLogProbs | None]]:
    """Yield the next token of each row, int64 [B], and its log-probabilities, if asked for.

    `max_new_tokens` tokens follow each prompt, at its own position. Temperature 0 is greedy;
    otherwise row b uses the noise of sample number samples[b]. `adjusters`, one for each row or
    none, change the logits first. `compiled` uses torch.compile for the decode step. FSDP modules
    must be unsharded, since their hooks do not run. Raises `InputError` for an empty prompt, a text
    that exceeds the model's positions, or a missing compiler.
    """
    new_tokens, step = settings.max_new_tokens, _compiled_step() if compiled else _step
    parameters = SamplingParameters.of([settings] * len(prompts))
    tokens_BT, lengths_B = pad_prompts(prompts, new_tokens, model.config)
    uniform_BT = np.stack([noise(settings.seed, sample, new_tokens) for sample in samples])
    device = model.embeddings.weight.device
    caches = make_caches(model, len(prompts), tokens_BT.shape[1] + new_tokens)
    positions_B = torch.from_numpy(lengths_B).to(device) - 1
    rows_B = torch.arange(len(prompts), device=device)
    with torch.no_grad():
        # Only the last position of each prompt is passed to the output head.
        tokens = torch.from_numpy(tokens_BT).to(device).long()
        hidden_BTD = model.hidden_states(tokens, caches=caches)
        logits_BV = model.logits(hidden_BTD[rows_B, positions_B].unsqueeze(1))[:, 0]
    for layer_cache in caches:
        layer_cache.truncate(lengths_B.tolist())  # Drop the padding.
    decoder = model
    if not compiled:  # Inductor knows no packed weights.
        matrices = (m.weight for m in model.modules() if isinstance(m, Linear))
        decoder = pack_weights_for_decode(model, matrices, len(prompts), new_tokens)
    processed_B = np.full(len(prompts), settings.processed_logprobs)
    for t in range(new_tokens):
        uniform_B = torch.from_numpy(uniform_BT[:, t]).to(device)
        adjustments = stack_adjustments(adjusters) if adjusters else None
        found: list[Tensor] = []
        with torch.no_grad():  # Not across `yield`: the caller's mode is unchanged.
            token_B = sample(logits_BV, uniform_B, parameters, adjustments)
            if settings.logprobs:
                scores_BV = returned_scores(logits_BV, parameters, adjustments, processed_B)
                found = log_probs(scores_BV, token_B, top=bool(settings.top_logprobs))
            # An accelerator computes the next step while the host waits for this token.
            if t + 1 < new_tokens:
                positions_B = positions_B + 1
                logits_BV = step(decoder, token_B, positions_B, caches)
        tokens_B = token_B.cpu().numpy()
        for adjuster, token in zip(adjusters, tokens_B, strict=bool(adjusters)):
            adjuster.push(int(token))
        yield tokens_B, TokenLogProbs(*(a.cpu().numpy() for a in found)) if found else None


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
