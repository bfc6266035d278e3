"""Scaled dot-product attention: under a given mask, or within packed documents.

Mirror: mooshak_torch/ops/attention.py. Computed for one chunk of queries at a time, with custom
gradients: the softmax of `jax.nn.dot_product_attention` is float32 even in float64 runs, unlike
that of torch's `scaled_dot_product_attention`.
Shapes: B batch, T time, S time of the keys, H query heads, G key/value heads, K head width; t and s
the times of a chunk; Q the queries of a chunk in all heads that share a key head.
"""

import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from mooshak_jax.distributed.sharding import constrain
from mooshak_jax.ops.matmul import einsum

QUERY_CHUNK = (128, 512)
"""Minimum and maximum number of positions whose attention scores are in memory at once.

A long sequence is split into four chunks or more: then three eighths of all scores, which the
causal mask hides, are never computed.
"""


@jax.custom_vjp
def attention(
    q_BTHK: Array,
    k_BSGK: Array,
    v_BSGK: Array,
    mask_BTS: Array,
    first_BT: Array | None = None,
) -> Array:
    """Return softmax(q k^T / sqrt(K)) v, [B, T, H, K], under a boolean mask.

    With as many keys as queries (S = T) the mask must be causal; `first_BT` then restricts each
    query to the keys from that index on. The backward pass recomputes the scores
    (arXiv:2205.14135), transposed: nothing of their size is copied into another layout.
    """
    return _attention_forward(q_BTHK, k_BSGK, v_BSGK, mask_BTS, first_BT)[0]


def document_attention(
    q_BTHK: Array, k_BTGK: Array, v_BTGK: Array, segments_BT: Array, window: int | None = None
) -> Array:
    """Return causal attention within each document of packed rows, [B, T, H, K].

    A document is a run of equal integers in a row of `segments_BT`. A token attends to itself
    and to earlier tokens of its document, at most `window` tokens in total.
    """
    # First keys, not a mask [B, T, T], which would be in memory for every layer.
    index_T = jnp.arange(segments_BT.shape[1])
    causal_BTT = (index_T <= index_T[:, None])[None]
    first_BT = constrain(_first_keys(segments_BT, window), "batch", None)
    return attention(q_BTHK, k_BTGK, v_BTGK, causal_BTT, first_BT)


