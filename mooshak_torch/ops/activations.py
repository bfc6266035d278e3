"""The elementwise parts of a layer, with no more kept for the backward pass than it needs.

Autograd by itself would keep a norm's input twice, silu of the gate, and the inputs of matrices
that a norm or a gate gives again (docs/performance.md has what that saves).
Shapes: B batch, T time, H heads, K head width; D the last of any, which is normed; gate and up have
the same shape.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor


def rms_norm(x: Tensor, gain_D: Tensor, eps: float) -> Tensor:
    """x / rms(x) * gain (arXiv:1910.07467), in the dtype of the gain, cast once to that of x."""
    if torch.is_grad_enabled():
        return _RMSNorm.apply(x, gain_D, eps)
    return F.rms_norm(x.to(gain_D.dtype), gain_D.shape, gain_D, eps).to(x.dtype)


def rotate(x_BTHK: Tensor, cos_BT1K: Tensor, sin_BT1K: Tensor) -> Tensor:
    """x cos + (x with its halves exchanged) sin, in the dtype of the tables (arXiv:2104.09864).

    The first half of `sin_BT1K` is negative.
    """
    if torch.is_grad_enabled():
        return _Rotation.apply(x_BTHK, cos_BT1K, sin_BT1K)
    return _rotated(x_BTHK, cos_BT1K, sin_BT1K)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (arXiv:2002.05202)."""
    return _SwiGLU.apply(gate, up) if torch.is_grad_enabled() else F.silu(gate).mul_(up)


def recompute_in_backward(
    result: Tensor, make: Callable[[], Tensor], when: bool = True
) -> AbstractContextManager:
    """Inside the block autograd keeps `make` instead of `result`, which it gives again.

    Not for a block that something else decides about: `torch.utils.checkpoint`, `torch.compile`.
    """
    if not (when and torch.is_grad_enabled()):
        return nullcontext()
    storage = result.untyped_storage()._cdata

    def pack(kept: Tensor) -> Any:
        local = kept.to_local() if isinstance(kept, DTensor) else kept
        if local.untyped_storage()._cdata != storage:
            # What an operation keeps of its own result must not keep the operation.
            return kept if kept.is_leaf else kept.detach()
        shape = local.shape
        if not isinstance(kept, DTensor):
            return lambda: make().view(shape)
        mesh, placements = kept.device_mesh, kept.placements
        return lambda: DTensor.from_local(make().view(shape), mesh, placements)

    def unpack(kept: Any) -> Tensor:
        return kept if isinstance(kept, Tensor) else kept()

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gain_D: Tensor, eps: float) -> Tensor:
        wide = x.to(gain_D.dtype)
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, gain_D, scale)
        return (wide * scale).mul_(gain_D).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, gain_D, scale = ctx.saved_tensors
        dy, normed = grads[0].to(gain_D.dtype), x.to(gain_D.dtype) * scale
        product = dy * normed
        dgain_D = product.flatten(0, -2).sum(0)
        along = product.mul_(gain_D).mean(-1, keepdim=True)
        dx = (dy * gain_D).sub_(normed.mul_(along)).mul_(scale)
        return dx.to(x.dtype), dgain_D, None


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BTHK: Tensor, cos_BT1K: Tensor, sin_BT1K: Tensor) -> Tensor:
        ctx.save_for_backward(cos_BT1K, sin_BT1K)
        return _rotated(x_BTHK, cos_BT1K, sin_BT1K)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos_BT1K, sin_BT1K = ctx.saved_tensors
        return _rotated(grads[0], cos_BT1K, -sin_BT1K), None, None


def _rotated(x_BTHK: Tensor, cos_BT1K: Tensor, sin_BT1K: Tensor) -> Tensor:
    wide_BTHK = x_BTHK.to(cos_BT1K.dtype)
    exchanged_BTHK = wide_BTHK.roll(wide_BTHK.shape[-1] // 2, -1)
    return exchanged_BTHK.mul_(sin_BT1K).addcmul_(wide_BTHK, cos_BT1K).to(x_BTHK.dtype)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        dup = F.silu(gate).mul_(grads[0])
        dgate: Tensor = torch.ops.aten.silu_backward(grads[0] * up, gate)
        return dgate, dup
