"""Decode tokens with the JAX model: prefill, then one step per token, greedy or sampled.

Mirror: mooshak_torch/decode.py. Shapes: B rows, T time, D model width, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from mooshak.config.generate import GenerateConfig
from mooshak.generation.adjustments import RowAdjustments, stack_adjustments
from mooshak.generation.log_probs import TokenLogProbs
from mooshak.generation.parameters import SamplingParameters
from mooshak.generation.text import pad_prompts
from mooshak.numerics.sampling_noise import noise
from mooshak_jax.kv_cache import KVCache
from mooshak_jax.model import make_caches
from mooshak_jax.params import merge
from mooshak_jax.sampling import log_probs, returned_scores, sample


def generate(
    graphdef: nnx.GraphDef,
    params: Any,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> np.ndarray:
    """Continue each prompt of token ids by `new_tokens`; return int32 [prompts, new_tokens].

    Row b uses the noise of sample number b. Raises the errors of `generate_tokens`.
    """
    settings = GenerateConfig(
        max_new_tokens=new_tokens, temperature=temperature, top_p=top_p, seed=seed
    )
    steps = generate_tokens(graphdef, params, prompts, range(len(prompts)), settings)
    return np.stack([token_B for token_B, _ in steps], axis=1).astype(np.int32)


def generate_tokens(
    graphdef: nnx.GraphDef,
    params: Any,
    prompts: Sequence[Sequence[int]],
    samples: Sequence[int],
    settings: GenerateConfig,
    adjusters: Sequence[RowAdjustments] = (),
) -> Iterator[tuple[np.ndarray, TokenLogProbs | None]]:
    """Yield the next token of each row, int64 [B], and its log-probabilities, if asked for.

    `max_new_tokens` tokens follow each prompt, at its own position. Temperature 0 is greedy;
    otherwise row b uses the noise of sample number samples[b]. `adjusters`, one for each row or
    none, change the logits first. Sampling is in float64: iterate with `jax_enable_x64` on. Raises
    `InputError` for an empty prompt or a text that exceeds the model's positions.
    """
    new_tokens, model = settings.max_new_tokens, merge(graphdef, params)
    parameters = SamplingParameters.of([settings] * len(prompts))
    tokens_BT, lengths_B = pad_prompts(prompts, new_tokens, model.config)
    uniform_BT = np.stack([noise(settings.seed, sample, new_tokens) for sample in samples])
    caches = make_caches(model, len(prompts), tokens_BT.shape[1] + new_tokens)
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    last_B = jnp.asarray(lengths_B) - 1
    logits_BV, caches = _step(
        graphdef, params, jnp.asarray(tokens_BT), positions_BT, last_B, caches
    )
    caches = [layer_cache.truncate(lengths_B) for layer_cache in caches]  # Drop the padding.
    positions_B, last_B = last_B, jnp.zeros_like(last_B)
    processed_B = np.full(len(prompts), settings.processed_logprobs)
    for t in range(new_tokens):
        adjustments = stack_adjustments(adjusters) if adjusters else None
        token_B = sample(logits_BV, jnp.asarray(uniform_BT[:, t]), parameters, adjustments)
        found: list[Array] = []
        if settings.logprobs:
            scores_BV = returned_scores(logits_BV, parameters, adjustments, processed_B)
            found = log_probs(scores_BV, token_B, top=bool(settings.top_logprobs))
        # An accelerator computes the next step while the host waits for this token and decodes it.
        if t + 1 < new_tokens:
            positions_B = positions_B + 1
            token_B1, positions_B1 = token_B[:, None], positions_B[:, None]
            logits_BV, caches = _step(graphdef, params, token_B1, positions_B1, last_B, caches)
        tokens_B = np.asarray(token_B)
        for adjuster, token in zip(adjusters, tokens_B, strict=bool(adjusters)):
            adjuster.push(int(token))
        yield tokens_B, TokenLogProbs(*map(np.asarray, found)) if found else None


@partial(jax.jit, static_argnums=0, donate_argnums=5)
def _step(
    graphdef: nnx.GraphDef,
    params: Any,
    tokens_BT: Array,
    positions_BT: Array,
    last_B: Array,
    caches: list[KVCache],
) -> tuple[Array, list[KVCache]]:
    """Return the logits [B, V] after the token at index `last_B`, and the updated caches."""
    model = merge(graphdef, params)
    hidden_BTD = model.hidden_states(tokens_BT, positions_BT, caches)
    last_B1D = jnp.take_along_axis(hidden_BTD, last_B[:, None, None], axis=1)
    return model.logits(last_B1D)[:, 0], caches
