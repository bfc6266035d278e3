"""Matrix products of both models against those of the frameworks.

In torch those of float32 on AMD's processors are oneDNN's; in JAX their gradients are written by
hand.
"""

import shutil
from collections.abc import Callable, Iterator
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mooshak_torch.ops import matmul


@pytest.fixture
def onednn() -> Iterator[mock.Mock]:
    """Products by oneDNN, whatever processor this is; what they call."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this PyTorch has no oneDNN")
    with (
        mock.patch.object(matmul, "ONEDNN", True),
        mock.patch.object(matmul, "_onednn", wraps=matmul._onednn) as taken,
    ):
        yield taken


def values(multiply: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype) -> list[Tensor]:
    """A product of [3, 5, I] and [O, I], and the gradients of both, in float64."""
    torch.manual_seed(0)
    drawn = (
        torch.randn(shape, dtype=torch.float64) for shape in ((3, 5, 96), (160, 96), (3, 5, 160))
    )
    x, w, out = (a.to(dtype).requires_grad_() for a in drawn)
    y = multiply(x, w)
    (y * out).sum().backward()
    assert x.grad is not None and w.grad is not None
    return [a.detach().double() for a in (y, x.grad, w.grad)]


def test_float32_matmul_of_onednn_is_as_exact(onednn: mock.Mock) -> None:
    exact = values(F.linear, torch.float64)
    ours = values(matmul.linear, torch.float32)
    assert onednn.call_count == 3
    plain = values(F.linear, torch.float32)
    for ours_, plain_, exact_ in zip(ours, plain, exact, strict=True):
        distance = (ours_ - exact_).norm() / exact_.norm()
        assert distance <= 2 * (plain_ - exact_).norm() / exact_.norm()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_use_the_matmul_of_pytorch(dtype: torch.dtype) -> None:
    for ours, plain in zip(values(matmul.linear, dtype), values(F.linear, dtype), strict=True):
        assert torch.equal(ours, plain)


@pytest.mark.parametrize("n_rows", [1, 7])
def test_transposed_views_are_multiplied_without_a_copy(onednn: mock.Mock, n_rows: int) -> None:
    torch.manual_seed(0)
    a_NI, b_IO = torch.randn(24, n_rows).T, torch.randn(40, 24).T
    expected = a_NI.double() @ b_IO.double()
    for left, right in ((a_NI, b_IO), (a_NI.contiguous(), b_IO.contiguous())):
        torch.testing.assert_close(matmul.matmul(left, right).double(), expected, rtol=0, atol=1e-5)


def test_matmul_skips_gradients_nobody_needs(onednn: mock.Mock) -> None:
    x, w = torch.randn(4, 8), torch.randn(16, 8, requires_grad=True)
    matmul.linear(x, w).sum().backward()
    assert x.grad is None and w.grad is not None
    assert onednn.call_count == 2


@pytest.mark.parametrize(
    ("processor", "mkl", "expected"),
    [("AMD EPYC", True, True), ("Intel Xeon", True, False), ("AMD EPYC", False, False)],
)
def test_onednn_is_used_where_mkl_is_slow(processor: str, mkl: bool, expected: bool) -> None:
    with (
        mock.patch("torch.backends.mkldnn.is_available", return_value=True),
        mock.patch("torch.backends.mkl.is_available", return_value=mkl),
        mock.patch("torch.cpu.get_capabilities", return_value={"cpu_name": processor}),
    ):
        assert matmul.onednn_is_faster() == expected


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
@mock.patch.object(matmul, "ONEDNN", torch.backends.mkldnn.is_available())
def test_compiled_matmul_is_the_same() -> None:
    plain = values(matmul.linear, torch.float32)
    compiled = values(torch.compile(matmul.linear, fullgraph=True), torch.float32)
    for a, b in zip(plain, compiled, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
