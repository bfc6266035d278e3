"""Patches of the model: operations, attention, documents, KV caches, sampling.

Each function returns the replacements in one framework, or one of them.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F

import mooshak_jax.model
import mooshak_torch.model
from mooshak.generation import speculative
from mooshak.numerics import rope

Patch = tuple[Any, str, Any]
"""An object, the name of its attribute, and the attribute's replacement."""

tm, jm = mooshak_torch.model, mooshak_jax.model


def rotate_pairs_torch(self: tm.Rope, x: torch.Tensor, positions: tm.Positions) -> torch.Tensor:
    half = x.shape[-1] // 2
    cos, sin = positions.cos_BT1K[..., half:], positions.sin_BT1K[..., half:]
    a, b = x.to(cos.dtype)[..., 0::2], x.to(cos.dtype)[..., 1::2]
    return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2).to(x.dtype)


def rotate_pairs_jax(self: jm.Rope, x: jax.Array, positions: jm.Positions) -> jax.Array:
    cos, sin = positions.cos_BT1k, positions.sin_BT1k
    a, b = x.astype(cos.dtype)[..., 0::2], x.astype(cos.dtype)[..., 1::2]
    return jnp.stack((a * cos - b * sin, b * cos + a * sin), -1).reshape(x.shape).astype(x.dtype)


def rope_theta(module: Any) -> list[Patch]:
    tables = rope.rope_tables
    return [
        (module, "rope_tables", lambda m: tables(replace(m, rope_theta=1.01 * m.rope_theta))),
    ]


def norm_eps(kind: Any) -> list[Patch]:
    original = kind.__init__

    def init(self: Any, dim: int, eps: float, dtype: Any) -> None:
        original(self, dim, 1e-6, dtype)

    return [(kind, "__init__", init)]


def norm_torch(axis: int = -1, offset: float = 0.0) -> list[Patch]:
    def forward(self: tm.RMSNorm, x: torch.Tensor) -> torch.Tensor:
        wide = x.to(self.weight.dtype)
        scale = torch.rsqrt(wide.square().mean(axis, keepdim=True) + self.eps)
        return (wide * scale * (self.weight + offset)).to(x.dtype)

    return [(tm.RMSNorm, "forward", forward)]


def norm_jax(axis: int = -1, offset: float = 0.0) -> list[Patch]:
    def call(self: jm.RMSNorm, x: jax.Array) -> jax.Array:
        wide = x.astype(self.scale.dtype)
        scale = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis, keepdims=True) + self.eps)
        return (wide * scale * (self.scale[...] + offset)).astype(x.dtype)

    return [(jm.RMSNorm, "__call__", call)]


def changed_block(kind: Any, call: str, norm_after: bool, residual: bool) -> list[Patch]:
    def block(self: Any, x: Any, rope: Any, positions: Any, cache: Any = None) -> Any:
        attention = self.attention(x, rope, positions, cache)
        attention, *rest = attention if isinstance(attention, tuple) else (attention,)
        h = x + attention if residual else attention
        mlp = self.mlp_norm(self.mlp(h)) if norm_after else self.mlp(self.mlp_norm(h))
        out = self.output_norm(h + mlp)
        return (out, *rest) if rest else out

    return [(kind, call, block)]


def norm_after_attention(kind: Any, call: str) -> list[Patch]:
    """Normalize the attention's output instead of its input, in a Llama block."""

    def block(self: Any, x: Any, rope: Any, positions: Any, cache: Any = None) -> Any:
        attention = self.attention(x, rope, positions, cache)
        attention, *rest = attention if isinstance(attention, tuple) else (attention,)
        h = x + self.attention_norm(attention)
        out = h + self.mlp(self.mlp_norm(h))
        return (out, *rest) if rest else out

    return [(kind, call, block)]


def wider_window(module: Any) -> list[Patch]:
    """Extend the sliding window by one position."""
    original = module.Attention.mask

    def mask(self: Any, queries: Any, n_keys: int) -> Any:
        before = queries - self.window
        further = before[..., None] == _positions_like(queries, n_keys)
        return original(self, queries, n_keys) | further

    return [(module.Attention, "mask", mask)]


def _positions_like(queries: Any, n: int) -> Any:
    return torch.arange(n) if isinstance(queries, torch.Tensor) else jnp.arange(n)


def unscaled_frequencies(module: Any) -> list[Patch]:
    tables = rope.rope_tables
    return [(module, "rope_tables", lambda m: tables(replace(m, rope_scaling=None)))]


def gelu_torch() -> list[Patch]:
    def forward(self: tm.MLP, x: torch.Tensor) -> torch.Tensor:
        return self.w2(F.gelu(self.w1(x), approximate="tanh") * self.w3(x))

    return [(tm.MLP, "forward", forward)]


def gelu_jax() -> list[Patch]:
    def call(self: jm.MLP, x: jax.Array) -> jax.Array:
        return self.w2(jax.nn.gelu(self.w1(x)) * self.w3(x))

    return [(jm.MLP, "__call__", call)]


