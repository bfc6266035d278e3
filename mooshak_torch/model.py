"""The model in PyTorch. Its mirror, class for class, is mooshak_jax/model.py.

Shapes stand in the names: B batch, T time, S time of the keys, D model width, H query heads,
G key/value heads, K head width, F MLP width, V vocabulary.

A model of float64 computes in float64 throughout. In bfloat16 the parameters stay float32, matrices
are multiplied in bfloat16, and norms, rotary angles, softmax and loss are computed in float32.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mooshak.config.model import Dtype, ModelConfig
from mooshak.numerics.rope import rope_tables
from mooshak_torch.ops.activations import recompute_in_backward, rms_norm, rotate, swiglu
from mooshak_torch.ops.attention import attention, document_attention
from mooshak_torch.ops.matmul import linear

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
    """y = x W^T (+ b), in the dtype of x. Weight [out, in], bias [out]."""

    bias: nn.Parameter | None

    def __init__(self, n_in: int, n_out: int, dtype: torch.dtype, bias: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_out, n_in, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(n_out, dtype=dtype)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        y = linear(x, self.weight.to(x.dtype))
        return y if self.bias is None else y + self.bias.to(x.dtype)


class Embedding(nn.Module):
    """The row of each token. Weight [V, D]."""

    def __init__(self, n_tokens: int, dim: int, dtype: torch.dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_tokens, dim, dtype=dtype))

    def forward(self, tokens_BT: Tensor) -> Tensor:
        return F.embedding(tokens_BT, self.weight)


class RMSNorm(nn.Module):
    """x / rms(x) * gain (arXiv:1910.07467), in at least float32, cast once. Weight [D]."""

    def __init__(self, dim: int, eps: float, dtype: torch.dtype):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim, dtype=dtype))

    def forward(self, x_BTD: Tensor) -> Tensor:
        return rms_norm(x_BTD, self.weight, self.eps)

    def recompute(self, x_BTD: Tensor) -> Tensor:
        """The same for the backward pass: no hooks, and under tensor parallelism of local parts."""
        gain_D: Tensor = self.weight
        gain_D = gain_D.to_local() if isinstance(gain_D, DTensor) else gain_D
        return rms_norm(x_BTD, gain_D, self.eps)


class Positions(NamedTuple):
    """Where the tokens of a call stand, and the rotations there: the same for all layers."""

    index_BT: Tensor
    cos_BT1K: Tensor
    sin_BT1K: Tensor
    """Negative in the first half."""
    segments_BT: Tensor | None = None
    """Documents of packed rows: runs of equal integers, which do not see each other."""
    mask_B1TS: Tensor | None = None
    """Added to the scores of slots 0 .. S - 1 of the caches: 0 or -inf. None: they are empty."""


class Rope(nn.Module):
    """Rotary position embedding (arXiv:2104.09864), halves rotated, in at least float32."""

    cos: Tensor
    sin: Tensor

    def __init__(self, model: ModelConfig, dtype: torch.dtype):
        super().__init__()
        cos, sin = rope_tables(model)
        self.register_buffer("cos", torch.tensor(cos, dtype=dtype), persistent=False)
        self.register_buffer("sin", torch.tensor(sin, dtype=dtype), persistent=False)

    def lookup(self, index_BT: Tensor) -> Positions:
        """The rotations at these positions."""
        cos_BT1k, sin_BT1k = (table[index_BT].unsqueeze(2) for table in (self.cos, self.sin))
        cos_BT1K = torch.cat((cos_BT1k, cos_BT1k), dim=-1)
        return Positions(index_BT, cos_BT1K, torch.cat((-sin_BT1k, sin_BT1k), dim=-1))

    def forward(self, x_BTHK: Tensor, positions: Positions) -> Tensor:
        return rotate(x_BTHK, positions.cos_BT1K, positions.sin_BT1K)


class KVCache:
    """Keys and values of one layer, [B, S, G, K] each; slot s has those of position s.

    The positions of a call rise by one from token to token, in each row from its length or below
    on: a call at earlier positions overwrites what was there. A query at position p sees the slots
    0 .. p only (within the window), so what later ones still hold is never seen.
    """

    def __init__(self, model: ModelConfig, batch: int, length: int, like: Tensor):
        shape = (batch, length, model.G, model.K)
        self.k_BSGK = like.new_zeros(shape)
        self.v_BSGK = like.new_zeros(shape)
        self.rows_B1 = torch.arange(batch, device=like.device).unsqueeze(1)
        self.lengths = torch.zeros(batch, dtype=torch.long, device=like.device)
        self.written = 0
        """No row is longer. Known without reading `lengths`, which would wait for a GPU."""

    @property
    def lengths(self) -> Tensor:
        """Tokens of each row, [B]: one more than the last position of the latest call."""
        return self._last_BT[:, -1] + 1

    @lengths.setter
    def lengths(self, lengths_B: Tensor) -> None:
        self._last_BT = lengths_B.unsqueeze(1) - 1

    def update(self, k_BTGK: Tensor, v_BTGK: Tensor, positions_BT: Tensor) -> "KVCache":
        """Write keys and values at their positions, in place. Returns this cache."""
        self.k_BSGK[self.rows_B1, positions_BT] = k_BTGK
        self.v_BSGK[self.rows_B1, positions_BT] = v_BTGK
        self._last_BT = positions_BT
        self.written = self.bound(positions_BT.shape[1])
        return self

    def bound(self, n_tokens: int) -> int:
        """Return how many slots may be in use after a call with so many tokens a row."""
        return min(self.written + n_tokens, self.k_BSGK.shape[1])

    def select(self, rows: Sequence[int] | Tensor) -> "KVCache":
        """Reorder, repeat or drop rows, in place: row i becomes the old row rows[i].

        Returns this cache.
        """
        rows_B = torch.as_tensor(rows, device=self.k_BSGK.device)
        self.k_BSGK, self.v_BSGK = self.k_BSGK[rows_B], self.v_BSGK[rows_B]
        self.lengths = self.lengths[rows_B]
        self.rows_B1 = torch.arange(len(rows_B), device=rows_B.device).unsqueeze(1)
        return self

    def truncate(self, lengths: Sequence[int] | Tensor) -> "KVCache":
        """Drop the tokens of each row beyond its new length, [B]; shorter rows stay as they are.

        Returns this cache.
        """
        lengths_B = torch.as_tensor(lengths)
        self.written = min(self.written, int(lengths_B.max()))
        self.lengths = torch.minimum(self.lengths, lengths_B.to(self.k_BSGK.device))
        return self


class Attention(nn.Module):
    """Causal self-attention with rotary positions, heads concatenated.

    llama: an output projection, and where the model has them biases, normed queries and keys
    (arXiv:2302.05442), and a window of positions that a query sees (arXiv:2310.06825).
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
        q_BTHK = rope(self.heads(x_BTD, self.wq, self.q_norm), positions)
        k_BSGK = rope(self.heads(x_BTD, self.wk, self.k_norm), positions)
        v_BSGK = self.heads(x_BTD, self.wv)
        mask_B1TS = positions.mask_B1TS
        if cache is not None:
            cache.update(k_BSGK, v_BSGK, positions.index_BT)
            # Prefill: queries attend to this call's tokens only.
            if mask_B1TS is not None:
                S = mask_B1TS.shape[-1]
                k_BSGK, v_BSGK = cache.k_BSGK[:, :S], cache.v_BSGK[:, :S]
        segments_BT = positions.segments_BT if cache is None else None
        if segments_BT is not None:
            out_BTHK = document_attention(q_BTHK, k_BSGK, v_BSGK, segments_BT, self.window)
        else:
            if mask_B1TS is None and self.window is not None:
                own_T = torch.arange(x_BTD.shape[1], device=x_BTD.device)
                mask_B1TS = self.mask(own_T.unsqueeze(0), len(own_T)).unsqueeze(1)
            out_BTHK = self.attend(q_BTHK, k_BSGK, v_BSGK, mask_B1TS)
        out_BTE = out_BTHK.flatten(-2)
        return out_BTE if self.wo is None else self.wo(out_BTE)

    def heads(self, x_BTD: Tensor, linear: Linear, norm: RMSNorm | None = None) -> Tensor:
        """A projection cut into heads, [B, T, heads, K], normed where there is a norm."""
        x_BTHK = linear(x_BTD).unflatten(-1, (-1, self.head_dim))
        return x_BTHK if norm is None else norm(x_BTHK)

    def mask(self, queries_BT: Tensor, n_keys: int) -> Tensor:
        """[B, T, S]: a query sees the keys at its own position and before, as far as the window."""
        return causal_mask(queries_BT, n_keys, self.window)

    @staticmethod
    def attend(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, mask_B1TS: Tensor | None) -> Tensor:
        """softmax(q k^T / sqrt(K)) v; the causal mask unless one is given. Returns [B, T, H, K].

        Without a mask a single query sees all keys.
        """
        return attention(q_BTHK, k_BSGK, v_BSGK, mask_B1TS)


