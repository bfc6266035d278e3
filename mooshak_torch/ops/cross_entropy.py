"""Cross entropy that never holds the logits of more than a chunk of positions.

The gradients are made in the forward pass, chunk by chunk, so no logits are kept or made twice.
Shapes: B batch, T time, C positions of a chunk, N = B x C tokens, D model width, V vocabulary.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mooshak_torch.ops.matmul import matmul

IGNORE_INDEX = -100
ROWS = 2048
"""Rows of the head whose gradient of a chunk is made at once."""


class FusedLinearCrossEntropy(nn.Module):
    """Output head and cross entropy in one module: the head is gathered for it under FSDP."""

    def __init__(self, head: nn.Module, chunk: int):
        super().__init__()
        self.head, self.chunk = head, chunk

    def forward(self, x_BTD: Tensor, labels_BT: Tensor) -> Tensor:
        """Summed cross entropy, in nats, of the head's logits of hidden states."""
        weight_VD = self.head.weight
        assert isinstance(weight_VD, Tensor)
        return cross_entropy(x_BTD, weight_VD, labels_BT, self.chunk)


def cross_entropy(x_BTD: Tensor, w_VD: Tensor, labels_BT: Tensor, chunk: int) -> Tensor:
    """Sum of -log p(label) over the tokens, in nats; labels of `IGNORE` count nothing.

    `x_BTD` are hidden states in the compute dtype and `w_VD` the output head, whose dtype (at least
    float32) is that of the softmax and of the sum. `chunk` is the number of tokens whose logits are
    in memory at once. The caller divides by the number of labels.

    Where the head is a DTensor, every process has the logits of its part of the vocabulary, and the
    gradient of `x_BTD` that they give: the processes' gradients are to be added.
    """
    group, first = None, 0
    if isinstance(w_VD, DTensor):
        group, w_VD = w_VD.device_mesh.get_group(), w_VD.to_local()
        first = dist.get_rank(group) * len(w_VD)
    step = max(1, chunk // len(x_BTD))
    return _ChunkedCrossEntropy.apply(x_BTD, w_VD, labels_BT, step, group, first)


class _ChunkedCrossEntropy(torch.autograd.Function):
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
        """`w_VD` are the rows of the head from `first` on, `group` the processes with all rows."""
        differentiate = any(ctx.needs_input_grad[:2])
        total = w_VD.new_zeros(())
        if differentiate:
            dx_BTD, dw_VD = torch.empty_like(x_BTD), torch.zeros_like(w_VD)
        narrow_VD = w_VD.to(x_BTD.dtype)
        for start in range(0, x_BTD.shape[1], step):
            here = slice(start, start + step)
            x_ND, labels_N = x_BTD[:, here].flatten(0, 1), labels_BT[:, here].flatten()
            counts_N1 = (labels_N != IGNORE_INDEX).unsqueeze(1)
            targets_N1 = labels_N.unsqueeze(1).where(counts_N1, 0) - first
            here_N1 = (targets_N1 >= 0) & (targets_N1 < len(w_VD))
            targets_N1 = targets_N1.where(here_N1, 0)
            logits_NV = matmul(x_ND, narrow_VD.T).to(w_VD.dtype)
            # Few rows at a time: PyTorch makes a copy of what it sums up.
            log_z_N1 = torch.cat([some.logsumexp(1, keepdim=True) for some in logits_NV.split(64)])
            chosen_N1 = logits_NV.gather(1, targets_N1).where(here_N1, 0)
            if group is not None:
                log_z_N1, chosen_N1 = _over_vocabulary(log_z_N1, chosen_N1, group)
            losses_N1 = log_z_N1 - chosen_N1
            total += (losses_N1 * counts_N1).sum()
            if differentiate:
                # d loss / d logits = softmax - one_hot(label).
                d_NV = logits_NV.sub_(log_z_N1).exp_()
                d_NV.scatter_add_(1, targets_N1, -here_N1.to(d_NV.dtype))
                d_NV = d_NV.mul_(counts_N1).to(x_BTD.dtype)
                dx_BTD[:, here] = matmul(d_NV, narrow_VD).unflatten(0, (len(x_BTD), -1))
                for rows in range(0, len(w_VD), ROWS):
                    part = slice(rows, rows + ROWS)
                    dw_VD[part] += matmul(d_NV[:, part].T, x_ND).to(w_VD.dtype)
        if differentiate:
            ctx.save_for_backward(dx_BTD, dw_VD)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dx_BTD, dw_VD = ctx.saved_tensors
        # In place: PyTorch refuses to go backward through it a second time.
        return dx_BTD.mul_(grads[0]), dw_VD.mul_(grads[0]), None, None, None, None


def _over_vocabulary(
    log_z_N1: Tensor, chosen_N1: Tensor, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """Log-sum-exp and chosen logit of the whole vocabulary from those of its parts."""
    parts_n2N1 = log_z_N1.new_empty(group.size(), 2, *log_z_N1.shape)
    dist.all_gather_single(parts_n2N1.flatten(0, 1), torch.stack((log_z_N1, chosen_N1)), group)
    return parts_n2N1[:, 0].logsumexp(0), parts_n2N1[:, 1].sum(0)
