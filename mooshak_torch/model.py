"""The model in PyTorch. Mirror, class for class: mooshak_jax/model.py.

Names end in the axes of their shape: B batch, T time, S time of the keys, D model width, H query
heads, G key/value heads, K head width, k half of K, F MLP width, V vocabulary, E = H x K.

A float64 model computes in float64 throughout. In bfloat16 the parameters are float32, matrix
products bfloat16, and norms, RoPE, softmax and loss float32.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mooshak.config.lora import LoraConfig
from mooshak.config.model import Dtype, ModelConfig
from mooshak.numerics.neftune import embedding_noise
from mooshak_torch.kv_cache import KVCache
from mooshak_torch.lora import add_adapter, look_up, set_adapters, set_token_rows, table_of
from mooshak_torch.ops.activations import recompute_in_backward, rms_norm, swiglu
from mooshak_torch.ops.attention import (
    attention,
    document_attention,
    document_mask,
    needs_document_mask,
)
from mooshak_torch.ops.matmul import linear
from mooshak_torch.rope import Positions, Rope

COMPUTE_DTYPE = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
PARAM_DTYPE = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.float32,
    "float16": torch.float32,
}


class Linear(nn.Module):
    """Linear layer y = x W^T (+ b), in the dtype of x. Weight [out, in], bias [out].

    mooshak_torch/lora.py adds adapters.
    """

    bias: nn.Parameter | None
    lora: LoraConfig | None = None
    token_ids: list[int] | None = None  # Rows of the output head that are trained: lora.py.

    def __init__(self, n_in: int, n_out: int, dtype: torch.dtype, bias: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_out, n_in, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(n_out, dtype=dtype)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        y = linear(x, table_of(self).to(x.dtype))
        if self.lora is not None:
            y = add_adapter(y, x, self, self.lora)
        return y if self.bias is None else y + self.bias.to(x.dtype)


class Embedding(nn.Module):
    """Embedding table: the row of each token id. Weight [V, D]."""

    token_ids: list[int] | None = None  # Rows that are trained: lora.py.

    def __init__(self, n_tokens: int, dim: int, dtype: torch.dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_tokens, dim, dtype=dtype))

    def forward(self, tokens_BT: Tensor) -> Tensor:
        return look_up(tokens_BT, self)


class RMSNorm(nn.Module):
    """Root-mean-square norm (arXiv:1910.07467) in at least float32, rounded once. Weight [D]."""

    def __init__(self, dim: int, eps: float, dtype: torch.dtype):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim, dtype=dtype))

    def forward(self, x_BTD: Tensor) -> Tensor:
        return rms_norm(x_BTD, self.weight, self.eps)

    def recompute(self, x_BTD: Tensor) -> Tensor:
        """Return `forward(x_BTD)` for a backward pass: without hooks, and on local tensors.

        Under tensor parallelism the hooks convert local tensors to DTensors and back.
        """
        gain_D: Tensor = self.weight
        gain_D = gain_D.to_local() if isinstance(gain_D, DTensor) else gain_D
        return rms_norm(x_BTD, gain_D, self.eps)


class Attention(nn.Module):
    """Causal self-attention with RoPE; the heads are concatenated.

    Llama adds an output projection and, by configuration, biases, normed queries and keys
    (arXiv:2302.05442) and a sliding window (arXiv:2310.06825).
    """

    def __init__(self, model: ModelConfig, dtype: torch.dtype):
        super().__init__()
        self.head_dim, self.window = model.K, model.sliding_window
        heads_HK, bias, eps = model.n_heads * model.K, model.qkv_bias, model.norm_eps
        self.wq = Linear(model.dim, heads_HK, dtype, bias)
        self.wk = Linear(model.dim, model.G * model.K, dtype, bias)
        self.wv = Linear(model.dim, model.G * model.K, dtype, bias)
        self.q_norm = RMSNorm(model.K, eps, dtype) if model.qk_norm else None
        self.k_norm = RMSNorm(model.K, eps, dtype) if model.qk_norm else None
        llama = model.architecture == "llama"
        self.wo = Linear(heads_HK, model.dim, dtype, model.wo_bias) if llama else None

    def forward(
        self, x_BTD: Tensor, rope: Rope, positions: Positions, cache: KVCache | None = None
    ) -> Tensor:
        q_BTHK = rope(self.heads(self.wq(x_BTD), self.q_norm), positions)
        k_BSGK = rope(self.heads(self.wk(x_BTD), self.k_norm), positions)
        v_BSGK = self.heads(self.wv(x_BTD))
        mask_BTS = positions.mask_BTS
        if cache is not None:
            cache.update(k_BSGK, v_BSGK, positions.index_BT)
            # Without a mask this is the prefill: queries attend to this call's tokens only.
            if mask_BTS is not None:
                S = mask_BTS.shape[-1]
                k_BSGK = cache.k_BSGK[:, :S].to(q_BTHK.dtype)
                v_BSGK = cache.v_BSGK[:, :S].to(q_BTHK.dtype)
        segments_BT = positions.segments_BT if cache is None else None
        if segments_BT is not None:
            out_BTHK = document_attention(q_BTHK, k_BSGK, v_BSGK, segments_BT, self.window)
        else:
            if mask_BTS is None and self.window is not None:
                own_T = torch.arange(x_BTD.shape[1], device=x_BTD.device)
                mask_BTS = self.mask(own_T.unsqueeze(0), len(own_T))
            out_BTHK = self.attend(q_BTHK, k_BSGK, v_BSGK, mask_BTS)
        out_BTE = out_BTHK.flatten(-2)
        return out_BTE if self.wo is None else self.wo(out_BTE)

    def heads(self, x: Tensor, norm: RMSNorm | None = None) -> Tensor:
        """Return a projection split into heads, [B, T, heads, K], normed if there is a norm."""
        x_BTHK = x.unflatten(-1, (-1, self.head_dim))
        return x_BTHK if norm is None else norm(x_BTHK)

    def mask(self, queries_BT: Tensor, n_keys: int) -> Tensor:
        """Return `causal_mask` for this layer's window, [B, T, S]."""
        return causal_mask(queries_BT, n_keys, self.window)

    @staticmethod
    def attend(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, mask_BTS: Tensor | None) -> Tensor:
        """Return `attention`, [B, T, H, K]; causal unless a mask is given."""
        return attention(q_BTHK, k_BSGK, v_BSGK, mask_BTS)