def causal_mask(queries_BT: Tensor, n_keys: int, window: int | None) -> Tensor:
    """[B, T, S]: whether a query at a position p sees key s: s <= p, and p - s < window."""
    keys_S = torch.arange(n_keys, device=queries_BT.device)
    back_BTS = queries_BT.unsqueeze(-1) - keys_S
    seen_BTS = back_BTS >= 0
    return seen_BTS if window is None else seen_BTS & (back_BTS < window)


class MLP(nn.Module):
    """SwiGLU (arXiv:2002.05202): W2 (silu(W1 x) * W3 x)."""

    def __init__(self, model: ModelConfig, dtype: torch.dtype):
        super().__init__()
        self.w1 = Linear(model.dim, model.hidden_dim, dtype, model.mlp_bias)
        self.w2 = Linear(model.hidden_dim, model.dim, dtype, model.mlp_bias)
        self.w3 = Linear(model.dim, model.hidden_dim, dtype, model.mlp_bias)
        self.recompute_activations = True
        """Whether the backward pass makes the input of `w2` again."""

    def forward(self, x_BTD: Tensor) -> Tensor:
        gate_BTF, up_BTF = self.w1(x_BTD), self.w3(x_BTD)
        hidden_BTF = swiglu(gate_BTF, up_BTF)
        with recompute_in_backward(
            hidden_BTF, lambda: swiglu(gate_BTF, up_BTF), self.recompute_activations
        ):
            return self.w2(hidden_BTF)


