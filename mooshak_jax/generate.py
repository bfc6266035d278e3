"""Generate text with the JAX model.

python -m mooshak_jax.generate RUN/checkpoints/600 --prompt "एक समय की बात है"
"""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from mooshak.config.model import ModelConfig
from mooshak.errors import command
from mooshak.generation.text import add_options, generate_text, pad_prompts
from mooshak.numerics.sampling_noise import noise
from mooshak_jax.checkpoint import load_model
from mooshak_jax.model import KVCache, Model, make_caches
from mooshak_jax.params import make_graphdef, merge
from mooshak_jax.step import cache_compilations


def generate(
    graphdef: nnx.GraphDef,
    params: Any,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> np.ndarray:
    """Continue prompts of token ids, each at its own position; returns int32 [prompts, new_tokens].

    Temperature 0 is greedy. Raises `InputError` when a prompt is empty or the text would outgrow
    the model's positions. Sampling is in float64: call it with `jax_enable_x64`.
    """
    model: Model = merge(graphdef, params)
    tokens_BT, lengths_B = pad_prompts(prompts, new_tokens, model.config)
    uniform_BT = np.stack([noise(seed, b, new_tokens) for b in range(len(prompts))])
    caches = make_caches(model, len(prompts), tokens_BT.shape[1] + new_tokens)
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    last_B = jnp.asarray(lengths_B) - 1
    logits_BV, caches = _step(
        graphdef, params, jnp.asarray(tokens_BT), positions_BT, last_B, caches
    )
    positions_B, last_B = last_B, jnp.zeros_like(last_B)
    out = []
    for t in range(new_tokens):
        token_B = sample(logits_BV, jnp.asarray(uniform_BT[:, t]), temperature, top_p)
        out.append(token_B)
        if t + 1 == new_tokens:
            break
        positions_B = positions_B + 1
        token_B1, positions_B1 = token_B[:, None], positions_B[:, None]
        logits_BV, caches = _step(graphdef, params, token_B1, positions_B1, last_B, caches)
    return np.asarray(jnp.stack(out, axis=1)).astype(np.int32)


@partial(jax.jit, static_argnames=("temperature", "top_p"))
def sample(logits_BV: Array, uniform_B: Array, temperature: float, top_p: float) -> Array:
    """Next tokens: the largest logit, or the inverse CDF over the sorted probabilities.

    Computed in float64, whatever the model's dtype: a uniform number between two close sums would
    fall on different sides otherwise.
    """
    if temperature == 0.0:
        return jnp.argmax(logits_BV, -1)
    p_BV = jax.nn.softmax(logits_BV.astype(jnp.float64) / temperature, axis=-1)
    order_BV = jnp.argsort(p_BV, axis=-1, descending=True, stable=True)
    sums_BV = jnp.cumsum(jnp.take_along_axis(p_BV, order_BV, axis=-1), axis=-1)
    # The nucleus (arXiv:1904.09751): the fewest tokens that reach top_p.
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
    """Logits of the token at index `last_B` of each row, and the caches with all tokens in them."""
    model = merge(graphdef, params)
    hidden_BTD = model.hidden_states(tokens_BT, positions_BT, caches)
    last_B1D = jnp.take_along_axis(hidden_BTD, last_B[:, None, None], axis=1)
    return model.logits(last_B1D)[:, 0], caches


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_options(parser)
    args = parser.parse_args()
    cache_compilations()
    jax.config.update("jax_enable_x64", True)
    model: ModelConfig
    model, params = load_model(Path(args.checkpoint), args.dtype)
    graphdef = make_graphdef(model, args.dtype)
    generate_text(args, model, lambda *sampling: generate(graphdef, params, *sampling))


if __name__ == "__main__":
    main()