def causal_mask(queries_BT: Tensor, n_keys: int, window: int | None) -> Tensor:
    """Return a mask [B, T, S]: a query at position p sees key s if s <= p and p - s < window."""
    distance_BTS = queries_BT.unsqueeze(-1) - torch.arange(n_keys, device=queries_BT.device)
    visible_BTS = distance_BTS >= 0
    return visible_BTS if window is None else visible_BTS & (distance_BTS < window)


class MLP(nn.Module):
    """SwiGLU feed-forward network (arXiv:2002.05202): W2 (silu(W1 x) * W3 x)."""

    def __init__(self, model: ModelConfig, dtype: torch.dtype):
        super().__init__()
        self.w1 = Linear(model.dim, model.hidden_dim, dtype, model.mlp_bias)
        self.w2 = Linear(model.hidden_dim, model.dim, dtype, model.mlp_bias)
        self.w3 = Linear(model.dim, model.hidden_dim, dtype, model.mlp_bias)
        self.recompute_activations = True
        """True: the backward pass recomputes the input of `w2` instead of saving it."""

    def forward(self, x_BTD: Tensor) -> Tensor:
        gate_BTF, up_BTF = self.w1(x_BTD), self.w3(x_BTD)
        hidden_BTF = swiglu(gate_BTF, up_BTF)
        with recompute_in_backward(
            hidden_BTF, lambda: swiglu(gate_BTF, up_BTF), self.recompute_activations
        ):
            return self.w2(hidden_BTF)


