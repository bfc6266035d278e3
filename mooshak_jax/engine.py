"""Decode the slots of a fixed shape in JAX, for mooshak/serving/scheduler.py.

Mirror: mooshak_torch/engine.py. Sampling is in float64: every call turns x64 on for itself.
Shapes: B slots, C tokens of a chunk, S cache slots, D model width, V vocabulary, N most probable.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from mooshak.config.model import Dtype
from mooshak.generation.log_probs import TokenLogProbs
from mooshak.serving import engine
from mooshak.serving.engine import StepInputs
from mooshak_jax.distributed.sharding import constrain
from mooshak_jax.kv_cache import KVCache
from mooshak_jax.lm import LM
from mooshak_jax.model import PARAM_DTYPE, make_caches
from mooshak_jax.params import merge
from mooshak_jax.sampling import log_probs, returned_scores, sample


class Engine(engine.Engine):
    """A model in JAX with a KV cache of `n_slots` rows, on one device or a mesh."""

    def __init__(
        self,
        lm: LM,
        n_slots: int = 16,
        max_len: int | None = None,
        chunk: int = 128,
        kv_dtype: Dtype | None = None,
    ):
        """Allocate the cache, in `kv_dtype`: by default the compute dtype."""
        super().__init__(lm.config, n_slots, max_len, chunk)
        self.graphdef, self.params, self.parallel = lm.graphdef, lm.params, lm.parallel
        with self._activate():
            self.state = _empty(
                self.graphdef, self.params, n_slots, self.cache_len, kv_dtype or lm.dtype
            )

    def prefill(
        self,
        slot: int,
        tokens: Sequence[int],
        start: int,
        targets: Sequence[int] | None = None,
        top: bool = False,
    ) -> TokenLogProbs | None:
        last = len(tokens) - 1
        tokens_C, positions_C = self.pad_chunk(tokens, start)
        n_blocks = self._n_blocks(min(start + self.chunk, self.max_len))
        with self._activate():
            hidden_1CD, self.state = _prefill(
                self.graphdef,
                self.params,
                self.block,
                np.stack([tokens_C, positions_C]).astype(np.int32),
                np.array([slot, last, n_blocks], np.int32),
                self.state,
            )
            if targets is None:
                return None
            logits_CV = _chunk_logits(self.graphdef, self.params, hidden_1CD)
            found = log_probs(logits_CV, self.pad_chunk(targets, 0)[0], top)
            return TokenLogProbs(*(np.asarray(values)[: last + 1] for values in found))

    def copy_slot(self, source: int, target: int) -> None:
        with self._activate():
            self.state = _copy_slot(np.array([source, target], np.int32), self.state)

    def step(self, inputs: StepInputs) -> tuple[np.ndarray, TokenLogProbs | None]:
        with self._activate():
            settings, logits_BV = (inputs.parameters, inputs.adjustments), self.state.logits_BV
            token_B = sample(logits_BV, inputs.uniform_B, *settings)
            found: list[Array] = []
            if inputs.log_probs:
                scores_BV = returned_scores(logits_BV, *settings, inputs.processed_B)
                found = log_probs(scores_BV, token_B, inputs.top)
            # An accelerator computes the next step while the host waits for these tokens.
            if inputs.continues:
                position_B = inputs.position_B.astype(np.int32)
                n_blocks = np.int32(self._n_blocks(inputs.visible))
                self.state = _decode(
                    self.graphdef,
                    self.params,
                    self.block,
                    token_B,
                    position_B,
                    n_blocks,
                    self.state,
                )
            result = TokenLogProbs(*map(np.asarray, found)) if found else None
            return np.asarray(token_B), result

    def _n_blocks(self, n_tokens: int) -> int:
        """Return the number of cache blocks with these tokens."""
        return -(-n_tokens // self.block)

    @contextmanager
    def _activate(self) -> Iterator[None]:
        with self.parallel.activate(), jax.enable_x64():
            yield


class _State(NamedTuple):
    """Arrays that every call replaces: the KV cache and the logits."""

    kv: list[tuple[Array, Array]]
    """Keys and values of each layer, [B, S, G, K]."""
    logits_BV: Array
    """Logits of the next token."""

    def sharded(self) -> "_State":
        """Return the state with the shardings that every call expects."""
        kv = [(_by_heads(k_BSGK), _by_heads(v_BSGK)) for k_BSGK, v_BSGK in self.kv]
        return _State(kv, constrain(self.logits_BV, None, None))


def _by_heads(a_BSGK: Array) -> Array:
    return constrain(a_BSGK, None, None, "kv_heads", None)


@partial(jax.jit, static_argnums=(0, 2, 3, 4))
def _empty(
    graphdef: nnx.GraphDef, params: Any, n_slots: int, length: int, kv_dtype: Dtype
) -> _State:
    model = merge(graphdef, params)
    caches = make_caches(model, n_slots, length, kv_dtype)
    logits_BV = jnp.zeros((n_slots, model.config.vocab_size), PARAM_DTYPE[model.dtype])
    return _State([(cache.k_BSGK, cache.v_BSGK) for cache in caches], logits_BV).sharded()


@partial(jax.jit, static_argnums=(0, 2), donate_argnums=5)
def _prefill(
    graphdef: nnx.GraphDef,
    params: Any,
    block: int,
    tokens_2C: Array,
    numbers: Array,
    state: _State,
) -> tuple[Array, _State]:
    """Return the hidden states of a chunk and the state with its keys and values.

    `tokens_2C` are token ids and positions; `numbers` the slot, the index of the last token and
    the number of blocks.
    """
    model, (slot, last, n_blocks) = merge(graphdef, params), numbers
    tokens_1C, positions_1C = tokens_2C[:, None]
    rows = [jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, slot, 1), kv) for kv in state.kv]
    caches = [_cache(k_1SGK, v_1SGK, block, n_blocks) for k_1SGK, v_1SGK in rows]
    hidden_1CD = model.hidden_states(tokens_1C, positions_1C, caches)
    written_C = positions_1C[0]
    kv = [
        (
            k_BSGK.at[slot, written_C].set(cache.k_BSGK[0, written_C]),
            v_BSGK.at[slot, written_C].set(cache.v_BSGK[0, written_C]),
        )
        for (k_BSGK, v_BSGK), cache in zip(state.kv, caches, strict=True)
    ]
    last_11D = jax.lax.dynamic_slice_in_dim(hidden_1CD, last, 1, 1)
    logits_BV = state.logits_BV.at[slot].set(model.logits(last_11D)[0, 0])
    return constrain(hidden_1CD, None, None, None), _State(kv, logits_BV).sharded()


@partial(jax.jit, static_argnums=(0, 2), donate_argnums=6)
def _decode(
    graphdef: nnx.GraphDef,
    params: Any,
    block: int,
    token_B: Array,
    position_B: Array,
    n_blocks: Array,
    state: _State,
) -> _State:
    """Return the state after one more token in each slot."""
    model = merge(graphdef, params)
    caches = [_cache(k_BSGK, v_BSGK, block, n_blocks) for k_BSGK, v_BSGK in state.kv]
    logits_B1V = model(token_B[:, None], position_B[:, None], caches)
    kv = [(cache.k_BSGK, cache.v_BSGK) for cache in caches]
    return _State(kv, logits_B1V[:, 0]).sharded()


@partial(jax.jit, donate_argnums=1)
def _copy_slot(slots: Array, state: _State) -> _State:
    source, target = slots
    kv = [jax.tree.map(lambda a: a.at[target].set(a[source]), layer) for layer in state.kv]
    return _State(kv, state.logits_BV).sharded()


def _cache(k_BSGK: Array, v_BSGK: Array, block: int, n_blocks: Array) -> KVCache:
    lengths = jnp.zeros(len(k_BSGK), jnp.int32)
    return KVCache(k_BSGK, v_BSGK, lengths, True, block, n_blocks)


@partial(jax.jit, static_argnums=0)
def _chunk_logits(graphdef: nnx.GraphDef, params: Any, hidden_1CD: Array) -> Array:
    return constrain(merge(graphdef, params).logits(hidden_1CD)[0], None, None)
