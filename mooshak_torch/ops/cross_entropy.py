"""Cross entropy and log-probabilities per token, with the logits of one chunk of tokens in memory.

`cross_entropy` computes its gradients in the forward pass, from the same logits. The gradients of
`token_log_probs` wait for those of its result: the backward pass recomputes the logits.
Shapes: B batch, T time, C positions of a chunk, N = B x C tokens, D model width, V vocabulary, or
this process's rows of a head that is sharded by vocabulary.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor

from mooshak.data.packing import IGNORE_INDEX
from mooshak_torch.ops.matmul import matmul

HEAD_ROWS = 2048
"""Rows of the head whose gradient from a chunk is computed at once."""


class FusedLinearCrossEntropy(nn.Module):
    """The output head and the loss in one module: FSDP gathers the head for its forward pass."""

    def __init__(self, head: nn.Module, chunk: int):
        super().__init__()
        self.head, self.chunk = head, chunk

    def forward(self, x_BTD: Tensor, labels_BT: Tensor, per_token: bool = False) -> Tensor:
        """Return the `cross_entropy`, or the `token_log_probs` [B, T], of the labels in nats."""
        weight_VD = self.head.weight
        assert isinstance(weight_VD, Tensor)
        compute = token_log_probs if per_token else cross_entropy
        return compute(x_BTD, weight_VD, labels_BT, self.chunk)


def cross_entropy(x_BTD: Tensor, w_VD: Tensor, labels_BT: Tensor, chunk: int) -> Tensor:
    """Return the sum of -log p(label) over the tokens, in nats; `IGNORE_INDEX` does not count.

    `x_BTD` are hidden states in the compute dtype and `w_VD` the output head, whose dtype (at least
    float32) is that of the softmax and of the sum. `chunk` is the number of tokens whose logits are
    in memory at once. The caller divides by the number of labels.

    Where the head is a DTensor, every process has the logits of its part of the vocabulary, and the
    gradient of `x_BTD` that they give: the processes' gradients are to be added.
    """
    w_VD, group, first = _local_head(w_VD)
    step = max(1, chunk // len(x_BTD))
    return _CrossEntropy.apply(x_BTD, w_VD, labels_BT, step, group, first)


def token_log_probs(x_BTD: Tensor, w_VD: Tensor, labels_BT: Tensor, chunk: int) -> Tensor:
    """Return log p(label) [B, T] of every token in nats; 0 where the label is `IGNORE_INDEX`.

    The arguments are those of `cross_entropy`, whose value is the sum with its sign changed; so are
    the result's dtype and the gradients of a head that is a DTensor. Differentiable once, for any
    gradient [B, T] of the result.
    """
    w_VD, group, first = _local_head(w_VD)
    step = max(1, chunk // len(x_BTD))
    return _TokenLogProbs.apply(x_BTD, w_VD, labels_BT, step, group, first)


def _local_head(w_VD: Tensor) -> tuple[Tensor, dist.ProcessGroup | None, int]:
    """Return this process's rows, the processes that have all rows, and the first row's number."""
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
    ) -> Tensor:
        differentiate = any(ctx.needs_input_grad[:2])
        total = w_VD.new_zeros(())
        if differentiate:
            dx_BTD, dw_VD = torch.empty_like(x_BTD), torch.zeros_like(w_VD)
        narrow_VD = w_VD.to(x_BTD.dtype)
        for chunk in _chunks(x_BTD, w_VD, labels_BT, step, first):
            logits_NV = matmul(chunk.x_ND, narrow_VD.T).to(w_VD.dtype)
            log_probs_N1, log_z_N1 = _log_probs(logits_NV, chunk, group)
            total -= log_probs_N1.sum()
            if differentiate:
                d_NV = _logit_gradients(logits_NV, log_z_N1, chunk).mul_(chunk.is_label_N1)
                _add_gradients(d_NV, narrow_VD, chunk, dx_BTD, dw_VD)
                del d_NV
            del logits_NV  # Before the next chunk's are computed.
        if differentiate:
            ctx.save_for_backward(dx_BTD, dw_VD)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dx_BTD, dw_VD = ctx.saved_tensors
        # In place: PyTorch refuses to go backward through it a second time.
        return dx_BTD.mul_(grads[0]), dw_VD.mul_(grads[0]), None, None, None, None


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
    ) -> Tensor:
        log_probs_BT, log_z_BT = w_VD.new_empty(2, *labels_BT.shape)
        narrow_VD = w_VD.to(x_BTD.dtype)
        for chunk in _chunks(x_BTD, w_VD, labels_BT, step, first):
            logits_NV = matmul(chunk.x_ND, narrow_VD.T).to(w_VD.dtype)
            log_probs_N1, log_z_N1 = _log_probs(logits_NV, chunk, group)
            log_probs_BT[:, chunk.where] = log_probs_N1.view(len(x_BTD), -1)
            log_z_BT[:, chunk.where] = log_z_N1.view(len(x_BTD), -1)
            del logits_NV  # Before the next chunk's are computed.
        ctx.save_for_backward(x_BTD, w_VD, labels_BT, log_z_BT)
        ctx.step, ctx.first = step, first
        return log_probs_BT

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_BTD, w_VD, labels_BT, log_z_BT = ctx.saved_tensors
        dx_BTD, dw_VD = torch.empty_like(x_BTD), torch.zeros_like(w_VD)
        narrow_VD = w_VD.to(x_BTD.dtype)
        for chunk in _chunks(x_BTD, w_VD, labels_BT, ctx.step, ctx.first):
            log_z_N1, grad_N1 = (a[:, chunk.where].reshape(-1, 1) for a in (log_z_BT, grads[0]))
            logits_NV = matmul(chunk.x_ND, narrow_VD.T).to(w_VD.dtype)
            d_NV = _logit_gradients(logits_NV, log_z_N1, chunk)
            d_NV.mul_(-grad_N1.where(chunk.is_label_N1, 0))
            _add_gradients(d_NV, narrow_VD, chunk, dx_BTD, dw_VD)
            del logits_NV, d_NV  # Before the next chunk's are computed.
        return dx_BTD, dw_VD, None, None, None, None


class _Chunk(NamedTuple):
    """Tokens whose logits are computed at once."""

    where: slice
    """Their positions."""
    x_ND: Tensor
    is_label_N1: Tensor
    """False for `IGNORE_INDEX`."""
    rows_N1: Tensor
    """The labels as rows of this process's part of the head, 0 where `is_here_N1` is False."""
    is_here_N1: Tensor


