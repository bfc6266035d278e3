"""The machine's limits: its fastest matrix products, and its memory bandwidth."""

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.cases import Size, config, step_flops
from benchmarks.worker import Repeat, timed
from mooshak_torch.ops.matmul import linear

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
