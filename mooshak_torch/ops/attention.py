"""Scaled dot-product attention: causal, under a given mask, or within packed documents.

Mirror: mooshak_jax/ops/attention.py.
Shapes: B batch, T time, S time of the keys, H query heads, G key/value heads, K head width; t the
time of one document, N = B x T tokens.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def attention(
    q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, mask_B1TS: Tensor | None = None
) -> Tensor:
    """Return softmax(q k^T / sqrt(K)) v, [B, T, H, K]; the mask is causal unless one is given.

    Without a mask a single query sees all keys.
    """
    q, k, v = (x.transpose(1, 2) for x in (q_BTHK, k_BSGK, v_BSGK))
    grouped, causal = q.shape[1] != k.shape[1], mask_B1TS is None and q.shape[2] > 1
    out_BHTK = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask_B1TS, is_causal=causal, enable_gqa=grouped
    )
    return out_BHTK.transpose(1, 2)


def document_attention(
    q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, segments_BT: Tensor, window: int | None = None
) -> Tensor:
    """Return causal attention within each document of packed rows, [B, T, H, K].

    A document is a run of equal integers in a row of `segments_BT`. A token sees itself and the
    tokens before it in its document, at most `window` tokens altogether.
    """
    # On a CPU a call per document is faster than even the causal mask: no score is computed across
    # documents. Reading the lengths would make the host wait for an accelerator and break a
    # compiled graph: those get a boolean mask.
    if segments_BT.device.type != "cpu" or torch.compiler.is_compiling():
        mask_BTT = _document_mask(segments_BT, window)
        return attention(q_BTHK, k_BTGK, v_BTGK, mask_BTT.unsqueeze(1))
    lengths = _document_lengths(segments_BT)
    # Not by slices: the gradient of each would be as large as the batch.
    parts = (x.flatten(0, 1).split(lengths) for x in (q_BTHK, k_BTGK, v_BTGK))
    outs_1tHK = []
    for q_tHK, k_tGK, v_tGK in zip(*parts, strict=True):
        mask_11tt = None
        if window is not None and window < len(q_tHK):
            one_1t = segments_BT.new_zeros(1, len(q_tHK))
            mask_11tt = _document_mask(one_1t, window).unsqueeze(1)
        outs_1tHK.append(attention(q_tHK[None], k_tGK[None], v_tGK[None], mask_11tt))
    return torch.cat(outs_1tHK, 1).view_as(q_BTHK)


def _document_mask(segments_BT: Tensor, window: int | None = None) -> Tensor:
    """[B, T, T]: which keys each token sees."""
    index_T = torch.arange(segments_BT.shape[1], device=segments_BT.device)
    first_BT = index_T.where(_document_starts(segments_BT), 0).cummax(1).values
    if window is not None:
        first_BT = first_BT.maximum(index_T - window + 1)
    return (index_T <= index_T.unsqueeze(1)) & (index_T >= first_BT.unsqueeze(2))


def _document_starts(segments_BT: Tensor) -> Tensor:
    """[B, T]: whether a token is the first of its document."""
    first_B1 = torch.ones_like(segments_BT[:, :1], dtype=torch.bool)
    return torch.cat((first_B1, segments_BT[:, 1:] != segments_BT[:, :-1]), 1)


def _document_lengths(segments_BT: Tensor) -> list[int]:
    """Lengths of all documents, row by row."""
    if isinstance(segments_BT, FakeTensor):
        # Without values (mooshak_torch.plan): one document a row, which costs the most.
        return [segments_BT.shape[1]] * len(segments_BT)
    starts_n = _document_starts(segments_BT).flatten().nonzero().flatten()
    lengths: list[int] = starts_n.diff(append=starts_n.new_tensor([segments_BT.numel()])).tolist()
    return lengths
