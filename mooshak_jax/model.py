"""The model in Flax NNX. Its mirror, class for class, is mooshak_torch/model.py.

Shapes stand in the names: B batch, T time, S time of the keys, D model width, H query heads,
G key/value heads, R query heads per key/value head, K head width, F MLP width, V vocabulary,
L layers. Parameters have logical axes, which mooshak_jax/parallel.py lays over the mesh.

A model of float64 computes in float64 throughout. In bfloat16 the parameters stay float32, matrices
are multiplied in bfloat16, and norms, rotary angles, softmax and loss are computed in float32.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from mooshak.config import Dtype, ModelConfig
from mooshak.rope import rope_tables
from mooshak_jax.parallel import Axes, constrain, gather

COMPUTE = {
    "float64": jnp.float64,
    "float32": jnp.float32,
    "bfloat16": jnp.bfloat16,
    "float16": jnp.float16,
}
PARAMETERS = {
    "float64": jnp.float64,
    "float32": jnp.float32,
    "bfloat16": jnp.float32,
    "float16": jnp.float32,
}
# float32 means float32: a GPU would multiply in TF32 and a TPU in bfloat16 otherwise.
PRECISION = {
    "float64": jax.lax.Precision.HIGHEST,
    "float32": jax.lax.Precision.HIGHEST,
    "bfloat16": jax.lax.DotAlgorithmPreset.BF16_BF16_F32,
    "float16": jax.lax.DotAlgorithmPreset.F16_F16_F32,
}
QUERIES = (128, 512)
"""The fewest and the most positions whose attention scores are in memory at once.

