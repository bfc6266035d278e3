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
    """y = x W (+ b), in the dtype of x. Kernel [in, out]: the canonical weight's transpose."""

    def __init__(self, n_in: int, n_out: int, dtype: jnp.dtype, bias: bool = False):
        self.kernel = nnx.Param(jnp.zeros((n_in, n_out), dtype))
        self.bias = nnx.Param(jnp.zeros((n_out,), dtype)) if bias else None

    def __call__(self, x: Array) -> Array:
        y = jnp.matmul(x, self.kernel[...].astype(x.dtype), precision=PRECISION)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


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
    """Causal self-attention with rotary positions, heads concatenated.

    llama: an output projection, and where the model has them biases, normed queries and keys
    (arXiv:2302.05442), and a window of positions that a query sees (arXiv:2310.06825).
    """

    def __init__(self, model: ModelConfig, dtype: jnp.dtype):
        self.head_dim, self.window = model.K, model.sliding_window
        heads_HK, bias, eps = model.n_heads * model.K, model.qkv_bias, model.norm_eps
        self.wq = Linear(model.dim, heads_HK, dtype, bias)
        self.wk = Linear(model.dim, model.G * model.K, dtype, bias)
        self.wv = Linear(model.dim, model.G * model.K, dtype, bias)
        self.q_norm = RMSNorm(model.K, eps, dtype) if model.qk_norm else None
        self.k_norm = RMSNorm(model.K, eps, dtype) if model.qk_norm else None
        llama = model.architecture == "llama"
        self.wo = Linear(heads_HK, model.dim, dtype, model.wo_bias) if llama else None

    def __call__(
        self, x_BTD: Array, rope: Rope, positions_BT: Array, cache: KVCache | None = None
    ) -> tuple[Array, KVCache | None]:
        B, T, _ = x_BTD.shape
        q_BTHK = rope(self.heads(x_BTD, self.wq, self.q_norm), positions_BT)
        k_BSGK = rope(self.heads(x_BTD, self.wk, self.k_norm), positions_BT)
        v_BSGK = self.heads(x_BTD, self.wv)
        queries_BT = jnp.arange(T)[None]
        if cache is not None:
            rows_B1 = jnp.arange(B)[:, None]
            k_BSGK = cache[0].at[rows_B1, positions_BT].set(k_BSGK)
            v_BSGK = cache[1].at[rows_B1, positions_BT].set(v_BSGK)
            cache = (k_BSGK, v_BSGK)
            queries_BT = positions_BT
        mask_BTS = self.mask(queries_BT, k_BSGK.shape[1])
        out_BTE = self.attend(q_BTHK, k_BSGK, v_BSGK, mask_BTS).reshape(B, T, -1)
        return (out_BTE if self.wo is None else self.wo(out_BTE)), cache

    def heads(self, x_BTD: Array, linear: Linear, norm: RMSNorm | None = None) -> Array:
        """A projection cut into heads, [B, T, heads, K], normed where there is a norm."""
        x_BTHK = linear(x_BTD).reshape(*x_BTD.shape[:2], -1, self.head_dim)
        return x_BTHK if norm is None else norm(x_BTHK)

    def mask(self, queries_BT: Array, n_keys: int) -> Array:
        """[B, T, S]: a query sees the keys at its own position and before, as far as the window.

        What lies after it in a cache is not written yet.
        """
        back_BTS = queries_BT[..., None] - jnp.arange(n_keys)
        seen_BTS = back_BTS >= 0
        return seen_BTS if self.window is None else seen_BTS & (back_BTS < self.window)

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
        self.w1 = Linear(model.dim, model.hidden_dim, dtype, model.mlp_bias)
        self.w2 = Linear(model.hidden_dim, model.dim, dtype, model.mlp_bias)
        self.w3 = Linear(model.dim, model.hidden_dim, dtype, model.mlp_bias)

    def __call__(self, x_BTD: Array) -> Array:
        return self.w2(jax.nn.silu(self.w1(x_BTD)) * self.w3(x_BTD))


class MooshakBlock(nnx.Module):
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


class LlamaBlock(nnx.Module):
    """One layer: h = x + Attention(RMSNorm_attention(x)); y = h + MLP(RMSNorm_mlp(h))."""

    def __init__(self, model: ModelConfig, dtype: jnp.dtype):
        self.attention_norm = RMSNorm(model.dim, model.norm_eps, dtype)
        self.attention = Attention(model, dtype)
        self.mlp_norm = RMSNorm(model.dim, model.norm_eps, dtype)
        self.mlp = MLP(model, dtype)

    def __call__(
        self, x_BTD: Array, rope: Rope, positions_BT: Array, cache: KVCache | None = None
    ) -> tuple[Array, KVCache | None]:
        normed_BTD = self.attention_norm(x_BTD)
        attention_BTD, cache = self.attention(normed_BTD, rope, positions_BT, cache)
        h_BTD = x_BTD + attention_BTD
        return h_BTD + self.mlp(self.mlp_norm(h_BTD)), cache


BLOCKS = {"mooshak": MooshakBlock, "llama": LlamaBlock}


class Model(nnx.Module):
    """The language model. checkpoint.py has the table from its paths to the canonical names."""

    def __init__(self, model: ModelConfig, dtype: Dtype = "float32"):
        self.config, self.dtype = model, dtype
        parameters = PARAMETERS[dtype]
        self.embeddings = Embedding(model.vocab_size, model.dim, parameters)
        self.rope = Rope(model, parameters)
        block = BLOCKS[model.architecture]
        self.layers = nnx.List([block(model, parameters) for _ in range(model.n_layers)])
        # A mooshak layer ends in a norm of its own.
        llama, tied = model.architecture == "llama", model.tie_embeddings
        self.norm = RMSNorm(model.dim, model.norm_eps, parameters) if llama else None
        self.lm_head = None if tied else Linear(model.dim, model.vocab_size, parameters)

    @property
    def head_DV(self) -> Array:
        """The output head: the embedding's transpose where both are tied."""
        if self.lm_head is None:
            return self.embeddings.embedding[...].T
        return self.lm_head.kernel[...]

    def hidden(
        self,
        tokens_BT: Array,
        positions_BT: Array | None = None,
        caches: list[KVCache] | None = None,
        trace: list[Array] | None = None,
    ) -> Array:
        """What the output head reads, [B, T, D]; `trace` collects the embedding and every layer.

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
        return x_BTD if self.norm is None else self.norm(x_BTD)

    def __call__(
        self,
        tokens_BT: Array,
        positions_BT: Array | None = None,
        caches: list[KVCache] | None = None,
        trace: list[Array] | None = None,
    ) -> Array:
        """Logits [B, T, V], in at least float32."""
        x_BTD = self.hidden(tokens_BT, positions_BT, caches, trace)
        if self.lm_head is None:
            logits_BTV = jnp.matmul(x_BTD, self.head_DV.astype(x_BTD.dtype), precision=PRECISION)
        else:
            logits_BTV = self.lm_head(x_BTD)
        return logits_BTV.astype(PARAMETERS[self.dtype])


def make_caches(model: Model, batch: int, length: int) -> list[KVCache]:
    """Empty key/value caches of all layers, for positions 0 .. length - 1."""
    shape = (batch, length, model.config.G, model.config.K)
    dtype = COMPUTE[model.dtype]
    return [
        (jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(model.config.n_layers)
    ]
