"""A JAX model with the KV caches of a batch, for beam search and speculative decoding.

Mirror: mooshak_torch/cached_model.py. The interface: mooshak/generation/cached_model.py. Scores are
in float64: every call turns x64 on for itself. Calls of equal shapes compile one program.
Shapes: B rows, T time, N tokens of a call, M of them with logits, D model width, V vocabulary,
P prompts, W beams of each prompt, X = W x V, C candidates.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from mooshak.config.generate import GenerateConfig
from mooshak.generation.adjustments import Adjustments
from mooshak.generation.cached_model import Candidates
from mooshak.generation.log_probs import TokenLogProbs
from mooshak.generation.parameters import SamplingParameters
from mooshak.generation.text import pad_prompts
from mooshak_jax.kv_cache import KVCache
from mooshak_jax.model import make_caches
from mooshak_jax.params import merge
from mooshak_jax.sampling import adjust, most_probable, returned_scores, sample, token_log_prob

SPARE = 32
"""Candidates beyond those that are asked for; all are sorted only if these do not decide."""


class CachedModel:
    """A model and its KV caches, on one device or a mesh."""

    logits_BMV: Array
    """Logits of the latest call."""

    def __init__(
        self,
        graphdef: nnx.GraphDef,
        params: Any,
        prompts: Sequence[Sequence[int]],
        new_tokens: int,
        n_beams: int = 1,
    ):
        """Compute the logits after each prompt; `n_beams` rows continue it.

        Raises `InputError` for an empty prompt, or a text that exceeds the model's positions.
        """
        model = merge(graphdef, params)
        tokens_BT, lengths_B = pad_prompts(prompts, new_tokens, model.config)
        self.graphdef, self.params = graphdef, params
        with jax.enable_x64():
            self.caches = make_caches(model, len(prompts), tokens_BT.shape[1] + new_tokens)
        positions_BT = np.broadcast_to(np.arange(tokens_BT.shape[1]), tokens_BT.shape)
        self._extend(tokens_BT, positions_BT, lengths_B[:, None] - 1)
        self.truncate(lengths_B.tolist())  # Drop the padding.
        if n_beams > 1:
            self.select(np.repeat(np.arange(len(prompts)), n_beams).tolist())
            with jax.enable_x64():
                self.logits_BMV = jnp.repeat(self.logits_BMV, n_beams, 0)

    def extend(self, tokens_BN: np.ndarray, positions_BN: np.ndarray, n_logits: int) -> None:
        n = tokens_BN.shape[1]
        index_BM = np.broadcast_to(np.arange(n - n_logits, n), (len(tokens_BN), n_logits))
        self._extend(tokens_BN, positions_BN, index_BM)

    def _extend(
        self, tokens_BN: np.ndarray, positions_BN: np.ndarray, index_BM: np.ndarray
    ) -> None:
        tokens, positions, index = (a.astype(np.int32) for a in (tokens_BN, positions_BN, index_BM))
        with jax.enable_x64():
            self.logits_BMV, self.caches = _forward(
                self.graphdef, self.params, tokens, positions, index, self.caches
            )

    def propose(
        self, tokens_BN: np.ndarray, positions_BN: np.ndarray, last_B: np.ndarray, n: int
    ) -> np.ndarray:
        # In one program: a call costs more than a small model.
        arrays = (a.astype(np.int32) for a in (tokens_BN, positions_BN, last_B))
        with jax.enable_x64():
            drawn_BM, self.caches = _propose(self.graphdef, self.params, *arrays, self.caches, n)
            return np.asarray(drawn_BM)

    def select(self, rows: Sequence[int]) -> None:
        with jax.enable_x64():
            self.caches = _select(self.caches, np.asarray(rows, np.int32))

    def truncate(self, lengths: Sequence[int]) -> None:
        with jax.enable_x64():
            self.caches = _truncate(self.caches, np.asarray(lengths, np.int32))

    def sample(
        self,
        uniform_BM: np.ndarray,
        settings: GenerateConfig,
        adjustments: Adjustments | None = None,
    ) -> np.ndarray:
        parameters = SamplingParameters.of([settings] * uniform_BM.size)
        with jax.enable_x64():
            logits = self.logits_BMV.reshape(uniform_BM.size, -1)
            token = sample(logits, jnp.asarray(uniform_BM.ravel()), parameters, adjustments)
            return np.asarray(token).reshape(uniform_BM.shape)

    def log_probs(
        self,
        tokens_BM: np.ndarray,
        settings: GenerateConfig,
        adjustments: Adjustments | None = None,
    ) -> TokenLogProbs:
        parameters = SamplingParameters.of([settings] * tokens_BM.size)
        processed = np.full(tokens_BM.size, settings.processed_logprobs)
        with jax.enable_x64():
            logits = self.logits_BMV.reshape(tokens_BM.size, -1)
            scores = returned_scores(logits, parameters, adjustments, processed)
            found = [token_log_prob(scores, jnp.asarray(tokens_BM.ravel()))]
            found += most_probable(scores) if settings.top_logprobs else ()
            return TokenLogProbs(*map(np.asarray, found))

    def best(
        self, score_B: np.ndarray, n_beams: int, n: int, adjustments: Adjustments | None = None
    ) -> Candidates:
        with jax.enable_x64():
            found = _best(self.logits_BMV, jnp.asarray(score_B), adjustments, n_beams, n)
            index_PC, score_PC, log_prob_PC = map(np.asarray, found)
        beam_PC, token_PC = np.divmod(index_PC, self.logits_BMV.shape[2])
        return Candidates(beam_PC, token_PC, score_PC, log_prob_PC)


@partial(jax.jit, static_argnums=0, donate_argnums=5)
def _forward(
    graphdef: nnx.GraphDef,
    params: Any,
    tokens_BN: Array,
    positions_BN: Array,
    index_BM: Array,
    caches: list[KVCache],
) -> tuple[Array, list[KVCache]]:
    """Return the logits [B, M, V] of the tokens with these indices, and the updated caches."""
    model = merge(graphdef, params)
    hidden_BND = model.hidden_states(tokens_BN, positions_BN, caches)
    return model.logits(jnp.take_along_axis(hidden_BND, index_BM[..., None], axis=1)), caches


@partial(jax.jit, static_argnums=(0, 6), donate_argnums=5)
def _propose(
    graphdef: nnx.GraphDef,
    params: Any,
    tokens_BN: Array,
    positions_BN: Array,
    last_B: Array,
    caches: list[KVCache],
    n: int,
) -> tuple[Array, list[KVCache]]:
    """Return the next `n` greedy tokens of each row, [B, M], and the updated caches."""
    index_B1 = jnp.full((len(tokens_BN), 1), tokens_BN.shape[1] - 1)
    logits_B1V, caches = _forward(graphdef, params, tokens_BN, positions_BN, index_B1, caches)

    def read(carry: tuple[Array, Array, list[KVCache]], _: None) -> tuple[Any, Array]:
        token_B1, position_B1, caches = carry
        position_B1 = jnp.minimum(position_B1 + 1, last_B[:, None])
        logits_B1V, caches = _forward(
            graphdef, params, token_B1, position_B1, jnp.zeros_like(position_B1), caches
        )
        token_B1 = jnp.argmax(logits_B1V, -1)
        return (token_B1, position_B1, caches), token_B1[:, 0]

    token_B1 = jnp.argmax(logits_B1V, -1)
    first = (token_B1, positions_BN[:, -1:], caches)
    (_, _, caches), drawn_MB = jax.lax.scan(read, first, length=n - 1)
    return jnp.concatenate([token_B1, drawn_MB.T], axis=1), caches


@jax.jit
def _select(caches: list[KVCache], rows_B: Array) -> list[KVCache]:
    return [cache.select(rows_B) for cache in caches]


@partial(jax.jit, donate_argnums=0)
def _truncate(caches: list[KVCache], lengths_B: Array) -> list[KVCache]:
    return [cache.truncate(lengths_B) for cache in caches]


@partial(jax.jit, static_argnums=(3, 4))
def _best(
    logits_BMV: Array, score_B: Array, adjustments: Adjustments | None, n_beams: int, n: int
) -> tuple[Array, Array, Array]:
    """Return the indices of the best continuations, their scores and log-probabilities [P, C]."""
    log_p_BV = jax.nn.log_softmax(logits_BMV[:, -1].astype(jnp.float64), axis=-1)
    n_prompts = len(score_B) // n_beams
    score_PX = (score_B[:, None] + adjust(log_p_BV, adjustments)).reshape(n_prompts, -1)
    index_PC = _largest(score_PX, min(n, score_PX.shape[1]))
    found = (score_PX, log_p_BV.reshape(n_prompts, -1))
    score_PC, log_prob_PC = (jnp.take_along_axis(values, index_PC, 1) for values in found)
    return index_PC, score_PC, log_prob_PC


def _largest(score_PX: Array, n: int) -> Array:
    """Return the indices of the n largest numbers of each row, in order, int64 [P, C].

    Equal ones are in the order of their indices. They are found by their float32 values: any number
    whose float32 value is larger than that of the last candidate is among the candidates.
    """
    n_all = score_PX.shape[1]
    index_PC: Any = jax.lax.top_k(score_PX.astype(jnp.float32), min(n + SPARE, n_all))[1]
    index_PC = index_PC.astype(jnp.int64)
    found_PC = -jnp.take_along_axis(score_PX, index_PC, 1)
    found_PC, index_PC = jax.lax.sort((found_PC, index_PC), num_keys=2)
    if index_PC.shape[1] == n_all:
        return index_PC[:, :n]
    nth_P, last_P = -found_PC[:, n - 1], -found_PC[:, -1]
    decided_P = nth_P.astype(jnp.float32) > last_P.astype(jnp.float32)
    return jax.lax.cond(
        (decided_P | (last_P == -jnp.inf)).all(),
        lambda: index_PC[:, :n],
        lambda: jnp.argsort(-score_PX, axis=-1, stable=True)[:, :n],
    )
