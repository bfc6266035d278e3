"""The model in Flax NNX. Mirror, class for class: mooshak_torch/model.py.

Names end in the axes of their shape: B batch, T time, S time of the keys, D model width, H query
heads, G key/value heads, R = H / G + 2 heads of a fused projection, K head width, k half of K,
F MLP width, V vocabulary, E = H x K. Parameters have logical axes, which
mooshak_jax/distributed/sharding.py maps to the mesh.

A float64 model computes in float64 throughout. In bfloat16 the parameters are float32, matrix
products bfloat16, and norms, RoPE, softmax and loss float32.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from mooshak.config.lora import LoraConfig
from mooshak.config.model import Dtype, ModelConfig
from mooshak.numerics.neftune import embedding_noise
from mooshak_jax.distributed.sharding import Axes, constrain
from mooshak_jax.kv_cache import KVCache, check_index
from mooshak_jax.lora import add_adapter, look_up, set_adapters, set_token_rows, table_of
from mooshak_jax.ops.activations import rms_norm, swiglu
from mooshak_jax.ops.attention import attention, block_attention, document_attention
from mooshak_jax.ops.matmul import einsum, linear
from mooshak_jax.rope import Positions, Rope

COMPUTE_DTYPE = {
    "float64": jnp.float64,
    "float32": jnp.float32,
    "bfloat16": jnp.bfloat16,
    "float16": jnp.float16,
}
PARAM_DTYPE = {
    "float64": jnp.float64,
    "float32": jnp.float32,
    "bfloat16": jnp.float32,
    "float16": jnp.float32,
}
PRODUCT = "product"
"""Checkpoint name of a `Linear`'s rounded output: in bfloat16 half the bytes of its sums."""
REMAT = {
    "dots": jax.checkpoint_policies.save_only_these_names(PRODUCT),
    "full": jax.checkpoint_policies.nothing_saveable,
}
"""`train.remat` -> the policy of `jax.checkpoint`: what the backward pass does not recompute."""


class Linear(nnx.Module):
    """Linear layer y = x W (+ b), in the dtype of x. Kernel [in, *out], bias [*out].

    mooshak_jax/lora.py adds adapters.
    """

    lora: LoraConfig | None = None
    token_ids: tuple[int, ...] | None = None  # Rows of the output head that are trained: lora.py.

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
        if self.lora is None:
            return checkpoint_name(linear(x, table_of(self), bias, self.axes), PRODUCT)
        y = add_adapter(linear(x, self.kernel[...], None, self.axes), x, self, self.lora)
        return checkpoint_name(y if bias is None else y + bias.astype(y.dtype), PRODUCT)


class Embedding(nnx.Module):
    """Embedding table: the row of each token id. Embedding [V, D]."""

    token_ids: tuple[int, ...] | None = None  # Rows that are trained: lora.py.

    def __init__(self, n_tokens: int, dim: int, dtype: jnp.dtype):
        self.embedding = nnx.Param(jnp.zeros((n_tokens, dim), dtype), axes=("vocab", "embed"))

    def __call__(self, tokens_BT: Array) -> Array:
        # Each device looks up its shard of the columns: only the resulting rows are exchanged.
        tokens_BT = constrain(tokens_BT, "replica", None)
        return constrain(look_up(tokens_BT, self), "replica", None, "embed")


class RMSNorm(nnx.Module):
    """Root-mean-square norm (arXiv:1910.07467) in at least float32, rounded once. Scale [D]."""

    def __init__(self, dim: int, eps: float, dtype: jnp.dtype):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((dim,), dtype), axes=(None,))

    def __call__(self, x_BTD: Array) -> Array:
        return rms_norm(x_BTD, self.scale[...], self.eps)