class MooshakBlock(nn.Module):
    """Mooshak layer: h = x + Attention(x); y = RMSNorm_output(h + MLP(RMSNorm_mlp(h)))."""

    def __init__(self, model: ModelConfig, dtype: torch.dtype):
        super().__init__()
        self.attention = Attention(model, dtype)
        self.mlp_norm = RMSNorm(model.dim, model.norm_eps, dtype)
        self.mlp = MLP(model, dtype)
        self.output_norm = RMSNorm(model.dim, model.norm_eps, dtype)
        self.recompute_activations = True
        """True: the backward pass recomputes the MLP's normed input instead of saving it."""

    def forward(
        self, x_BTD: Tensor, rope: Rope, positions: Positions, cache: KVCache | None = None
    ) -> Tensor:
        h_BTD = x_BTD + self.attention(x_BTD, rope, positions, cache)
        normed_BTD = self.mlp_norm(h_BTD)
        with recompute_in_backward(
            normed_BTD, lambda: self.mlp_norm.recompute(h_BTD), self.recompute_activations
        ):
            return self.output_norm(h_BTD + self.mlp(normed_BTD))


class LlamaBlock(nn.Module):
    """Llama layer: h = x + Attention(RMSNorm_attention(x)); y = h + MLP(RMSNorm_mlp(h))."""

    def __init__(self, model: ModelConfig, dtype: torch.dtype):
        super().__init__()
        self.attention_norm = RMSNorm(model.dim, model.norm_eps, dtype)
        self.attention = Attention(model, dtype)
        self.mlp_norm = RMSNorm(model.dim, model.norm_eps, dtype)
        self.mlp = MLP(model, dtype)
        self.recompute_activations = True
        """True: the backward pass recomputes the normed inputs instead of saving them."""

    def forward(
        self, x_BTD: Tensor, rope: Rope, positions: Positions, cache: KVCache | None = None
    ) -> Tensor:
        normed_BTD = self.attention_norm(x_BTD)
        with recompute_in_backward(
            normed_BTD, lambda: self.attention_norm.recompute(x_BTD), self.recompute_activations
        ):
            h_BTD = x_BTD + self.attention(normed_BTD, rope, positions, cache)
        normed_BTD = self.mlp_norm(h_BTD)
        with recompute_in_backward(
            normed_BTD, lambda: self.mlp_norm.recompute(h_BTD), self.recompute_activations
        ):
            return h_BTD + self.mlp(normed_BTD)


BLOCKS = {"mooshak": MooshakBlock, "llama": LlamaBlock}


def make_block(model: ModelConfig, dtype: Dtype) -> Any:
    """Return a layer with its adapters."""
    block: Any = BLOCKS[model.architecture](model, PARAM_DTYPE[dtype])
    if model.lora is not None:
        set_adapters(block, model.lora, COMPUTE_DTYPE[dtype])
    return block


