"""Cross entropy and log-probabilities per token, with the logits of one chunk of tokens in memory.

Mirror: mooshak_jax/ops/cross_entropy.py. `cross_entropy` computes its gradients in the forward
pass, from the same logits. The gradients of `token_log_probs` depend on those of its result: its
backward pass recomputes the logits.
Shapes: B batch, T time, C positions of a chunk, N = B x C tokens, D model width, V vocabulary (with
a head sharded by vocabulary, this process's rows).
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor

from mooshak.data.packing import IGNORE_INDEX
from mooshak_torch.lora import table_of
from mooshak_torch.ops.matmul import matmul

HEAD_ROWS = 2048
"""Rows of the head whose gradient from a chunk is computed in one matrix product."""


class FusedLinearCrossEntropy(nn.Module):
    """Output head and loss in one module, so that FSDP gathers the head for the forward pass."""

    def __init__(self, head: nn.Module, chunk: int):
        super().__init__()
        self.head, self.chunk = head, chunk

    def forward(
        self,
        x_BTD: Tensor,
        labels_BT: Tensor,
        per_token: bool = False,
        temperature: float = 1.0,
    ) -> Tensor:
        """Return `cross_entropy` (a scalar), or `token_log_probs` [B, T], of the labels."""
        weight_VD = table_of(self.head)
        if per_token:
            return token_log_probs(x_BTD, weight_VD, labels_BT, self.chunk, temperature)
        return cross_entropy(x_BTD, weight_VD, labels_BT, self.chunk)


def cross_entropy(x_BTD: Tensor, w_VD: Tensor, labels_BT: Tensor, chunk: int) -> Tensor:
    """Return the sum of -log p(label) over the tokens, in nats, without the labels `IGNORE_INDEX`.

    `x_BTD` are hidden states in the compute dtype and `w_VD` the output head, whose dtype (at least
    float32) is that of the softmax and of the sum. `chunk` is the number of tokens whose logits are
    in memory at once. The caller divides by the number of labels.

    With a DTensor head each process has the logits of its rows of the vocabulary and the gradient
    of `x_BTD` from these logits: the caller sums the gradients over the processes.
    """
    w_VD, group, first = _local_head(w_VD)
    step = max(1, chunk // len(x_BTD))
    # Inside the function gradients are off, and what needs them is not known under `no_grad`.
    differentiate = torch.is_grad_enabled() and (x_BTD.requires_grad or w_VD.requires_grad)
    return _CrossEntropy.apply(x_BTD, w_VD, labels_BT, step, group, first, differentiate)


def token_log_probs(
    x_BTD: Tensor, w_VD: Tensor, labels_BT: Tensor, chunk: int, temperature: float = 1.0
) -> Tensor:
    """Return log p(label) [B, T] of every token in nats; 0 where the label is `IGNORE_INDEX`.

    p is the softmax of the logits divided by `temperature`. Other arguments, dtype of the result
    and the gradients with a DTensor head are as in `cross_entropy`, whose value is the negated sum
    at temperature 1. Differentiable once, for any gradient [B, T] of the result.
    """
    w_VD, group, first = _local_head(w_VD)
    step = max(1, chunk // len(x_BTD))
    return _TokenLogProbs.apply(x_BTD, w_VD, labels_BT, step, group, first, temperature)


def _local_head(w_VD: Tensor) -> tuple[Tensor, dist.ProcessGroup | None, int]:
    """Return this process's rows, the group that holds all rows, and the index of the first row."""
    if not isinstance(w_VD, DTensor):
        return w_VD, None, 0
    group, w_VD = w_VD.device_mesh.get_group(), w_VD.to_local()
    return w_VD, group, dist.get_rank(group) * len(w_VD)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_BTD: Tensor,
        w_VD: Tensor,
        labels_BT: Tensor,
        step: int,
        group: dist.ProcessGroup | None,
        first: int,
        differentiate: bool,
    ) -> Tensor:
        total = w_VD.new_zeros(())
        if differentiate:
            dx_BTD = torch.empty_like(x_BTD)
            dw_VD = torch.zeros_like(w_VD) if ctx.needs_input_grad[1] else None
        narrow_VD = w_VD.to(x_BTD.dtype)
        for chunk in _chunks(x_BTD, w_VD, labels_BT, step, first):
            logits_NV = matmul(chunk.x_ND, narrow_VD.T).to(w_VD.dtype)
            log_probs_N1, log_z_N1 = _log_probs(logits_NV, chunk, group)
            total -= log_probs_N1.sum()
            if differentiate:
                d_NV = _logit_gradients(logits_NV, log_z_N1, chunk).mul_(chunk.is_label_N1)
                _add_gradients(d_NV, narrow_VD, chunk, dx_BTD, dw_VD)
                del d_NV
            del logits_NV  # Free it before the next chunk's logits.
        if differentiate:
            ctx.save_for_backward(dx_BTD, dw_VD)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dx_BTD, dw_VD = ctx.saved_tensors
        # In place: PyTorch raises an error on a second backward pass through this node.
        dw_VD = None if dw_VD is None else dw_VD.mul_(grads[0])
        return dx_BTD.mul_(grads[0]), dw_VD, *[None] * 5