class Attention(nnx.Module):
    """Causal self-attention with RoPE; the heads are concatenated.

    Llama adds an output projection and, by configuration, biases, normed queries and keys
    (arXiv:2302.05442) and a sliding window (arXiv:2310.06825).
    """

    def __init__(self, model: ModelConfig, dtype: jnp.dtype):
        self.head_dim, self.window, self.fused = model.K, model.sliding_window, model.fuse_kernels
        D, H, G, K = model.dim, model.n_heads, model.G, model.K
        bias, eps = model.qkv_bias, model.norm_eps
        if self.fused:
            # For each key head: the query heads that share it, the key, the value.
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
        mask_BTS = positions.mask_BTS
        if cache is not None:
            cache = cache.update(k_BSGK, v_BSGK, positions.index_BT)
            # Without a mask this is the prefill: queries attend to this call's tokens only.
            if mask_BTS is not None:
                k_BSGK = cache.k_BSGK.astype(q_BTHK.dtype)
                v_BSGK = cache.v_BSGK.astype(q_BTHK.dtype)
        segments_BT = positions.segments_BT if cache is None else None
        if segments_BT is not None:
            out_BTHK = document_attention(q_BTHK, k_BSGK, v_BSGK, segments_BT, self.window)
        else:
            if mask_BTS is None:
                mask_BTS = self.mask(jnp.arange(T)[None], T)
            if cache is not None and cache.n_blocks is not None:
                blocks = cache.block, cache.n_blocks
                out_BTHK = block_attention(q_BTHK, k_BSGK, v_BSGK, mask_BTS, *blocks)
            else:
                out_BTHK = self.attend(q_BTHK, k_BSGK, v_BSGK, mask_BTS)
        out_BTE = out_BTHK.reshape(B, T, -1)
        out_BTD = out_BTE if self.wo is None else self.wo(out_BTE)
        return constrain(out_BTD, "batch", "sequence", None), cache

    def heads(self, x: Array, norm: RMSNorm | None = None) -> Array:
        """Return a projection split into heads, [B, T, heads, K], normed if there is a norm."""
        x_BTHK = x.reshape(*x.shape[:2], -1, self.head_dim)
        return x_BTHK if norm is None else norm(x_BTHK)

    def mask(self, queries_BT: Array, n_keys: int) -> Array:
        """Return `causal_mask` for this layer's window, [B, T, S]."""
        return causal_mask(queries_BT, n_keys, self.window)

    @staticmethod
    def attend(q_BTHK: Array, k_BSGK: Array, v_BSGK: Array, mask_BTS: Array) -> Array:
        """Return `attention` under a mask, [B, T, H, K]."""
        return attention(q_BTHK, k_BSGK, v_BSGK, mask_BTS)


def causal_mask(queries_BT: Array, n_keys: int, window: int | None) -> Array:
    """Return a mask [B, T, S]: a query at position p sees key s if s <= p and p - s < window."""
    distance_BTS = queries_BT[..., None] - jnp.arange(n_keys)
    visible_BTS = distance_BTS >= 0
    return visible_BTS if window is None else visible_BTS & (distance_BTS < window)


class MLP(nnx.Module):
    """SwiGLU feed-forward network (arXiv:2002.05202): W2 (silu(W1 x) * W3 x)."""

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
        return constrain(self.w2(swiglu(gate_BTF, up_BTF)), "batch", "sequence", None)


class MooshakBlock(nnx.Module):
    """Mooshak layer: h = x + Attention(x); y = RMSNorm_output(h + MLP(RMSNorm_mlp(h)))."""

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
    """Llama layer: h = x + Attention(RMSNorm_attention(x)); y = h + MLP(RMSNorm_mlp(h))."""

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


def make_block(model: ModelConfig, dtype: Dtype) -> Any:
    """Return a layer with its adapters."""
    block: Any = BLOCKS[model.architecture](model, PARAM_DTYPE[dtype])
    if model.lora is not None:
        set_adapters(block, model.lora, COMPUTE_DTYPE[dtype])
    return block