class Model(nn.Module):
    """Decoder-only language model. Its parameters have the canonical names."""

    def __init__(self, model: ModelConfig, dtype: Dtype = "float32"):
        super().__init__()
        self.config, self.dtype = model, dtype
        parameters = PARAM_DTYPE[dtype]
        self.embeddings = Embedding(model.vocab_size, model.dim, parameters)
        self.rope = Rope(model, parameters)
        self.layers = nn.ModuleList(make_block(model, dtype) for _ in range(model.n_layers))
        # Mooshak's last layer ends in a norm; Llama needs a final one.
        llama, tied = model.architecture == "llama", model.tie_embeddings
        self.norm = RMSNorm(model.dim, model.norm_eps, parameters) if llama else None
        self.lm_head = None if tied else Linear(model.dim, model.vocab_size, parameters)
        for table in filter(None, (self.embeddings, self.lm_head)):
            set_token_rows(table, model.lora)

    @property
    def head_VD(self) -> Tensor:
        """Weight of the output head; the embedding table if both are tied."""
        return table_of(self.embeddings if self.lm_head is None else self.lm_head)

    def hidden_states(
        self,
        tokens_BT: Tensor,
        positions_BT: Tensor | None = None,
        caches: list[KVCache] | None = None,
        segments_BT: Tensor | None = None,
        noise: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Return the final hidden states, [B, T, D].

        Positions default to 0 .. T - 1. `segments_BT` separates the documents of packed rows in
        training (see `Positions`); `positions_BT` are then positions within the document. With
        caches segments are ignored. `noise` are keys and scales [B, T] of the noise on the
        embeddings (NEFTune). New keys and values are written into `caches` in place.
        """
        if positions_BT is None:
            positions_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
            positions_BT = positions_T.expand(tokens_BT.shape)
        x_BTD = self.embeddings(tokens_BT)
        if noise is not None:
            keys_BT, scales_BT = noise[0].int(), noise[1].to(x_BTD.dtype)
            index_D = torch.arange(x_BTD.shape[-1], dtype=torch.int32, device=x_BTD.device)
            x_BTD = x_BTD + embedding_noise(keys_BT, index_D, scales_BT)
        x_BTD = x_BTD.to(COMPUTE_DTYPE[self.dtype])
        positions = self.rope.lookup(positions_BT)._replace(segments_BT=segments_BT)
        visible_BTS, window = None, self.config.sliding_window
        if caches is not None and caches[0].is_read:
            n_slots = caches[0].visible_slots(tokens_BT.shape[1])
            visible_BTS = causal_mask(positions_BT, n_slots, window)
        elif caches is None and segments_BT is not None and needs_document_mask(segments_BT):
            visible_BTS = document_mask(segments_BT, window)
            positions = positions._replace(segments_BT=None)
        if visible_BTS is not None:
            mask_BTS = torch.where(visible_BTS, 0.0, -torch.inf).to(x_BTD.dtype)
            positions = positions._replace(mask_BTS=mask_BTS)
        for i, layer in enumerate(self.layers):
            x_BTD = layer(x_BTD, self.rope, positions, None if caches is None else caches[i])
        return x_BTD if self.norm is None else self.norm(x_BTD)

    def forward(
        self,
        tokens_BT: Tensor,
        positions_BT: Tensor | None = None,
        caches: list[KVCache] | None = None,
        segments_BT: Tensor | None = None,
    ) -> Tensor:
        """Return logits [B, T, V] in at least float32; arguments as for `hidden_states`."""
        return self.logits(self.hidden_states(tokens_BT, positions_BT, caches, segments_BT))

    def logits(self, x_BTD: Tensor) -> Tensor:
        """Apply the output head to final hidden states; return [B, T, V] in at least float32."""
        if self.lm_head is None:
            logits_BTV = linear(x_BTD, self.head_VD.to(x_BTD.dtype))
        else:
            logits_BTV = self.lm_head(x_BTD)
        return logits_BTV.to(PARAM_DTYPE[self.dtype])


def make_caches(
    model: Model, batch: int, length: int, dtype: Dtype | None = None, block: int = 0
) -> list[KVCache]:
    """Return empty caches of all layers, for `batch` rows and positions 0 .. length - 1.

    `dtype` is by default the compute dtype; `block` is that of `KVCache`.
    """
    shape = (batch, length, model.config.G, model.config.K)
    kv_dtype, device = COMPUTE_DTYPE[dtype or model.dtype], model.embeddings.weight.device
    return [
        KVCache(
            torch.zeros(shape, dtype=kv_dtype, device=device),
            torch.zeros(shape, dtype=kv_dtype, device=device),
            torch.zeros(batch, dtype=torch.long, device=device),
            block=block,
        )
        for _ in range(model.config.n_layers)
    ]