class MooshakBlock(nn.Module):
    """One layer: h = x + Attention(x); y = RMSNorm_out(h + MLP(RMSNorm_mlp(h)))."""

    def __init__(self, model: ModelConfig, dtype: torch.dtype):
        super().__init__()
        self.attention = Attention(model, dtype)
        self.mlp_norm = RMSNorm(model.dim, model.norm_eps, dtype)
        self.mlp = MLP(model, dtype)
        self.output_norm = RMSNorm(model.dim, model.norm_eps, dtype)
        self.recompute_activations = True
        """Whether the backward pass makes the MLP's normed input again."""

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
    """One layer: h = x + Attention(RMSNorm_attention(x)); y = h + MLP(RMSNorm_mlp(h))."""

    def __init__(self, model: ModelConfig, dtype: torch.dtype):
        super().__init__()
        self.attention_norm = RMSNorm(model.dim, model.norm_eps, dtype)
        self.attention = Attention(model, dtype)
        self.mlp_norm = RMSNorm(model.dim, model.norm_eps, dtype)
        self.mlp = MLP(model, dtype)
        self.recompute_activations = True
        """Whether the backward pass makes the normed inputs again."""

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


class Model(nn.Module):
    """The language model. Parameters have the canonical names."""

    def __init__(self, model: ModelConfig, dtype: Dtype = "float32"):
        super().__init__()
        self.config, self.dtype = model, dtype
        parameters = PARAM_DTYPE[dtype]
        self.embeddings = Embedding(model.vocab_size, model.dim, parameters)
        self.rope = Rope(model, parameters)
        block = BLOCKS[model.architecture]
        self.layers = nn.ModuleList(block(model, parameters) for _ in range(model.n_layers))
        # A mooshak layer ends in a norm of its own.
        llama, tied = model.architecture == "llama", model.tie_embeddings
        self.norm = RMSNorm(model.dim, model.norm_eps, parameters) if llama else None
        self.lm_head = None if tied else Linear(model.dim, model.vocab_size, parameters)

    @property
    def head_VD(self) -> Tensor:
        """The output head: the embedding where both are tied."""
        return self.embeddings.weight if self.lm_head is None else self.lm_head.weight

    def hidden_states(
        self,
        tokens_BT: Tensor,
        positions_BT: Tensor | None = None,
        caches: list[KVCache] | None = None,
        segments_BT: Tensor | None = None,
    ) -> Tensor:
        """Return the final hidden states, [B, T, D].

        `segments_BT` separates the documents of packed rows (see `Positions`), for training: a
        cache ignores it. `positions_BT` is then the place of each token in its document.
        """
        if positions_BT is None:
            positions_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
            positions_BT = positions_T.expand(tokens_BT.shape)
        x_BTD = self.embeddings(tokens_BT).to(COMPUTE_DTYPE[self.dtype])
        positions = self.rope.lookup(positions_BT)._replace(segments_BT=segments_BT)
        if caches is not None and caches[0].written > 0:
            n_slots = caches[0].bound(tokens_BT.shape[1])
            seen_BTS = causal_mask(positions_BT, n_slots, self.config.sliding_window)
            mask_BTS = torch.where(seen_BTS, 0.0, -torch.inf).to(x_BTD.dtype)
            positions = positions._replace(mask_B1TS=mask_BTS.unsqueeze(1))
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
        """Return logits [B, T, V], in at least float32; arguments as of `hidden_states`."""
        return self.logits(self.hidden_states(tokens_BT, positions_BT, caches, segments_BT))

    def logits(self, x_BTD: Tensor) -> Tensor:
        """The output head on what `hidden_states` gives, [B, T, V], in at least float32."""
        if self.lm_head is None:
            logits_BTV = linear(x_BTD, self.head_VD.to(x_BTD.dtype))
        else:
            logits_BTV = self.lm_head(x_BTD)
        return logits_BTV.to(PARAM_DTYPE[self.dtype])


def make_caches(model: Model, batch: int, length: int) -> list[KVCache]:
    """Empty key/value caches of all layers, for positions 0 .. length - 1."""
    like = model.embeddings.weight.to(COMPUTE_DTYPE[model.dtype])[:0]
    return [KVCache(model.config, batch, length, like) for _ in range(model.config.n_layers)]
