"""Matrix products of the model. In float32 on AMD's processors they are oneDNN's.

PyTorch comes with two libraries for them and takes MKL, which leaves the AVX-512 units of
processors unused that are not Intel's: oneDNN is twice as fast there. On Intel's processors MKL is
the faster one (docs/performance.md). Both sum in float32.
Shapes: N rows, I width that is summed over, O width that comes out.
"""

import copy
import os
from collections.abc import Iterable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

M = TypeVar("M", bound=nn.Module)


def linear(x: Tensor, w_OI: Tensor) -> Tensor:
    """x w^T, [..., O], of x [..., I] in the same dtype."""
    if not _by_onednn(x, w_OI):
        return F.linear(x, w_OI)
    return _Linear.apply(x, w_OI) if torch.is_grad_enabled() else _onednn(x, w_OI)


def matmul(a_NI: Tensor, b_IO: Tensor) -> Tensor:
    """a b. Either may be a transposed view. Not differentiable."""
    if _by_onednn(a_NI, b_IO):
        return _onednn(a_NI, b_IO.T)
    return a_NI @ b_IO


MIN_PACKED_ROWS, MIN_PACKED_TOKENS = 4, 32
"""Sequences and new tokens from which packing pays (docs/performance.md)."""
MAX_PACKED_BYTES = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4
"""Larger weights are not packed: a quarter of the machine's memory."""


def pack_weights_for_decode(model: M, weights: Iterable[Tensor], n_rows: int, n_tokens: int) -> M:
    """Return a model that decodes `n_tokens` of `n_rows` sequences: a packed copy, or `model`.

    The copy has the matrices `weights` [O, I] in oneDNN's blocked layout and shares everything
    else. It takes the memory of these matrices once more, computes no gradients, and does not see
    later changes of `model`: use it for one decoding and drop it. `model` is not changed.

    `model` itself is returned where packing does not pay or cannot be: few sequences or tokens, a
    GPU, an Intel CPU, another dtype than float32, a sharded model, weights of more than a quarter
    of the machine's memory.
    """
    weights = list(weights)
    few = n_rows < MIN_PACKED_ROWS or n_tokens < MIN_PACKED_TOKENS
    large = sum(w.nbytes for w in weights) > MAX_PACKED_BYTES
    sharded = any(isinstance(m, FSDPModule) for m in model.modules())
    if few or large or sharded or not _by_onednn(*weights):
        return model
    reorder = torch.ops.mkldnn._reorder_linear_weight
    return _replace_parameters(model, {id(w): reorder(w.detach(), n_rows) for w in weights})


def _replace_parameters(module: M, new: dict[int, Tensor]) -> M:
    """Return a copy of a module that has the tensors `new` instead of parameters of these ids."""
    result = copy.copy(module)
    parameters: dict[str, Any] = {n: new.get(id(p), p) for n, p in module._parameters.items()}
    children = {n: m and _replace_parameters(m, new) for n, m in module._modules.items()}
    result.__dict__ |= {"_parameters": parameters, "_modules": children}
    return result


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w_OI: Tensor) -> Tensor:
        ctx.save_for_backward(x, w_OI)
        return _onednn(x, w_OI)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, w_OI = ctx.saved_tensors
        dy_NO, x_NI = grads[0].flatten(0, -2), x.flatten(0, -2)
        dx_NI = matmul(dy_NO, w_OI) if ctx.needs_input_grad[0] else None
        dw_OI = None
        if ctx.needs_input_grad[1]:
            # oneDNN copies a first operand that is transposed: the narrower one.
            wide = len(w_OI) > w_OI.shape[1]
            dw_OI = matmul(x_NI.T, dy_NO).T if wide else matmul(dy_NO.T, x_NI)
        return dx_NI if dx_NI is None else dx_NI.view_as(x), dw_OI


def onednn_is_faster() -> bool:
    """Whether PyTorch has oneDNN beside MKL, on a processor that is not Intel's."""
    intel = "Intel" in torch.cpu.get_capabilities().get("cpu_name", "")
    return torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available() and not intel


ONEDNN = onednn_is_faster()


def _by_onednn(*tensors: Tensor) -> bool:
    for t in tensors:  # It is asked for every product of a token: no generator.
        if not t.is_cpu or t.dtype is not torch.float32 or isinstance(t, DTensor):
            return False
    return ONEDNN


def _onednn(x: Tensor, w_OI: Tensor) -> Tensor:
    if torch.compiler.is_compiling():
        return _opaque(x, w_OI)
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, w_OI, None, "none", [], "")
    return result


# Inductor knows oneDNN's operator and refuses it where weights are no constants; it calls one that
# it does not know as it stands.
@torch.library.custom_op("mooshak::linear", mutates_args=())
def _opaque(x: Tensor, w_OI: Tensor) -> Tensor:
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, w_OI, None, "none", [], "")
    return result


@_opaque.register_fake
def _(x: Tensor, w_OI: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], len(w_OI)))
