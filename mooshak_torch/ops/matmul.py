"""Matrix products of the model; float32 products on AMD CPUs use oneDNN.

Mirror: mooshak_jax/ops/matmul.py. PyTorch ships MKL and oneDNN and calls MKL, which does not use
the AVX-512 units of CPUs that are not Intel's: oneDNN is twice as fast there. On Intel CPUs MKL is
faster (docs/performance.md). Both accumulate in float32.
Shapes: N rows, I contracted width, O output width.
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

_M = TypeVar("_M", bound=nn.Module)


def linear(x: Tensor, w_OI: Tensor) -> Tensor:
    """Return x w^T, [..., O], for x [..., I] and w of one dtype. Differentiable."""
    if not _by_onednn(x, w_OI):
        return F.linear(x, w_OI)
    return _Linear.apply(x, w_OI) if torch.is_grad_enabled() else _onednn(x, w_OI)


def matmul(a_NI: Tensor, b_IO: Tensor) -> Tensor:
    """Return a b, [N, O]; either may be a transposed view. Not differentiable with oneDNN."""
    if _by_onednn(a_NI, b_IO):
        return _onednn(a_NI, b_IO.T)
    return a_NI @ b_IO


MIN_PACKED_TOKENS, MIN_PACKED_TOKENS_OF_ONE_ROW = 16, 64
"""Fewest new tokens for which packing pays off (docs/performance.md)."""
PACKED_FOR_ROWS = 64
"""Rows that oneDNN chooses the layout for: with a smaller number, one row is slower."""
MAX_PACKED_BYTES = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4
"""Largest weights that are packed: a quarter of the machine's memory."""


def pack_weights_for_decode(model: _M, weights: Iterable[Tensor], n_rows: int, n_tokens: int) -> _M:
    """Return a model that decodes `n_tokens` of `n_rows` sequences: a packed copy, or `model`.

    The copy has the matrices `weights` [O, I] in oneDNN's blocked layout and shares all other
    tensors. It needs memory for a second copy of these matrices, computes no gradients, and does
    not follow later changes of `model`: use it for one decoding. `model` is not changed.

    `model` itself is returned where packing does not pay off or is not possible: few tokens, a
    GPU, an Intel CPU, weights or a computation of another dtype than float32, a sharded model,
    layers that are compiled, recomputed or rescaled by DoRA, a head with trained rows, or weights
    of more than a quarter of the machine's memory.
    """
    weights = list(weights)
    few = n_tokens < (MIN_PACKED_TOKENS_OF_ONE_ROW if n_rows == 1 else MIN_PACKED_TOKENS)
    large = sum(w.nbytes for w in weights) > MAX_PACKED_BYTES
    # A compiled or recomputed layer has its own `forward`, which is bound to the layer itself.
    bound = any(
        isinstance(m, FSDPModule)
        or "forward" in vars(m)
        or hasattr(m, "dora_magnitude")
        or hasattr(m, "token_rows")
        for m in model.modules()
    )
    if few or large or bound or model.dtype != "float32" or not _by_onednn(*weights):
        return model
    reorder = torch.ops.mkldnn._reorder_linear_weight
    packed = {id(w): reorder(w.detach(), PACKED_FOR_ROWS) for w in weights}
    return _replace_parameters(model, packed)


def _replace_parameters(module: _M, new: dict[int, Tensor]) -> _M:
    """Return a copy of a module with the parameters of these ids replaced by the tensors `new`."""
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
            # oneDNN copies a transposed first operand: make that the narrower one.
            wide = len(w_OI) > w_OI.shape[1]
            dw_OI = matmul(x_NI.T, dy_NO).T if wide else matmul(dy_NO.T, x_NI)
        return dx_NI if dx_NI is None else dx_NI.view_as(x), dw_OI


def onednn_is_faster() -> bool:
    """Return whether PyTorch has both oneDNN and MKL on a CPU that is not Intel's."""
    intel = "Intel" in torch.cpu.get_capabilities().get("cpu_name", "")
    return torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available() and not intel


ONEDNN = onednn_is_faster()


def _by_onednn(*tensors: Tensor) -> bool:
    for t in tensors:  # Not `any(...)`: called for every product of a token, a generator is slower.
        if not t.is_cpu or t.dtype is not torch.float32 or isinstance(t, DTensor):
            return False
    return ONEDNN


def _onednn(x: Tensor, w_OI: Tensor) -> Tensor:
    if torch.compiler.is_compiling():
        return _opaque(x, w_OI)
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, w_OI, None, "none", [], "")
    return result


# Inductor has a lowering of oneDNN's operator that requires constant weights. An operator that it
# does not know is called as it is.
@torch.library.custom_op("mooshak::linear", mutates_args=())
def _opaque(x: Tensor, w_OI: Tensor) -> Tensor:
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, w_OI, None, "none", [], "")
    return result


@_opaque.register_fake
def _(x: Tensor, w_OI: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], len(w_OI)))