def changed_attend(module: Any, change: Callable[..., Any]) -> list[Patch]:
    return [(module.Attention, "attend", staticmethod(change(module.Attention.attend)))]


def late_mask_torch(attend: Any) -> Any:
    def changed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any) -> torch.Tensor:
        if mask is None:
            mask = torch.ones(1, q.shape[1], k.shape[1], dtype=torch.bool).tril(1)
        return attend(q, k, v, mask)

    return changed


def late_mask_jax(attend: Any) -> Any:
    return lambda q, k, v, mask: attend(q, k, v, mask | jnp.roll(mask, 1, -1).at[..., 0].set(True))


def unscaled(attend: Any) -> Any:
    return lambda q, k, v, mask: attend(q * q.shape[-1] ** 0.5, k, v, mask)


def softmax32_torch(attend: Any) -> Any:
    def changed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any) -> torch.Tensor:
        return attend(q.float(), k.float(), v.float(), mask).to(q.dtype)

    return changed


def softmax32_jax(attend: Any) -> Any:
    def changed(q: jax.Array, k: jax.Array, v: jax.Array, mask: Any) -> jax.Array:
        return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None])

    return changed


def rounded_inputs(kind: Any, call: str, round_: Callable[[Any], Any]) -> list[Patch]:
    """Round the inputs of float32 matrix products."""
    original = getattr(kind, call)

    def coarse(self: Any, x: Any) -> Any:
        return original(self, round_(x))

    return [(kind, call, coarse)]


def round_torch(x: torch.Tensor) -> torch.Tensor:
    return x.bfloat16().to(x.dtype) if x.dtype == torch.float32 else x


def round_jax(x: jax.Array) -> jax.Array:
    # Not by a conversion to bfloat16 and back, which XLA may elide.
    if x.dtype != jnp.float32:
        return x
    return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)


def scaled_embedding(kind: Any, call: str) -> list[Patch]:
    original = getattr(kind, call)

    def scaled(self: Any, tokens: Any) -> Any:
        rows = original(self, tokens)
        return rows * rows.shape[-1] ** 0.5

    return [(kind, call, scaled)]


def late_cache_torch() -> list[Patch]:
    original = tm.KVCache.update

    def update(self: Any, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor) -> Any:
        cache = original(self, k, v, (positions + 1) % self.k_BSGK.shape[1])
        cache.lengths = positions[:, -1] + 1
        return cache

    return [(tm.KVCache, "update", update)]


def late_cache_jax() -> list[Patch]:
    original = jm.KVCache.update

    def update(self: Any, k: jax.Array, v: jax.Array, positions: jax.Array) -> Any:
        cache = original(self, k, v, (positions + 1) % self.k_BSGK.shape[1])
        return replace(cache, lengths=(positions[:, -1] + 1).astype(self.lengths.dtype))

    return [(jm.KVCache, "update", update)]


def untruncated(module: Any) -> list[Patch]:
    return [(module.KVCache, "truncate", lambda self, lengths: self)]


def rejected_seen(module: Any) -> list[Patch]:
    """Let queries see one slot of the cache beyond their own position."""
    original = module.causal_mask

    def mask(queries: Any, n_keys: int, window: int | None) -> Any:
        seen = original(queries, n_keys, window)
        cached = n_keys != queries.shape[1]
        return seen | original(queries + 1, n_keys, window) if cached else seen

    return [(module, "causal_mask", mask)]


def joined_documents(module: Any) -> list[Patch]:
    """Attend in packed rows as without segments."""
    original = module.document_attention

    def attend(q: Any, k: Any, v: Any, segments: Any, window: int | None = None) -> Any:
        return original(q, k, v, 0 * segments, window)

    return [(module, "document_attention", attend)]


def late_documents(module: Any) -> list[Patch]:
    """Count the first token of each document as one of the document before."""
    original = module.document_attention

    def attend(q: Any, k: Any, v: Any, segments: Any, window: int | None = None) -> Any:
        concatenate = torch.cat if isinstance(segments, torch.Tensor) else jnp.concatenate
        late = concatenate((segments[:, :1], segments[:, :-1]), 1)
        return original(q, k, v, late, window)

    return [(module, "document_attention", attend)]


def noise_of_the_next_sample(module: Any) -> list[Patch]:
    original = module.noise
    return [(module, "noise", lambda seed, sample, n: original(seed, sample + 1, n))]


def unverified() -> list[Patch]:
    """Accept every drafted token; both frameworks use the same function."""
    return [(speculative, "count_accepted", lambda drafted, drawn: len(drafted))]


def without_top_p(module: Any) -> list[Patch]:
    original = module.sample

    def sample(logits: Any, uniform: Any, parameters: Any, *rest: Any) -> Any:
        top_p_B = np.ones_like(parameters.top_p_B)
        return original(logits, uniform, replace(parameters, top_p_B=top_p_B), *rest)

    return [(module, "sample", sample)]