def _chunks(
    x_BTD: Tensor, w_VD: Tensor, labels_BT: Tensor, step: int, first: int
) -> Iterator[_Chunk]:
    """Yield chunks of `step` positions; `w_VD` are the rows of the head from `first` on."""
    for start in range(0, x_BTD.shape[1], step):
        where = slice(start, start + step)
        labels_N1 = labels_BT[:, where].reshape(-1, 1)
        is_label_N1 = labels_N1 != IGNORE_INDEX
        rows_N1 = labels_N1.where(is_label_N1, 0) - first
        is_here_N1 = (rows_N1 >= 0) & (rows_N1 < len(w_VD))
        rows_N1 = rows_N1.where(is_here_N1, 0)
        yield _Chunk(where, x_BTD[:, where].flatten(0, 1), is_label_N1, rows_N1, is_here_N1)


def _log_probs(
    logits_NV: Tensor, chunk: _Chunk, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """Return the labels' log-probabilities, and log-sum-exp of the logits, [N, 1] each."""
    # Few rows at a time: PyTorch makes a copy of what it sums up.
    log_z_N1 = torch.cat([rows.logsumexp(1, keepdim=True) for rows in logits_NV.split(64)])
    chosen_N1 = logits_NV.gather(1, chunk.rows_N1).where(chunk.is_here_N1, 0)
    if group is not None:
        log_z_N1, chosen_N1 = _over_vocabulary(log_z_N1, chosen_N1, group)
    return (chosen_N1 - log_z_N1).where(chunk.is_label_N1, 0), log_z_N1


def _over_vocabulary(
    log_z_N1: Tensor, chosen_N1: Tensor, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """Return log-sum-exp and chosen logit of the full vocabulary from those of its parts."""
    parts_n2N1 = log_z_N1.new_empty(group.size(), 2, *log_z_N1.shape)
    dist.all_gather_single(parts_n2N1.flatten(0, 1), torch.stack((log_z_N1, chosen_N1)), group)
    return parts_n2N1[:, 0].logsumexp(0), parts_n2N1[:, 1].sum(0)


def _logit_gradients(logits_NV: Tensor, log_z_N1: Tensor, chunk: _Chunk) -> Tensor:
    """Return d -log p(label) / d logits = softmax - one_hot(label), in the logits' memory."""
    d_NV = logits_NV.sub_(log_z_N1).exp_()
    return d_NV.scatter_add_(1, chunk.rows_N1, -chunk.is_here_N1.to(d_NV.dtype))


def _add_gradients(
    d_NV: Tensor, narrow_VD: Tensor, chunk: _Chunk, dx_BTD: Tensor, dw_VD: Tensor
) -> None:
    """Set the chunk's positions of `dx_BTD`, and add to `dw_VD`, from gradients of the logits."""
    d_NV = d_NV.to(narrow_VD.dtype)
    dx_BTD[:, chunk.where] = matmul(d_NV, narrow_VD).unflatten(0, (len(dx_BTD), -1))
    for start in range(0, len(dw_VD), HEAD_ROWS):
        rows = slice(start, start + HEAD_ROWS)
        dw_VD[rows] += matmul(d_NV[:, rows].T, chunk.x_ND).to(dw_VD.dtype)