A long sequence is cut into four pieces or more: three eighths of all scores, which the causal mask
hides, are then never made. The backward pass makes the scores of a piece again.
"""
PRODUCT = "product"
"""Name of what a `Linear` makes, rounded: half the bytes of its sums in bfloat16."""
# What the backward pass computes again.
REMAT = {
    "dots": jax.checkpoint_policies.save_only_these_names(PRODUCT),
    "full": jax.checkpoint_policies.nothing_saveable,
}


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def product(equation: str, a: Array, b: Array) -> Array:
    """einsum of two arrays of one dtype: bfloat16 is added up in float32, and rounded once.

    Its gradients are einsums in the same order of operands. Those that JAX derives swap them, and
    on a CPU XLA then makes a transposed copy.
    """
    wide = jnp.promote_types(a.dtype, jnp.float32)
    how: Any = {"precision": PRECISION[a.dtype.name], "preferred_element_type": wide}
    return jnp.einsum(equation, a, b, **how)


def _product_forward(equation: str, a: Array, b: Array) -> tuple[Array, tuple[Array, Array]]:
    return product(equation, a, b), (a, b)


def _product_backward(
    equation: str, operands: tuple[Array, Array], grad: Array
) -> tuple[Array, Array]:
    a, b = operands
    left, right, out = equation.replace("->", ",").split(",")
    narrow = grad.astype(a.dtype)
    da = product(f"{out},{right}->{left}", narrow, b)
    db = product(f"{left},{out}->{right}", a, narrow)
    return da.astype(a.dtype), db.astype(b.dtype)


product.defvjp(_product_forward, _product_backward)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def linear(x_BTD: Array, w: Array, b: Array | None, axes: Axes) -> Array:
    """x W (+ b) in the dtype of x; W [D, *out] and b [*out] have these logical axes.

    What `fsdp` has cut is gathered here, and again for the gradients. Those of W and b are added
    up, over tokens and devices, in the dtype of W: at least float32.
    """
    y = product("BTD,D...->BT...", x_BTD, gather(w, x_BTD.dtype, axes)).astype(x_BTD.dtype)
    return y if b is None else y + gather(b, x_BTD.dtype, axes[1:])


def _linear_forward(x_BTD: Array, w: Array, b: Array | None, axes: Axes) -> tuple[Array, Any]:
    return linear(x_BTD, w, b, axes), (x_BTD, w, b)


def _linear_backward(axes: Axes, kept: Any, dy: Array) -> tuple[Array, Array, Array | None]:
    x_BTD, w, b = kept
    out = "EFGH"[: w.ndim - 1]
    dx_BTD = product(f"BT{out},D{out}->BTD", dy, gather(w, dy.dtype, axes)).astype(dy.dtype)
    dw = constrain(product(f"BTD,BT{out}->D{out}", x_BTD, dy), *axes)
    db = None if b is None else constrain(dy.astype(b.dtype).sum((0, 1)), *axes[1:])
    return dx_BTD, dw, db


linear.defvjp(_linear_forward, _linear_backward)


@jax.custom_vjp
def attention(q_BTHK: Array, k_BSGK: Array, v_BSGK: Array, mask_BTS: Array) -> Array:
    """softmax(q k^T / sqrt(K)) v under a mask, [B, T, H, K].

    As many keys as queries are those of the same tokens: each sees itself and what is before.
    Scores are made for a piece of the queries at a time, and again for the gradients (as in
    arXiv:2205.14135), transposed there: nothing of their size is copied into another layout.
    """
    return _attention_forward(q_BTHK, k_BSGK, v_BSGK, mask_BTS)[0]


def _attention_forward(
    q_BTHK: Array, k_BSGK: Array, v_BSGK: Array, mask_BTS: Array
) -> tuple[Array, Any]:
    scale, G = 1 / math.sqrt(q_BTHK.shape[-1]), k_BSGK.shape[2]
    outs_BtHK, logs_BGQ = [], []
    for some, seen in _pieces(*mask_BTS.shape[1:]):
        q_BGQK = _heads_first(q_BTHK[:, some], G)
        k_BGsK, v_BGsK = (_heads_first(a_BSGK[:, seen], G) for a_BSGK in (k_BSGK, v_BSGK))
        mask_BQs = _of_all_heads(mask_BTS[:, some, seen], q_BGQK)
        scores_BGQs = product("BGQK,BGSK->BGQS", q_BGQK, k_BGsK) * scale
        scores_BGQs = jnp.where(mask_BQs[:, None], scores_BGQs, -jnp.inf)
        most_BGQ1 = scores_BGQs.max(-1, keepdims=True)
        weights_BGQs = jnp.exp(scores_BGQs - most_BGQ1)
        sum_BGQ1 = weights_BGQs.sum(-1, keepdims=True)
        out_BGQK = product("BGQS,BGSK->BGQK", weights_BGQs.astype(v_BSGK.dtype), v_BGsK) / sum_BGQ1
        outs_BtHK.append(_heads_last(out_BGQK.astype(v_BSGK.dtype), q_BTHK[:, some]))
        logs_BGQ.append((most_BGQ1 + jnp.log(sum_BGQ1)).squeeze(-1))
    out_BTHK = jnp.concatenate(outs_BtHK, 1)
    return out_BTHK, (q_BTHK, k_BSGK, v_BSGK, mask_BTS, out_BTHK, logs_BGQ)


def _attention_backward(kept: Any, dout_BTHK: Array) -> tuple[Array, Array, Array, None]:
    q_BTHK, k_BSGK, v_BSGK, mask_BTS, out_BTHK, logs_BGQ = kept
    scale, (_, S, G, _), dtype = 1 / math.sqrt(q_BTHK.shape[-1]), k_BSGK.shape, q_BTHK.dtype
    dqs_BtHK, dk_BSGK, dv_BSGK = [], jnp.zeros((), dtype), jnp.zeros((), dtype)
    for (some, seen), log_BGQ in zip(_pieces(*mask_BTS.shape[1:]), logs_BGQ, strict=True):
        q_BGQK, out_BGQK, dout_BGQK = (
            _heads_first(a_BTHK[:, some], G) for a_BTHK in (q_BTHK, out_BTHK, dout_BTHK)
        )
        k_BGsK, v_BGsK = (_heads_first(a_BSGK[:, seen], G) for a_BSGK in (k_BSGK, v_BSGK))
        mask_BsQ = _of_all_heads(mask_BTS[:, some, seen], q_BGQK).swapaxes(1, 2)
        scores_BGsQ = product("BGSK,BGQK->BGSQ", k_BGsK, q_BGQK) * scale
        weights_BGsQ = jnp.where(mask_BsQ[:, None], jnp.exp(scores_BGsQ - log_BGQ[:, :, None]), 0)
        # Softmax: every weight's gradient less their mean, which the weights give.
        mean_BGQ = jnp.sum(out_BGQK.astype(log_BGQ.dtype) * dout_BGQK, -1)
        dweights_BGsQ = product("BGSK,BGQK->BGSQ", v_BGsK, dout_BGQK) - mean_BGQ[:, :, None]
        dscores_BGsQ = (weights_BGsQ * dweights_BGsQ).astype(dtype)
        dq_BGQK = product("BGSQ,BGSK->BGQK", dscores_BGsQ, k_BGsK) * scale
        dk_BGsK = product("BGSQ,BGQK->BGSK", dscores_BGsQ, q_BGQK) * scale
        dv_BGsK = product("BGSQ,BGQK->BGSK", weights_BGsQ.astype(dtype), dout_BGQK)
        dqs_BtHK.append(_heads_last(dq_BGQK, q_BTHK[:, some]).astype(dtype))
        later = ((0, 0), (0, S - dk_BGsK.shape[2]), (0, 0), (0, 0))
        dk_BSGK += jnp.pad(dk_BGsK.swapaxes(1, 2), later)
        dv_BSGK += jnp.pad(dv_BGsK.swapaxes(1, 2), later)
    return jnp.concatenate(dqs_BtHK, 1), dk_BSGK.astype(dtype), dv_BSGK.astype(dtype), None


attention.defvjp(_attention_forward, _attention_backward)


def _pieces(n_queries: int, n_keys: int) -> Iterator[tuple[slice, slice]]:
    """Pieces of the queries, and of the keys that they may see."""
    width = min(max(n_queries // 4, QUERIES[0]), QUERIES[1]) if n_queries == n_keys else n_queries
    for start in range(0, n_queries, width):
        end = min(start + width, n_queries)
        yield slice(start, end), slice(end if n_queries == n_keys else n_keys)


def _heads_first(a_BTHK: Array, G: int) -> Array:
    """[B, G, Q, K], Q: all tokens, head by head of those that share a key head."""
    B, T, H, K = a_BTHK.shape
    return a_BTHK.reshape(B, T, G, H // G, K).transpose(0, 2, 3, 1, 4).reshape(B, G, -1, K)


def _heads_last(a_BGQK: Array, like_BTHK: Array) -> Array:
    B, T, H, K = like_BTHK.shape
    G = a_BGQK.shape[1]
    return a_BGQK.reshape(B, G, H // G, T, K).transpose(0, 3, 1, 2, 4).reshape(B, T, H, K)


def _of_all_heads(mask_BTS: Array, q_BGQK: Array) -> Array:
    """[B, Q, S]: the mask of the tokens for each of the heads that share a key head."""
    return jnp.tile(mask_BTS, (1, q_BGQK.shape[2] // mask_BTS.shape[1], 1))


class Linear(nnx.Module):
    """y = x W (+ b), in the dtype of x. Kernel [in, *out]: the canonical weight's transpose."""

    def __init__(
        self,
        n_in: int,
        n_out: int | tuple[int, ...],
        dtype: jnp.dtype,
        axes: Axes,
        bias: bool = False,
    ):
        out = (n_out,) if isinstance(n_out, int) else n_out
        self.axes = axes
        self.kernel = nnx.Param(jnp.zeros((n_in, *out), dtype), axes=axes)
        self.bias = nnx.Param(jnp.zeros(out, dtype), axes=axes[1:]) if bias else None

    def __call__(self, x: Array) -> Array:
        bias = None if self.bias is None else self.bias[...]
        return checkpoint_name(linear(x, self.kernel[...], bias, self.axes), PRODUCT)


