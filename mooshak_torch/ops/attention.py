"""Scaled dot-product attention: causal, under a given mask, or within packed documents.

Mirror: mooshak_jax/ops/attention.py.
Shapes: B batch, T time, S time of the keys, H query heads, G key/value heads, K head width; t the
time of one document; n documents.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def attention(
    q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, mask_BTS: Tensor | None = None
) -> Tensor:
    """Return softmax(q k^T / sqrt(K)) v, [B, T, H, K], causal unless a mask is given.

    The mask is boolean (True: the query sees the key), or is added to the scores. Without a mask a
    single query sees all keys.
    """
    q, k, v = (x.transpose(1, 2) for x in (q_BTHK, k_BSGK, v_BSGK))
    grouped, causal = q.shape[1] != k.shape[1], mask_BTS is None and q.shape[2] > 1
    mask_B1TS = None if mask_BTS is None else mask_BTS.unsqueeze(1)
    out_BHTK = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask_B1TS, is_causal=causal, enable_gqa=grouped
    )
    return out_BHTK.transpose(1, 2)


def document_attention(
    q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, segments_BT: Tensor, window: int | None = None
) -> Tensor:
    """Return causal attention within each document of packed rows, [B, T, H, K].

    A document is a run of equal integers in a row of `segments_BT`. A token attends to itself and
    to earlier tokens of its document, at most `window` tokens in total. One call per document is
    faster than one causal call for the row: scores across documents are never computed.
    """
    # Reading the lengths would break the graph.
    if torch.compiler.is_compiling():
        return attention(q_BTHK, k_BTGK, v_BTGK, document_mask(segments_BT, window))
    lengths = _document_lengths(segments_BT)
    # `split`, not slices: the gradient of each slice would be as large as the batch.
    documents = (x.flatten(0, 1).split(lengths) for x in (q_BTHK, k_BTGK, v_BTGK))
    outs_1tHK = []
    for q_tHK, k_tGK, v_tGK in zip(*documents, strict=True):
        mask_1tt = None
        if window is not None and window < len(q_tHK):
            mask_1tt = document_mask(segments_BT.new_zeros(1, len(q_tHK)), window)
        outs_1tHK.append(attention(q_tHK[None], k_tGK[None], v_tGK[None], mask_1tt))
    return torch.cat(outs_1tHK, 1).view_as(q_BTHK)


def needs_document_mask(segments_BT: Tensor) -> bool:
    """Return True where `document_attention` should be `attention` under a mask for all layers.

    On an accelerator, reading the lengths of the documents would make the host wait. Fake tensors,
    with which mooshak_torch.plan plans for GPUs, have no lengths.
    """
    return segments_BT.device.type != "cpu" or isinstance(segments_BT, FakeTensor)


def document_mask(segments_BT: Tensor, window: int | None = None) -> Tensor:
    """Return the mask of `document_attention` [B, T, T], True where a query sees a key."""
    index_T = torch.arange(segments_BT.shape[1], device=segments_BT.device)
    first_BT = index_T.where(_document_starts(segments_BT), 0).cummax(1).values
    if window is not None:
        first_BT = first_BT.maximum(index_T - window + 1)
    return (index_T <= index_T.unsqueeze(1)) & (index_T >= first_BT.unsqueeze(2))


def _document_starts(segments_BT: Tensor) -> Tensor:
    """Return a mask [B, T], True for the first token of each document."""
    first_B1 = torch.ones_like(segments_BT[:, :1], dtype=torch.bool)
    return torch.cat((first_B1, segments_BT[:, 1:] != segments_BT[:, :-1]), 1)


def _document_lengths(segments_BT: Tensor) -> list[int]:
    """Return the length of every document, row by row."""
    starts_n = _document_starts(segments_BT).flatten().nonzero().flatten()
    lengths: list[int] = starts_n.diff(append=starts_n.new_tensor([segments_BT.numel()])).tolist()
    return lengths