def block_attention(
    q_BTHK: Array, k_BSGK: Array, v_BSGK: Array, mask_BTS: Array, block: int, n_blocks: Array
) -> Array:
    """Return `attention` to the first `n_blocks` blocks of keys, [B, T, H, K]; no gradients.

    A loop over blocks of one size, each with the sums so far (arXiv:2112.05682): one program for
    any number of keys in use, and blocks that are masked for a row do not change its bits. A query
    without any key returns 0, as in SDPA.
    """
    scale, G = 1 / math.sqrt(q_BTHK.shape[-1]), k_BSGK.shape[2]
    q_BGQK = _heads_first(q_BTHK, G)
    mask_BQS = _repeat_for_heads(mask_BTS, q_BGQK)
    dtype = jnp.promote_types(q_BTHK.dtype, jnp.float32)

    def attend_to(i: Array, sums: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        out_BGQK, sum_BGQ1, max_BGQ1 = sums
        k_BsGK, v_BsGK, mask_BQs = (
            jax.lax.dynamic_slice_in_dim(a, i * block, block, axis)
            for a, axis in ((k_BSGK, 1), (v_BSGK, 1), (mask_BQS, 2))
        )
        scores_BGQs = einsum("BGQK,BSGK->BGQS", q_BGQK, k_BsGK) * scale
        scores_BGQs = jnp.where(mask_BQs[:, None], scores_BGQs, -jnp.inf)
        new_max_BGQ1 = jnp.maximum(max_BGQ1, scores_BGQs.max(-1, keepdims=True))
        # Of a window, the first blocks may have no key.
        finite_BGQ1 = jnp.where(jnp.isneginf(new_max_BGQ1), 0.0, new_max_BGQ1)
        weights_BGQs = jnp.exp(scores_BGQs - finite_BGQ1)
        decay_BGQ1 = jnp.exp(max_BGQ1 - finite_BGQ1)
        products_BGQK = einsum("BGQS,BSGK->BGQK", weights_BGQs.astype(v_BSGK.dtype), v_BsGK)
        sum_BGQ1 = sum_BGQ1 * decay_BGQ1 + weights_BGQs.sum(-1, keepdims=True)
        return out_BGQK * decay_BGQ1 + products_BGQK, sum_BGQ1, new_max_BGQ1

    zeros_BGQ1 = jnp.zeros((*q_BGQK.shape[:3], 1), dtype)
    start = (jnp.zeros(q_BGQK.shape, dtype), zeros_BGQ1, jnp.full_like(zeros_BGQ1, -jnp.inf))
    out_BGQK, sum_BGQ1, _ = jax.lax.fori_loop(0, n_blocks, attend_to, start)
    sum_BGQ1 = jnp.where(sum_BGQ1 == 0, 1.0, sum_BGQ1)
    return _heads_last((out_BGQK / sum_BGQ1).astype(v_BSGK.dtype), q_BTHK)


def _first_keys(segments_BT: Array, window: int | None) -> Array:
    """Return the index of the first key that each token sees, [B, T]."""
    index_T = jnp.arange(segments_BT.shape[1])
    starts_Bt = segments_BT[:, 1:] != segments_BT[:, :-1]
    firsts_Bt = jnp.where(starts_Bt, index_T[1:], 0)
    first_BT = jax.lax.cummax(jnp.pad(firsts_Bt, ((0, 0), (1, 0))), axis=1)
    return first_BT if window is None else jnp.maximum(first_BT, index_T - window + 1)


def _attention_forward(
    q_BTHK: Array, k_BSGK: Array, v_BSGK: Array, mask_BTS: Array, first_BT: Array | None
) -> tuple[Array, Any]:
    scale, G = 1 / math.sqrt(q_BTHK.shape[-1]), k_BSGK.shape[2]
    outs_BtHK, logs_BGQ = [], []
    for queries, keys in _query_chunks(*mask_BTS.shape[1:]):
        q_BGQK = _heads_first(q_BTHK[:, queries], G)
        k_BGsK, v_BGsK = (_heads_first(a_BSGK[:, keys], G) for a_BSGK in (k_BSGK, v_BSGK))
        mask_BQs = _repeat_for_heads(_chunk_mask(mask_BTS, first_BT, queries, keys), q_BGQK)
        scores_BGQs = einsum("BGQK,BGSK->BGQS", q_BGQK, k_BGsK) * scale
        scores_BGQs = jnp.where(mask_BQs[:, None], scores_BGQs, -jnp.inf)
        max_BGQ1 = scores_BGQs.max(-1, keepdims=True)
        weights_BGQs = jnp.exp(scores_BGQs - max_BGQ1)
        sum_BGQ1 = weights_BGQs.sum(-1, keepdims=True)
        out_BGQK = einsum("BGQS,BGSK->BGQK", weights_BGQs.astype(v_BSGK.dtype), v_BGsK) / sum_BGQ1
        outs_BtHK.append(_heads_last(out_BGQK.astype(v_BSGK.dtype), q_BTHK[:, queries]))
        logs_BGQ.append((max_BGQ1 + jnp.log(sum_BGQ1)).squeeze(-1))
    out_BTHK = jnp.concatenate(outs_BtHK, 1)
    return out_BTHK, (q_BTHK, k_BSGK, v_BSGK, mask_BTS, first_BT, out_BTHK, logs_BGQ)


def _attention_backward(residuals: Any, dout_BTHK: Array) -> tuple[Array | None, ...]:
    q_BTHK, k_BSGK, v_BSGK, mask_BTS, first_BT, out_BTHK, logs_BGQ = residuals
    scale, (_, S, G, _), dtype = 1 / math.sqrt(q_BTHK.shape[-1]), k_BSGK.shape, q_BTHK.dtype
    dqs_BtHK, dk_BSGK, dv_BSGK = [], jnp.zeros((), dtype), jnp.zeros((), dtype)
    chunks = _query_chunks(*mask_BTS.shape[1:])
    for (queries, keys), log_BGQ in zip(chunks, logs_BGQ, strict=True):
        # One chunk after the other; without the barrier XLA would save the forward pass's scores.
        q_BTHK, k_BSGK, v_BSGK, dk_BSGK, dv_BSGK = jax.lax.optimization_barrier(
            (q_BTHK, k_BSGK, v_BSGK, dk_BSGK, dv_BSGK)
        )
        q_BGQK, out_BGQK, dout_BGQK = (
            _heads_first(a_BTHK[:, queries], G) for a_BTHK in (q_BTHK, out_BTHK, dout_BTHK)
        )
        k_BGsK, v_BGsK = (_heads_first(a_BSGK[:, keys], G) for a_BSGK in (k_BSGK, v_BSGK))
        mask_Bts = _chunk_mask(mask_BTS, first_BT, queries, keys)
        mask_BsQ = _repeat_for_heads(mask_Bts, q_BGQK).swapaxes(1, 2)
        scores_BGsQ = einsum("BGSK,BGQK->BGSQ", k_BGsK, q_BGQK) * scale
        weights_BGsQ = jnp.where(mask_BsQ[:, None], jnp.exp(scores_BGsQ - log_BGQ[:, :, None]), 0)
        # Gradient of the softmax: each weight's gradient less the weighted mean of all.
        mean_BGQ = jnp.sum(out_BGQK.astype(log_BGQ.dtype) * dout_BGQK, -1)
        dweights_BGsQ = einsum("BGSK,BGQK->BGSQ", v_BGsK, dout_BGQK) - mean_BGQ[:, :, None]
        dscores_BGsQ = (weights_BGsQ * dweights_BGsQ).astype(dtype)
        dq_BGQK = einsum("BGSQ,BGSK->BGQK", dscores_BGsQ, k_BGsK) * scale
        dk_BGsK = einsum("BGSQ,BGQK->BGSK", dscores_BGsQ, q_BGQK) * scale
        dv_BGsK = einsum("BGSQ,BGQK->BGSK", weights_BGsQ.astype(dtype), dout_BGQK)
        dqs_BtHK.append(_heads_last(dq_BGQK, q_BTHK[:, queries]).astype(dtype))
        padding = ((0, 0), (0, S - dk_BGsK.shape[2]), (0, 0), (0, 0))
        dk_BSGK += jnp.pad(dk_BGsK.swapaxes(1, 2), padding)
        dv_BSGK += jnp.pad(dv_BGsK.swapaxes(1, 2), padding)
    return jnp.concatenate(dqs_BtHK, 1), dk_BSGK.astype(dtype), dv_BSGK.astype(dtype), None, None


attention.defvjp(_attention_forward, _attention_backward)


def _query_chunks(n_queries: int, n_keys: int) -> Iterator[tuple[slice, slice]]:
    """Yield chunks of the queries, each with the keys that it may see."""
    least, most = QUERY_CHUNK
    width = min(max(n_queries // 4, least), most) if n_queries == n_keys else n_queries
    for start in range(0, n_queries, width):
        end = min(start + width, n_queries)
        yield slice(start, end), slice(end if n_queries == n_keys else n_keys)


def _chunk_mask(mask_BTS: Array, first_BT: Array | None, queries: slice, keys: slice) -> Array:
    """Return the mask [B, t, s] of a chunk of the queries and of the keys."""
    mask_Bts = mask_BTS[:, queries, keys]
    if first_BT is None:
        return mask_Bts
    return mask_Bts & (jnp.arange(mask_BTS.shape[2])[keys] >= first_BT[:, queries, None])


def _heads_first(a_BTHK: Array, G: int) -> Array:
    """Return [B, G, Q, K]; Q has, for each head that shares a key head, all tokens."""
    B, T, H, K = a_BTHK.shape
    return a_BTHK.reshape(B, T, G, H // G, K).transpose(0, 2, 3, 1, 4).reshape(B, G, -1, K)


def _heads_last(a_BGQK: Array, like_BTHK: Array) -> Array:
    """Return [B, T, H, K]; undo `_heads_first`."""
    B, T, H, K = like_BTHK.shape
    G = a_BGQK.shape[1]
    return a_BGQK.reshape(B, G, H // G, T, K).transpose(0, 3, 1, 2, 4).reshape(B, T, H, K)


def _repeat_for_heads(mask_BTS: Array, q_BGQK: Array) -> Array:
    """Return [B, Q, S]: the tokens' mask, repeated for the heads that share a key head."""
    return jnp.tile(mask_BTS, (1, q_BGQK.shape[2] // mask_BTS.shape[1], 1))
