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

from mooshak.generation.text import pad_prompts
from mooshak.numerics.sampling_noise import noise
from mooshak_jax.kv_cache import KVCache
from mooshak_jax.model import Model, make_caches
from mooshak_jax.params import merge


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
    samples = range(len(prompts))
    steps = generate_tokens(
        graphdef, params, prompts, samples, new_tokens, temperature, top_p, seed
    )
    return np.stack([token_B for token_B, _ in steps], axis=1).astype(np.int32)


def generate_tokens(
    graphdef: nnx.GraphDef,
    params: Any,
    prompts: Sequence[Sequence[int]],
    samples: Sequence[int],
    new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    logprobs: bool = False,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the next token of each row, int64 [B], and its log-probability, float64 [B].

    Prompts of different lengths are each continued at their own position. Temperature 0 is greedy;
    otherwise row b uses the noise of sample number samples[b]. Without `logprobs` the second array
    is NaN. Sampling is in float64: iterate with `jax_enable_x64` on. Raises `InputError` for an
    empty prompt or a text that exceeds the model's positions.
    """
    model: Model = merge(graphdef, params)
    tokens_BT, lengths_B = pad_prompts(prompts, new_tokens, model.config)
    uniform_BT = np.stack([noise(seed, sample, new_tokens) for sample in samples])
    caches = make_caches(model, len(prompts), tokens_BT.shape[1] + new_tokens)
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    last_B = jnp.asarray(lengths_B) - 1
    logits_BV, caches = _step(
        graphdef, params, jnp.asarray(tokens_BT), positions_BT, last_B, caches
    )
    caches = [layer_cache.truncate(lengths_B) for layer_cache in caches]  # Drop the padding.
    positions_B, last_B = last_B, jnp.zeros_like(last_B)
    unknown_B = np.full(len(prompts), np.nan)
    for t in range(new_tokens):
        token_B = sample(logits_BV, jnp.asarray(uniform_BT[:, t]), temperature, top_p)
        log_prob_B = token_log_prob(logits_BV, token_B) if logprobs else unknown_B
        # An accelerator computes the next step while the host waits for this token and decodes it.
        if t + 1 < new_tokens:
            positions_B = positions_B + 1
            token_B1, positions_B1 = token_B[:, None], positions_B[:, None]
            logits_BV, caches = _step(graphdef, params, token_B1, positions_B1, last_B, caches)
        yield np.asarray(token_B), np.asarray(log_prob_B)


@partial(jax.jit, static_argnames=("temperature", "top_p"))
def sample(logits_BV: Array, uniform_B: Array, temperature: float, top_p: float) -> Array:
    """Return the next token of each row, [B]: the argmax, or nucleus sampling by inverse CDF.

    `uniform_B` are numbers in [0, 1). Computed in float64 for every dtype of the model: otherwise
    rounding could move a uniform number across the boundary between two tokens.
    """
    if temperature == 0.0:
        return jnp.argmax(logits_BV, -1)
    p_BV = jax.nn.softmax(logits_BV.astype(jnp.float64) / temperature, axis=-1)
    order_BV = jnp.argsort(p_BV, axis=-1, descending=True, stable=True)
    sums_BV = jnp.cumsum(jnp.take_along_axis(p_BV, order_BV, axis=-1), axis=-1)
    # Nucleus (arXiv:1904.09751): the fewest tokens whose probabilities sum to top_p.
    nucleus_B = jnp.minimum(jnp.sum(sums_BV < top_p, -1), sums_BV.shape[1] - 1)
    mass_B1 = jnp.take_along_axis(sums_BV, nucleus_B[:, None], axis=1)
    rank_B = jnp.minimum(jnp.sum(sums_BV <= uniform_B[:, None] * mass_B1, -1), nucleus_B)
    return jnp.take_along_axis(order_BV, rank_B[:, None], axis=1)[:, 0]


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


@jax.jit
def token_log_prob(logits_BV: Array, token_B: Array) -> Array:
    """Return log p(token) in each row, float64 [B]."""
    log_p_BV = jax.nn.log_softmax(logits_BV.astype(jnp.float64), axis=-1)
    return jnp.take_along_axis(log_p_BV, token_B[:, None], axis=1)[:, 0]
