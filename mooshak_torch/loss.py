"""Cross entropy that never holds the logits of more than a chunk of positions.

The gradients are made in the forward pass, chunk by chunk, so no logits are kept or made twice.
Shapes: B batch, T time, C positions of a chunk, N = B x C tokens, D model width, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORE = -100


class HeadLoss(nn.Module):
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
    """
    return _ChunkedCrossEntropy.apply(x_BTD, w_VD, labels_BT, max(1, chunk // len(x_BTD)))


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BTD: Tensor, w_VD: Tensor, labels_BT: Tensor, step: int) -> Tensor:
        differentiate = any(ctx.needs_input_grad[:2])
        total = w_VD.new_zeros(())
        if differentiate:
            dx_BTD, dw_VD = torch.empty_like(x_BTD), torch.zeros_like(w_VD)
        narrow_VD = w_VD.to(x_BTD.dtype)
        for start in range(0, x_BTD.shape[1], step):
            here = slice(start, start + step)
            x_ND, labels_N = x_BTD[:, here].flatten(0, 1), labels_BT[:, here].flatten()
            counts_N1 = (labels_N != IGNORE).unsqueeze(1)
            targets_N1 = labels_N.unsqueeze(1).where(counts_N1, 0)
            logits_NV = F.linear(x_ND, narrow_VD).to(w_VD.dtype)
            log_z_N1 = logits_NV.logsumexp(1, keepdim=True)
            losses_N1 = log_z_N1 - logits_NV.gather(1, targets_N1)
            total += (losses_N1 * counts_N1).sum()
            if differentiate:
                # d loss / d logits = softmax - one_hot(label).
                d_NV = logits_NV.sub_(log_z_N1).exp_()
                d_NV.scatter_add_(1, targets_N1, torch.full_like(losses_N1, -1.0))
                d_NV = d_NV.mul_(counts_N1).to(x_BTD.dtype)
                dx_BTD[:, here] = (d_NV @ narrow_VD).unflatten(0, (len(x_BTD), -1))
                dw_VD += (d_NV.T @ x_ND).to(w_VD.dtype)
        if differentiate:
            ctx.save_for_backward(dx_BTD, dw_VD)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        dx_BTD, dw_VD = ctx.saved_tensors
        return (dx_BTD * grads[0]).to(dx_BTD.dtype), dw_VD * grads[0], None, None