class _TokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_BTD: Tensor,
        w_VD: Tensor,
        labels_BT: Tensor,
        step: int,
        group: dist.ProcessGroup | None,
        first: int,
        temperature: float,
    ) -> Tensor:
        log_probs_BT, log_z_BT = w_VD.new_empty(2, *labels_BT.shape)
        narrow_VD = w_VD.to(x_BTD.dtype)
        for chunk in _chunks(x_BTD, w_VD, labels_BT, step, first):
            logits_NV = _logits(chunk, narrow_VD, w_VD.dtype, temperature)
            log_probs_N1, log_z_N1 = _log_probs(logits_NV, chunk, group)
            log_probs_BT[:, chunk.positions] = log_probs_N1.view(len(x_BTD), -1)
            log_z_BT[:, chunk.positions] = log_z_N1.view(len(x_BTD), -1)
            del logits_NV  # Free it before the next chunk's logits.
        ctx.save_for_backward(x_BTD, w_VD, labels_BT, log_z_BT)
        ctx.step, ctx.first, ctx.temperature = step, first, temperature
        return log_probs_BT

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_BTD, w_VD, labels_BT, log_z_BT = ctx.saved_tensors
        dx_BTD = torch.empty_like(x_BTD)
        dw_VD = torch.zeros_like(w_VD) if ctx.needs_input_grad[1] else None
        narrow_VD = w_VD.to(x_BTD.dtype)
        for chunk in _chunks(x_BTD, w_VD, labels_BT, ctx.step, ctx.first):
            log_z_N1, grad_N1 = (a[:, chunk.positions].reshape(-1, 1) for a in (log_z_BT, grads[0]))
            logits_NV = _logits(chunk, narrow_VD, w_VD.dtype, ctx.temperature)
            d_NV = _logit_gradients(logits_NV, log_z_N1, chunk)
            d_NV.mul_(-grad_N1.where(chunk.is_label_N1, 0) / ctx.temperature)
            _add_gradients(d_NV, narrow_VD, chunk, dx_BTD, dw_VD)
            del logits_NV, d_NV  # Free it before the next chunk's logits.
        return dx_BTD, dw_VD, *[None] * 5


class _Chunk(NamedTuple):
    """Tokens whose logits are computed at once."""

    positions: slice
    """Slice of the time axis."""
    x_ND: Tensor
    is_label_N1: Tensor
    """False for `IGNORE_INDEX`."""
    rows_N1: Tensor
    """The labels as row indices of this process's part of the head, 0 unless `is_here_N1`."""
    is_here_N1: Tensor


def _chunks(
    x_BTD: Tensor, w_VD: Tensor, labels_BT: Tensor, step: int, first: int
) -> Iterator[_Chunk]:
    """Yield chunks of `step` positions; `first` is the index of the first row of `w_VD`."""
    for start in range(0, x_BTD.shape[1], step):
        positions = slice(start, start + step)
        labels_N1 = labels_BT[:, positions].reshape(-1, 1)
        is_label_N1 = labels_N1 != IGNORE_INDEX
        rows_N1 = labels_N1.where(is_label_N1, 0) - first
        is_here_N1 = (rows_N1 >= 0) & (rows_N1 < len(w_VD))
        rows_N1 = rows_N1.where(is_here_N1, 0)
        x_ND = x_BTD[:, positions].flatten(0, 1)
        yield _Chunk(positions, x_ND, is_label_N1, rows_N1, is_here_N1)


def _logits(chunk: _Chunk, narrow_VD: Tensor, dtype: torch.dtype, temperature: float) -> Tensor:
    """Return the logits of a chunk, divided by the temperature."""
    logits_NV = matmul(chunk.x_ND, narrow_VD.T).to(dtype)
    return logits_NV if temperature == 1 else logits_NV.div_(temperature)


def _log_probs(
    logits_NV: Tensor, chunk: _Chunk, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """Return the labels' log-probabilities and the log-sum-exp of the logits, [N, 1] each."""
    # 64 rows at a time: `logsumexp` makes a copy of its input.
    log_z_N1 = torch.cat([rows.logsumexp(1, keepdim=True) for rows in logits_NV.split(64)])
    label_N1 = logits_NV.gather(1, chunk.rows_N1).where(chunk.is_here_N1, 0)
    if group is not None:
        log_z_N1, label_N1 = _over_vocabulary(log_z_N1, label_N1, group)
    return (label_N1 - log_z_N1).where(chunk.is_label_N1, 0), log_z_N1


# Renamed in torch 2.13.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def _over_vocabulary(
    log_z_N1: Tensor, label_N1: Tensor, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """Return log-sum-exp and label's logit over the full vocabulary, from those of its shards."""
    parts_n2N1 = log_z_N1.new_empty(group.size(), 2, *log_z_N1.shape)
    _all_gather(parts_n2N1.flatten(0, 1), torch.stack((log_z_N1, label_N1)), group)
    return parts_n2N1[:, 0].logsumexp(0), parts_n2N1[:, 1].sum(0)


def _logit_gradients(logits_NV: Tensor, log_z_N1: Tensor, chunk: _Chunk) -> Tensor:
    """Return d -log p(label) / d logits = softmax - one_hot(label), overwriting the logits."""
    d_NV = logits_NV.sub_(log_z_N1).exp_()
    return d_NV.scatter_add_(1, chunk.rows_N1, -chunk.is_here_N1.to(d_NV.dtype))


def _add_gradients(
    d_NV: Tensor, narrow_VD: Tensor, chunk: _Chunk, dx_BTD: Tensor, dw_VD: Tensor | None
) -> None:
    """Set the chunk's part of `dx_BTD` and add to `dw_VD`, from the gradients of the logits.

    `dw_VD` is None for a frozen head.
    """
    d_NV = d_NV.to(narrow_VD.dtype)
    dx_BTD[:, chunk.positions] = matmul(d_NV, narrow_VD).unflatten(0, (len(dx_BTD), -1))
    if dw_VD is None:
        return
    for start in range(0, len(dw_VD), HEAD_ROWS):
        rows = slice(start, start + HEAD_ROWS)
        dw_VD[rows] += matmul(d_NV[:, rows].T, chunk.x_ND).to(dw_VD.dtype)
