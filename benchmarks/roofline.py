"""The machine's limits: its fastest matrix products, and its memory bandwidth."""

from collections import defaultdict
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.case import Size, config, step_flops
from benchmarks.worker import Repeat, timed
from mooshak_torch.ops.matmul import ONEDNN, PACKED_FOR_ROWS, linear

N = 2048
"""Rows and columns of the products."""


def torch_products(size: Size) -> Repeat:
    """Time the case's FLOPs at the speed of torch's own matrix product (MKL on x86)."""
    return _products(size, torch.mm)


def products(size: Size) -> Repeat:
    """Time the case's FLOPs at the speed of the matrix product that our model uses."""
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("highest")
    return _products(size, linear)


def _products(size: Size, product: Callable[[Tensor, Tensor], Tensor]) -> Repeat:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a, b = torch.randn(2, N, N, device=device)

    def work() -> None:
        for _ in range(5):
            product(a, b)
        if device == "cuda":
            torch.cuda.synchronize()

    work()
    flops = step_flops(size)
    return lambda: _best(work) * flops / (5 * 2 * N**3)


def _best(work: Callable[[], object]) -> float:
    return min(timed(work) for _ in range(5))


def read_weights(size: Size) -> Repeat:
    """Time reading the model's weights from memory once per decoded token.

    Of the embedding, a step reads single rows, which are not counted. The bandwidth is that of a
    sum over 1 GiB.
    """
    model = config(size).model
    n_bytes = 4 * (model.parameter_count() - model.vocab_size * model.dim)
    memory = torch.ones(2**28)
    torch.sum(memory)
    each = 4 * memory.numel()
    n_tokens = size["new_tokens"]
    return lambda: _best(lambda: torch.sum(memory)) * n_tokens * n_bytes / each


@torch.no_grad()
def products_of_rows(size: Size) -> Repeat:
    """Time the matrix products of a decoded token of each sequence, each kind by its best library.

    The libraries: PyTorch's (MKL on x86), oneDNN with plain and with packed weights, XLA.
    """
    model, n_rows, n_tokens = config(size).model, size["batch_size"], size["new_tokens"]
    kinds = defaultdict[str, list[Tensor]](list)
    for name, shape in model.parameter_shapes().items():
        if len(shape) == 2 and "embeddings" not in name:
            kinds[name.rpartition("layers.")[2].partition(".")[2] or name].append(torch.rand(shape))
    libraries = [_by_library(torch.rand(n_rows, w[0].shape[1]), w) for w in kinds.values()]
    return lambda: n_tokens * sum(min(map(_best, several)) for several in libraries)


def _by_library(x: Tensor, weights: list[Tensor]) -> list[Callable[[], object]]:
    """Return functions that multiply by each of the weights [O, I]."""

    def multiply_by_onednn(packed: list[Tensor]) -> list[Tensor]:
        return [torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "") for w in packed]

    found: list[Callable[[], object]] = [lambda: [F.linear(x, w) for w in weights]]
    if ONEDNN:
        found.append(partial(multiply_by_onednn, weights))
        for n_rows in {len(x), PACKED_FOR_ROWS}:
            packed = [torch.ops.mkldnn._reorder_linear_weight(w, n_rows) for w in weights]
            found.append(partial(multiply_by_onednn, packed))
    x_jax, transposed = jnp.asarray(x.numpy()), [jnp.asarray(w.T.numpy()) for w in weights]
    multiply = jax.jit(lambda x, ws: [x @ w for w in ws])
    found.append(lambda: jax.block_until_ready(multiply(x_jax, transposed)))
    for function in found:
        function()
    return found