class Embedding(nnx.Module):
    """The row of each token. Embedding [V, D]."""

    def __init__(self, n_tokens: int, dim: int, dtype: jnp.dtype):
        self.embedding = nnx.Param(jnp.zeros((n_tokens, dim), dtype), axes=("vocab", "embed"))

    def __call__(self, tokens_BT: Array) -> Array:
        # Every device looks up its columns: the rows that come out are smaller than the table.
        tokens_BT = constrain(tokens_BT, "replica", None)
        return constrain(self.embedding[...][tokens_BT], "replica", None, "embed")


class RMSNorm(nnx.Module):
    """x / rms(x) * gain (arXiv:1910.07467), in at least float32, cast once. Scale [D]."""

    def __init__(self, dim: int, eps: float, dtype: jnp.dtype):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((dim,), dtype), axes=(None,))

    def __call__(self, x_BTD: Array) -> Array:
        wide_BTD = x_BTD.astype(self.scale.dtype)
        scale_BT1 = jax.lax.rsqrt(jnp.mean(jnp.square(wide_BTD), -1, keepdims=True) + self.eps)
        return (wide_BTD * scale_BT1 * self.scale[...]).astype(x_BTD.dtype)


class Positions(NamedTuple):
    """Where the tokens of a call stand, and the rotations there: the same for all layers."""

    index_BT: Array
    cos_BT1k: Array
    sin_BT1k: Array


