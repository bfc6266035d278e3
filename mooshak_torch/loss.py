"""Cross entropy that never holds the logits of more than a chunk of tokens.

The gradients are made in the forward pass, chunk by chunk, so no logits are kept or made twice.
Shapes: N tokens, C tokens of a chunk, D model width, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100


def cross_entropy(x_ND: Tensor, w_VD: Tensor, labels_N: Tensor, chunk: int) -> Tensor:
    """Sum of -log p(label) over the tokens, in nats; labels of `IGNORE` count nothing.

    `x_ND` are hidden states in the compute dtype and `w_VD` the output head, whose dtype (at least
    float32) is that of the softmax and of the sum. The caller divides by the number of labels.
    """
    return _ChunkedCrossEntropy.apply(x_ND, w_VD, labels_N, chunk)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, w_VD: Tensor, labels_N: Tensor, chunk: int
    ) -> Tensor:
        differentiate = any(ctx.needs_input_grad[:2])
        total = w_VD.new_zeros(())
        dx_ND = torch.zeros_like(x_ND) if differentiate else None
        dw_VD = torch.zeros_like(w_VD) if differentiate else None
        narrow_VD = w_VD.to(x_ND.dtype)
        for start in range(0, len(x_ND), chunk):
            x_CD, labels_C = x_ND[start : start + chunk], labels_N[start : start + chunk]
            counts_C = labels_C != IGNORE
            targets_C1 = labels_C.where(counts_C, 0).unsqueeze(1)
            logits_CV = F.linear(x_CD, narrow_VD).to(w_VD.dtype)
            log_z_C1 = logits_CV.logsumexp(1, keepdim=True)
            losses_C1 = log_z_C1 - logits_CV.gather(1, targets_C1)
            total += (losses_C1.squeeze(1) * counts_C).sum()
            if dx_ND is not None and dw_VD is not None:
                # d loss / d logits = softmax - one_hot(label).
                d_CV = logits_CV.sub_(log_z_C1).exp_()
                d_CV.scatter_add_(1, targets_C1, torch.full_like(losses_C1, -1.0))
                d_CV = d_CV.mul_(counts_C.unsqueeze(1)).to(x_ND.dtype)
                dx_ND[start : start + chunk] = d_CV @ narrow_VD
                dw_VD += (d_CV.T @ x_CD).to(w_VD.dtype)
        if differentiate:
            ctx.save_for_backward(dx_ND, dw_VD)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        dx_ND, dw_VD = ctx.saved_tensors
        return (dx_ND * grads[0]).to(dx_ND.dtype), dw_VD * grads[0], None, None
