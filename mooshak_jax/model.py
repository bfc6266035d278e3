"""The model in Flax NNX. Its mirror, class for class, is mooshak_torch/model.py.

Shapes stand in the names: B batch, T time, S time of the keys, D model width, H query heads,
G key/value heads, K head width, F MLP width, V vocabulary.

A model of float64 computes in float64 throughout. In bfloat16 the parameters stay float32, matrices
are multiplied in bfloat16, and norms, rotary angles, softmax and loss are computed in float32.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from mooshak.config import Dtype, ModelConfig
from mooshak.rope import rope_tables

COMPUTE = {"float64": jnp.float64, "float32": jnp.float32, "bfloat16": jnp.bfloat16}
PARAMETERS = {"float64": jnp.float64, "float32": jnp.float32, "bfloat16": jnp.float32}
# float32 means float32: a GPU would multiply in TF32 and a TPU in bfloat16 otherwise.
PRECISION = jax.lax.Precision.HIGHEST


class Linear(nnx.Module):
    """y = x W, in the dtype of x. Kernel [in, out]: the transpose of the canonical weight."""

    def __init__(self, n_in: int, n_out: int, dtype: jnp.dtype):
        self.kernel = nnx.Param(jnp.zeros((n_in, n_out), dtype))

    def __call__(self, x: Array) -> Array:
        return jnp.matmul(x, self.kernel[...].astype(x.dtype), precision=PRECISION)


class Embedding(nnx.Module):
    """The row of each token. Embedding [V, D]."""

    def __init__(self, n_tokens: int, dim: int, dtype: jnp.dtype):
        self.embedding = nnx.Param(jnp.zeros((n_tokens, dim), dtype))

    def __call__(self, tokens_BT: Array) -> Array:
        return self.embedding[...][tokens_BT]


class RMSNorm(nnx.Module):
    """x / rms(x) * gain (arXiv:1910.07467), in at least float32, cast once. Scale [D]."""

    def __init__(self, dim: int, eps: float, dtype: jnp.dtype):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((dim,), dtype))

    def __call__(self, x_BTD: Array) -> Array:
        wide_BTD = x_BTD.astype(self.scale.dtype)
        scale_BT1 = jax.lax.rsqrt(jnp.mean(jnp.square(wide_BTD), -1, keepdims=True) + self.eps)
        return (wide_BTD * scale_BT1 * self.scale[...]).astype(x_BTD.dtype)


class Rope(nnx.Module):
    """Rotary position embedding (arXiv:2104.09864), halves rotated, in at least float32."""

    def __init__(self, model: ModelConfig, dtype: jnp.dtype):
        # Static tables: constants of the compiled step, not state of the model.
        self.tables = _Tables(*(table.astype(dtype) for table in rope_tables(model)))

    def __call__(self, x_BTHK: Array, positions_BT: Array) -> Array:
        cos_BT1k = jnp.asarray(self.tables.cos)[positions_BT][:, :, None]
        sin_BT1k = jnp.asarray(self.tables.sin)[positions_BT][:, :, None]
        a_BTHk, b_BTHk = jnp.split(x_BTHK.astype(cos_BT1k.dtype), 2, axis=-1)
        rotated = (a_BTHk * cos_BT1k - b_BTHk * sin_BT1k, b_BTHk * cos_BT1k + a_BTHk * sin_BT1k)
        return jnp.concatenate(rotated, axis=-1).astype(x_BTHK.dtype)


class _Tables:
    """Numpy arrays that a graph definition can hold: equal and hashable by identity of contents."""

    def __init__(self, cos: np.ndarray, sin: np.ndarray):
        self.cos, self.sin = cos, sin
        self._key = (cos.dtype.str, cos.shape, cos.tobytes())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Tables) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)


KVCache = tuple[Array, Array]
"""Keys and values of one layer at every position, [B, S, G, K] each, zeros where none was yet."""


class Attention(nnx.Module):
    """Causal self-attention with rotary positions, heads concatenated, no output projection."""

    def __init__(self, model: ModelConfig, dtype: jnp.dtype):
        self.head_dim = model.K
        self.wq = Linear(model.dim, model.n_heads * model.K, dtype)
        self.wk = Linear(model.dim, model.G * model.K, dtype)
        self.wv = Linear(model.dim, model.G * model.K, dtype)

    def __call__(
        self, x_BTD: Array, rope: Rope, positions_BT: Array, cache: KVCache | None = None
    ) -> tuple[Array, KVCache | None]:
        B, T, _ = x_BTD.shape
        q_BTHK = rope(self.wq(x_BTD).reshape(B, T, -1, self.head_dim), positions_BT)
        k_BSGK = rope(self.wk(x_BTD).reshape(B, T, -1, self.head_dim), positions_BT)
        v_BSGK = self.wv(x_BTD).reshape(B, T, -1, self.head_dim)
        if cache is not None:
            rows_B1 = jnp.arange(B)[:, None]
            k_BSGK = cache[0].at[rows_B1, positions_BT].set(k_BSGK)
            v_BSGK = cache[1].at[rows_B1, positions_BT].set(v_BSGK)
            cache = (k_BSGK, v_BSGK)
        # A query sees the keys at its own position and before; what lies after is not written yet.
        keys_S = jnp.arange(k_BSGK.shape[1])
        queries_BT = positions_BT if cache is not None else jnp.arange(T)[None]
        mask_BTS = keys_S <= queries_BT[..., None]
        return self.attend(q_BTHK, k_BSGK, v_BSGK, mask_BTS).reshape(B, T, -1), cache

    @staticmethod
    def attend(q_BTHK: Array, k_BSGK: Array, v_BSGK: Array, mask_BTS: Array) -> Array:
        """softmax(q k^T / sqrt(K)) v under a mask. Returns [B, T, H, K].

        `jax.nn.dot_product_attention` is not used: its softmax is float32, in float64 runs too.
        """
        B, T, H, K = q_BTHK.shape
        q_BTGRK = q_BTHK.reshape(B, T, k_BSGK.shape[2], -1, K)
        wide = jnp.promote_types(q_BTHK.dtype, jnp.float32)
        scores_BGRTS = jnp.einsum(
            "BTGRK,BSGK->BGRTS",
            q_BTGRK,
            k_BSGK,
            precision=PRECISION,
            preferred_element_type=wide,
        ) * (1 / math.sqrt(K))
        scores_BGRTS = jnp.where(mask_BTS[:, None, None], scores_BGRTS, -jnp.inf)
        weights_BGRTS = jax.nn.softmax(scores_BGRTS, axis=-1).astype(v_BSGK.dtype)
        out_BTGRK = jnp.einsum("BGRTS,BSGK->BTGRK", weights_BGRTS, v_BSGK, precision=PRECISION)
        return out_BTGRK.reshape(B, T, H, K)


class MLP(nnx.Module):
    """SwiGLU (arXiv:2002.05202): W2 (silu(W1 x) * W3 x)."""

    def __init__(self, model: ModelConfig, dtype: jnp.dtype):
        self.w1 = Linear(model.dim, model.hidden_dim, dtype)
        self.w2 = Linear(model.hidden_dim, model.dim, dtype)
        self.w3 = Linear(model.dim, model.hidden_dim, dtype)

    def __call__(self, x_BTD: Array) -> Array:
        return self.w2(jax.nn.silu(self.w1(x_BTD)) * self.w3(x_BTD))


class Block(nnx.Module):
    """One layer: h = x + Attention(x); y = RMSNorm_out(h + MLP(RMSNorm_mlp(h)))."""

    def __init__(self, model: ModelConfig, dtype: jnp.dtype):
        self.attention = Attention(model, dtype)
        self.mlp_norm = RMSNorm(model.dim, model.norm_eps, dtype)
        self.mlp = MLP(model, dtype)
        self.output_norm = RMSNorm(model.dim, model.norm_eps, dtype)

    def __call__(
        self, x_BTD: Array, rope: Rope, positions_BT: Array, cache: KVCache | None = None
    ) -> tuple[Array, KVCache | None]:
        attention_BTD, cache = self.attention(x_BTD, rope, positions_BT, cache)
        h_BTD = x_BTD + attention_BTD
        return self.output_norm(h_BTD + self.mlp(self.mlp_norm(h_BTD))), cache


class Model(nnx.Module):
    """The language model. checkpoint.py has the table from its paths to the canonical names."""

    def __init__(self, model: ModelConfig, dtype: Dtype = "float32"):
        self.config, self.dtype = model, dtype
        parameters = PARAMETERS[dtype]
        self.embeddings = Embedding(model.vocab_size, model.dim, parameters)
        self.rope = Rope(model, parameters)
        self.layers = nnx.List([Block(model, parameters) for _ in range(model.n_layers)])
        self.lm_head = Linear(model.dim, model.vocab_size, parameters)

    def hidden(
        self,
        tokens_BT: Array,
        positions_BT: Array | None = None,
        caches: list[KVCache] | None = None,
        trace: list[Array] | None = None,
    ) -> Array:
        """Output of the last layer, [B, T, D]; `trace` collects the embedding and every layer.

        Arrays do not change in place: new keys and values replace those in the list `caches`.
        """
        if positions_BT is None:
            positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
        x_BTD = self.embeddings(tokens_BT).astype(COMPUTE[self.dtype])
        if trace is not None:
            trace.append(x_BTD)
        for i, layer in enumerate(self.layers):
            x_BTD, cache = layer(
                x_BTD, self.rope, positions_BT, None if caches is None else caches[i]
            )
            if caches is not None and cache is not None:
                caches[i] = cache
            if trace is not None:
                trace.append(x_BTD)
        return x_BTD

    def __call__(
        self,
        tokens_BT: Array,
        positions_BT: Array | None = None,
        caches: list[KVCache] | None = None,
        trace: list[Array] | None = None,
    ) -> Array:
        """Logits [B, T, V], in at least float32."""
        logits_BTV = self.lm_head(self.hidden(tokens_BT, positions_BT, caches, trace))
        return logits_BTV.astype(PARAMETERS[self.dtype])


def make_caches(model: Model, batch: int, length: int) -> list[KVCache]:
    """Empty key/value caches of all layers, for positions 0 .. length - 1."""
    shape = (batch, length, model.config.G, model.config.K)
    dtype = COMPUTE[model.dtype]
    return [
        (jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(model.config.n_layers)
    ]