class Rope(nnx.Module):
    """Rotary position embedding (arXiv:2104.09864), halves rotated, in at least float32."""

    def __init__(self, model: ModelConfig, dtype: jnp.dtype):
        # Static tables: constants of the compiled step, not state of the model.
        self.tables = _Tables(*(table.astype(dtype) for table in rope_tables(model)))

    def at(self, index_BT: Array) -> Positions:
        """The rotations at these positions."""
        cos, sin = (jnp.asarray(table)[index_BT] for table in (self.tables.cos, self.tables.sin))
        return Positions(index_BT, cos[:, :, None], sin[:, :, None])

    def __call__(self, x_BTHK: Array, positions: Positions) -> Array:
        _, cos_BT1k, sin_BT1k = positions
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
        self.head_dim, self.window, self.fused = model.K, model.sliding_window, model.fuse_kernels
        D, H, G, K = model.dim, model.n_heads, model.G, model.K
        bias, eps = model.qkv_bias, model.norm_eps
        if self.fused:
            # Beside each key head and its value head the R query heads that read them.
            width, axes = (G, H // G + 2, K), ("embed", "kv_heads", None, None)
            self.wqkv = Linear(D, width, dtype, axes, bias)
        else:
            self.wq = Linear(D, H * K, dtype, ("embed", "heads"), bias)
            self.wk = Linear(D, G * K, dtype, ("embed", "kv_heads"), bias)
            self.wv = Linear(D, G * K, dtype, ("embed", "kv_heads"), bias)
        self.q_norm = RMSNorm(K, eps, dtype) if model.qk_norm else None
        self.k_norm = RMSNorm(K, eps, dtype) if model.qk_norm else None
        llama = model.architecture == "llama"
        out = ("heads", "embed")
        self.wo = Linear(H * K, D, dtype, out, model.wo_bias) if llama else None

    def __call__(
        self, x_BTD: Array, rope: Rope, positions: Positions, cache: KVCache | None = None
    ) -> tuple[Array, KVCache | None]:
        B, T, _ = x_BTD.shape
        x_BTD = constrain(x_BTD, "batch", None, None)
        if self.fused:
            qkv_BTGRK = self.wqkv(x_BTD)
            q_BTHK = rope(self.heads(qkv_BTGRK[:, :, :, :-2], self.q_norm), positions)
            k_BSGK = rope(self.heads(qkv_BTGRK[:, :, :, -2], self.k_norm), positions)
            v_BSGK = qkv_BTGRK[:, :, :, -1]
        else:
            q_BTHK = rope(self.heads(self.wq(x_BTD), self.q_norm), positions)
            k_BSGK = rope(self.heads(self.wk(x_BTD), self.k_norm), positions)
            v_BSGK = self.heads(self.wv(x_BTD))
        queries_BT = jnp.arange(T)[None]
        if cache is not None:
            rows_B1 = jnp.arange(B)[:, None]
            k_BSGK = cache[0].at[rows_B1, positions.index_BT].set(k_BSGK)
            v_BSGK = cache[1].at[rows_B1, positions.index_BT].set(v_BSGK)
            cache = (k_BSGK, v_BSGK)
            queries_BT = positions.index_BT
        mask_BTS = self.mask(queries_BT, k_BSGK.shape[1])
        out_BTE = self.attend(q_BTHK, k_BSGK, v_BSGK, mask_BTS).reshape(B, T, -1)
        out_BTD = out_BTE if self.wo is None else self.wo(out_BTE)
        return constrain(out_BTD, "batch", "sequence", None), cache

    def heads(self, x: Array, norm: RMSNorm | None = None) -> Array:
        """A projection cut into heads, [B, T, heads, K], normed where there is a norm."""
        x_BTHK = x.reshape(*x.shape[:2], -1, self.head_dim)
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
        """softmax(q k^T / sqrt(K)) v under a mask, [B, T, H, K]; among themselves a causal one.

        `jax.nn.dot_product_attention` is not used: its softmax is float32, in float64 runs too.
        """
        return attention(q_BTHK, k_BSGK, v_BSGK, mask_BTS)


class MLP(nnx.Module):
    """SwiGLU (arXiv:2002.05202): W2 (silu(W1 x) * W3 x)."""

    def __init__(self, model: ModelConfig, dtype: jnp.dtype):
        self.fused = model.fuse_kernels
        if self.fused:
            self.w13 = Linear(
                model.dim, (2, model.hidden_dim), dtype, ("embed", None, "mlp"), model.mlp_bias
            )
        else:
            self.w1 = Linear(model.dim, model.hidden_dim, dtype, ("embed", "mlp"), model.mlp_bias)
            self.w3 = Linear(model.dim, model.hidden_dim, dtype, ("embed", "mlp"), model.mlp_bias)
        self.w2 = Linear(model.hidden_dim, model.dim, dtype, ("mlp", "embed"), model.mlp_bias)

    def __call__(self, x_BTD: Array) -> Array:
        x_BTD = constrain(x_BTD, "batch", None, None)
        if self.fused:
            gate_BTF, up_BTF = jnp.moveaxis(self.w13(x_BTD), -2, 0)
        else:
            gate_BTF, up_BTF = self.w1(x_BTD), self.w3(x_BTD)
        return constrain(self.w2(jax.nn.silu(gate_BTF) * up_BTF), "batch", "sequence", None)


class MooshakBlock(nnx.Module):
    """One layer: h = x + Attention(x); y = RMSNorm_out(h + MLP(RMSNorm_mlp(h)))."""

    def __init__(self, model: ModelConfig, dtype: jnp.dtype):
        self.attention = Attention(model, dtype)
        self.mlp_norm = RMSNorm(model.dim, model.norm_eps, dtype)
        self.mlp = MLP(model, dtype)
        self.output_norm = RMSNorm(model.dim, model.norm_eps, dtype)

    def __call__(
        self, x_BTD: Array, rope: Rope, positions: Positions, cache: KVCache | None = None
    ) -> tuple[Array, KVCache | None]:
        attention_BTD, cache = self.attention(x_BTD, rope, positions, cache)
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
        self, x_BTD: Array, rope: Rope, positions: Positions, cache: KVCache | None = None
    ) -> tuple[Array, KVCache | None]:
        normed_BTD = self.attention_norm(x_BTD)
        attention_BTD, cache = self.attention(normed_BTD, rope, positions, cache)
        h_BTD = x_BTD + attention_BTD
        return h_BTD + self.mlp(self.mlp_norm(h_BTD)), cache


