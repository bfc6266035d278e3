"""Elementwise operations of a layer that save little for the backward pass.

Mirror: mooshak_jax/ops/activations.py. Plain autograd would save a norm's input twice, silu(gate),
and matrix inputs that a norm or a gate can recompute (docs/performance.md has the memory saved).
Shapes: B batch, T time, H heads, K head width; D the last axis, over which `rms_norm` normalizes;
gate and up have the same shape.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor

VECTORS = 64
"""Elements that a loop of a CPU computes at once: two vectors of bfloat16, AVX-512."""
GRAIN = 32768
"""Elements that PyTorch computes in one thread, at least."""


def rms_norm(x: Tensor, gain_D: Tensor, eps: float) -> Tensor:
    """Return x / rms(x) * gain (arXiv:1910.07467), shape and dtype of x.

    Computed in the dtype of the gain and rounded once.
    """
    if torch.is_grad_enabled():
        return _RMSNorm.apply(x, gain_D, eps)
    return F.rms_norm(x.to(gain_D.dtype), gain_D.shape, gain_D, eps).to(x.dtype)


def rotate(x_BTHK: Tensor, cos_BT1K: Tensor, sin_BT1K: Tensor) -> Tensor:
    """Return x rotated by its position's angles (arXiv:2104.09864), shape and dtype of x.

    x cos + swap(x) sin, where swap exchanges the halves of the last axis and the first half of
    `sin_BT1K` is negated. Computed in the dtype of the tables.
    """
    if torch.is_grad_enabled():
        return _Rotate.apply(x_BTHK, cos_BT1K, sin_BT1K)
    return _rotate(x_BTHK, cos_BT1K, sin_BT1K)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up (arXiv:2002.05202), shape and dtype of gate."""
    if torch.is_grad_enabled():
        return _SwiGLU.apply(gate, up)
    return (_silu_by_row(gate) if gate.shape[1:-1] == (1,) else F.silu(gate)).mul_(up)


def _silu_by_row(x_B1D: Tensor) -> Tensor:
    """Return silu of one token in each row; the bits do not depend on the row.

    A CPU computes the last elements of a tensor, and of a thread's share, with another exp than
    those that fill a vector register: in one call, the rows would differ.
    """
    n_rows = len(x_B1D)
    whole = x_B1D.numel() % VECTORS == 0 and x_B1D.numel() <= GRAIN
    if n_rows == 1 or whole or x_B1D.device.type != "cpu" or torch.compiler.is_compiling():
        return F.silu(x_B1D)
    result_B1D = torch.empty_like(x_B1D)
    for x_1D, result_1D in zip(x_B1D, result_B1D, strict=True):
        torch.ops.aten.silu.out(x_1D, out=result_1D)
    return result_B1D


def recompute_in_backward(
    result: Tensor, make: Callable[[], Tensor], when: bool = True
) -> AbstractContextManager:
    """Recompute `result` in the backward pass of the operations inside the block.

    Autograd saves `make` and calls it instead of saving `result`. Not for a block under
    `torch.utils.checkpoint` or `torch.compile`, which decide themselves what to recompute.
    """
    if not (when and torch.is_grad_enabled()):
        return nullcontext()
    storage = result.untyped_storage()._cdata

    def pack(saved: Tensor) -> Any:
        local = saved.to_local() if isinstance(saved, DTensor) else saved
        if local.untyped_storage()._cdata != storage:
            # Detached: a result that its own operation saves would form a reference cycle.
            return saved if saved.is_leaf else saved.detach()
        shape = local.shape
        if not isinstance(saved, DTensor):
            return lambda: make().view(shape)
        mesh, placements = saved.device_mesh, saved.placements
        return lambda: DTensor.from_local(make().view(shape), mesh, placements)

    def unpack(packed: Any) -> Tensor:
        return packed if isinstance(packed, Tensor) else packed()

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
        mean = product.mul_(gain_D).mean(-1, keepdim=True)
        dx = (dy * gain_D).sub_(normed.mul_(mean)).mul_(scale)
        return dx.to(x.dtype), dgain_D, None


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BTHK: Tensor, cos_BT1K: Tensor, sin_BT1K: Tensor) -> Tensor:
        ctx.save_for_backward(cos_BT1K, sin_BT1K)
        return _rotate(x_BTHK, cos_BT1K, sin_BT1K)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos_BT1K, sin_BT1K = ctx.saved_tensors
        return _rotate(grads[0], cos_BT1K, -sin_BT1K), None, None


def _rotate(x_BTHK: Tensor, cos_BT1K: Tensor, sin_BT1K: Tensor) -> Tensor:
    wide_BTHK = x_BTHK.to(cos_BT1K.dtype)
    swapped_BTHK = wide_BTHK.roll(wide_BTHK.shape[-1] // 2, -1)
    return swapped_BTHK.mul_(sin_BT1K).addcmul_(wide_BTHK, cos_BT1K).to(x_BTHK.dtype)


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