class Model(nnx.Module):
    """Decoder-only language model. mooshak_jax/param_names.py maps its paths to canonical names.

    `remat` selects what the backward pass recomputes (`train.remat`). With `scan_layers` the
    parameters of all layers are stacked in one block.
    """

    def __init__(self, model: ModelConfig, dtype: Dtype = "float32", remat: str = "none"):
        self.config, self.dtype, self.remat = model, dtype, remat
        parameters = PARAM_DTYPE[dtype]
        self.embeddings = Embedding(model.vocab_size, model.dim, parameters)
        self.rope = Rope(model, parameters)
        self.layers: Any
        if model.scan_layers:
            stacked = nnx.vmap(lambda _: make_block(model, dtype))
            self.layers = stacked(jnp.arange(model.n_layers))
        else:
            self.layers = nnx.List([make_block(model, dtype) for _ in range(model.n_layers)])
        # Mooshak's last layer ends in a norm; Llama needs a final one.
        llama, tied = model.architecture == "llama", model.tie_embeddings
        self.norm = RMSNorm(model.dim, model.norm_eps, parameters) if llama else None
        axes = ("embed", "vocab")
        self.lm_head = None if tied else Linear(model.dim, model.vocab_size, parameters, axes)
        for table in filter(None, (self.embeddings, self.lm_head)):
            set_token_rows(table, model.lora)

    @property
    def head_DV(self) -> Array:
        """Kernel of the output head; the transposed embedding table if both are tied."""
        return table_of(self.embeddings).T if self.lm_head is None else table_of(self.lm_head)

    def hidden_states(
        self,
        tokens_BT: Array,
        positions_BT: Array | None = None,
        caches: list[KVCache] | None = None,
        segments_BT: Array | None = None,
        noise: tuple[Array, Array] | None = None,
    ) -> Array:
        """Return the final hidden states, [B, T, D].

        Positions default to 0 .. T - 1. `segments_BT` separates the documents of packed rows in
        training (see `Positions`); `positions_BT` are then positions within the document. With
        caches segments are ignored. `noise` are keys and scales [B, T] of the noise on the
        embeddings (NEFTune). Caches with the new keys and values replace those in the list
        `caches`. Raises `IndexError` for ids or positions that the model does not have.
        """
        if positions_BT is None:
            positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
            if tokens_BT.shape[1] > self.config.max_seq_len:
                raise IndexError(f"{tokens_BT.shape[1]} tokens, of {self.config.max_seq_len}")
        check_index(tokens_BT, self.config.vocab_size, "token")
        check_index(positions_BT, self.config.max_seq_len, "position")
        x_BTD = self.embeddings(tokens_BT)
        if noise is not None:
            keys_BT, scales_BT = noise[0], noise[1].astype(x_BTD.dtype)
            index_D = jnp.arange(x_BTD.shape[-1], dtype=jnp.int32)
            x_BTD = x_BTD + embedding_noise(keys_BT, index_D, scales_BT)
        x_BTD = x_BTD.astype(COMPUTE_DTYPE[self.dtype])
        x_BTD = constrain(x_BTD, "batch", "sequence", None)
        positions = self.rope.lookup(positions_BT)._replace(segments_BT=segments_BT)
        if caches is not None and caches[0].is_read:
            n_slots = caches[0].visible_slots(tokens_BT.shape[1])
            mask_BTS = causal_mask(positions_BT, n_slots, self.config.sliding_window)
            positions = positions._replace(mask_BTS=mask_BTS)

        def apply(
            layer: nnx.Module, x_BTD: Array, cache: KVCache | None
        ) -> tuple[Array, KVCache | None]:
            return layer(x_BTD, self.rope, positions, cache)

        if self.config.scan_layers and caches is None:
            graph, stacked = nnx.split(self.layers)
            body = self._checkpointed(lambda x, layer: apply(nnx.merge(graph, layer), x, None))
            x_BTD, _ = jax.lax.scan(body, x_BTD, stacked)
            return self._final(x_BTD)
        for i in range(self.config.n_layers):
            cache = None if caches is None else caches[i]
            x_BTD, cache = self._checkpointed(partial(apply, self._layer(i)))(x_BTD, cache)
            if caches is not None and cache is not None:
                caches[i] = cache
        return self._final(x_BTD)

    def _final(self, x_BTD: Array) -> Array:
        return x_BTD if self.norm is None else self.norm(x_BTD)

    def _layer(self, i: int) -> Any:
        if not self.config.scan_layers:
            return self.layers[i]
        graph, stacked = nnx.split(self.layers)
        return nnx.merge(graph, jax.tree.map(lambda array: array[i], stacked))

    def _checkpointed(self, function: Callable) -> Callable:
        """Return a function of one layer with activation checkpointing (`train.remat`)."""
        if self.remat == "none":
            return function
        # In a loop XLA cannot merge the recomputation with the first computation.
        prevent_cse = not self.config.scan_layers
        return jax.checkpoint(function, policy=REMAT[self.remat], prevent_cse=prevent_cse)

    def __call__(
        self,
        tokens_BT: Array,
        positions_BT: Array | None = None,
        caches: list[KVCache] | None = None,
        segments_BT: Array | None = None,
    ) -> Array:
        """Return logits [B, T, V] in at least float32; arguments as for `hidden_states`."""
        return self.logits(self.hidden_states(tokens_BT, positions_BT, caches, segments_BT))

    def logits(self, x_BTD: Array) -> Array:
        """Apply the output head to final hidden states; return [B, T, V] in at least float32."""
        if self.lm_head is None:
            # Not `head_DV`: XLA for CPUs has no bfloat16 product of one row and a transpose.
            head_VD = table_of(self.embeddings).astype(x_BTD.dtype)
            logits_BTV = einsum("BTD,VD->BTV", x_BTD, head_VD)
        else:
            logits_BTV = self.lm_head(x_BTD)
        return logits_BTV.astype(PARAM_DTYPE[self.dtype])


def make_caches(
    model: Model, batch: int, length: int, dtype: Dtype | None = None, block: int = 0
) -> list[KVCache]:
    """Return empty caches of all layers, for `batch` rows and positions 0 .. length - 1.

    `dtype` is by default the compute dtype; `block` is that of `KVCache`.
    """
    shape = (batch, length, model.config.G, model.config.K)
    kv_dtype = COMPUTE_DTYPE[dtype or model.dtype]
    return [
        KVCache(
            jnp.zeros(shape, kv_dtype),
            jnp.zeros(shape, kv_dtype),
            jnp.zeros(batch, jnp.int32),
            block=block,
        )
        for _ in range(model.config.n_layers)
    ]