BLOCKS = {"mooshak": MooshakBlock, "llama": LlamaBlock}


class Model(nnx.Module):
    """The language model. checkpoint.py has the table from its paths to the canonical names.

    `remat` is what the backward pass computes again (`train.remat`). With `scan_layers` the
    parameters of all layers are stacked in one block.
    """

    def __init__(self, model: ModelConfig, dtype: Dtype = "float32", remat: str = "none"):
        self.config, self.dtype, self.remat = model, dtype, remat
        parameters = PARAMETERS[dtype]
        self.embeddings = Embedding(model.vocab_size, model.dim, parameters)
        self.rope = Rope(model, parameters)
        block = BLOCKS[model.architecture]
        self.layers: Any
        if model.scan_layers:
            stacked = nnx.vmap(lambda _: block(model, parameters))
            self.layers = stacked(jnp.arange(model.n_layers))
        else:
            self.layers = nnx.List([block(model, parameters) for _ in range(model.n_layers)])
        # A mooshak layer ends in a norm of its own.
        llama, tied = model.architecture == "llama", model.tie_embeddings
        self.norm = RMSNorm(model.dim, model.norm_eps, parameters) if llama else None
        axes = ("embed", "vocab")
        self.lm_head = None if tied else Linear(model.dim, model.vocab_size, parameters, axes)

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
        x_BTD = constrain(x_BTD, "batch", "sequence", None)
        if trace is not None:
            trace.append(x_BTD)

        positions = self.rope.at(positions_BT)

        def through(
            layer: nnx.Module, x_BTD: Array, cache: KVCache | None
        ) -> tuple[Array, KVCache | None]:
            return layer(x_BTD, self.rope, positions, cache)

        if self.config.scan_layers and caches is None and trace is None:
            graph, stacked = nnx.split(self.layers)
            one = self._rematerialized(lambda x, layer: through(nnx.merge(graph, layer), x, None))
            x_BTD, _ = jax.lax.scan(one, x_BTD, stacked)
            return self._final(x_BTD)
        for i in range(self.config.n_layers):
            cache = None if caches is None else caches[i]
            x_BTD, cache = self._rematerialized(partial(through, self._layer(i)))(x_BTD, cache)
            if caches is not None and cache is not None:
                caches[i] = cache
            if trace is not None:
                trace.append(x_BTD)
        return self._final(x_BTD)

    def _final(self, x_BTD: Array) -> Array:
        return x_BTD if self.norm is None else self.norm(x_BTD)

    def _layer(self, i: int) -> Any:
        if not self.config.scan_layers:
            return self.layers[i]
        graph, stacked = nnx.split(self.layers)
        return nnx.merge(graph, jax.tree.map(lambda array: array[i], stacked))

    def _rematerialized(self, function: Callable) -> Callable:
        """A function of one layer, under the policy."""
        if self.remat == "none":
            return function
        # A loop keeps the second computation apart from the first by itself.
        apart = not self.config.scan_layers
        return jax.checkpoint(function, policy=REMAT[self.remat], prevent_cse=apart)

    def __call__(
        self,
        tokens_BT: Array,
        positions_BT: Array | None = None,
        caches: list[KVCache] | None = None,
        trace: list[Array] | None = None,
    ) -> Array:
        """Logits [B, T, V], in at least float32."""
        return self.logits(self.hidden(tokens_BT, positions_BT, caches, trace))

    def logits(self, x_BTD: Array) -> Array:
        """The output head on what `hidden` gives, [B, T, V], in at least float32."""
        if self.lm_head is None:
            # Not by `head_DV`: XLA has no bfloat16 product of one row and a transpose on a CPU.
            head_VD = self.embeddings.embedding[...].astype(x_BTD.dtype)
            logits_BTV = product("BTD,VD->BTV", x_BTD, head_VD)
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
