"""Attention: JAX in query chunks against full attention; packed documents in both frameworks."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from jax import Array
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mooshak_jax.ops import attention as module
from mooshak_jax.ops.attention import attention, document_attention
from mooshak_torch.ops import attention as torch_module

SLOW = pytest.mark.slow


def plain(q_BTHK: Array, k_BSGK: Array, v_BSGK: Array, mask_BTS: Array) -> Array:
    B, T, H, K = q_BTHK.shape
    q_BTGRK = q_BTHK.reshape(B, T, k_BSGK.shape[2], -1, K)
    scores_BGRTS = jnp.einsum("BTGRK,BSGK->BGRTS", q_BTGRK, k_BSGK) / math.sqrt(K)
    weights_BGRTS = jax.nn.softmax(jnp.where(mask_BTS[:, None, None], scores_BGRTS, -jnp.inf), -1)
    return jnp.einsum("BGRTS,BSGK->BTGRK", weights_BGRTS, v_BSGK).reshape(B, T, H, K)


def causal(T: int, window: int) -> Array:
    back_TT = jnp.arange(T)[:, None] - jnp.arange(T)
    return ((back_TT >= 0) & (back_TT < window))[None]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("heads", "groups", "queries", "T", "window"),
    [
        (6, 2, (4, 9), 17, 5),
        pytest.param(2, 2, (4, 9), 30, 30, marks=SLOW),
        pytest.param(3, 1, (4, 9), 17, 5, marks=SLOW),
        pytest.param(6, 2, (64, 64), 30, 30, marks=SLOW),
    ],
)
def test_chunked_attention_equals_full_attention(
    heads: int,
    groups: int,
    queries: tuple[int, int],
    T: int,
    window: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "QUERY_CHUNK", queries)
    draw = np.random.default_rng(0).normal
    with jax.enable_x64(True):
        q, k, v, out = (
            jnp.asarray(draw(size=(2, T, n, 4))) for n in (heads, groups, groups, heads)
        )
        mask = causal(T, window)
        ours, ours_of = jax.vjp(lambda *qkv: attention(*qkv, mask), q, k, v)
        expected, plain_of = jax.vjp(lambda *qkv: plain(*qkv, mask), q, k, v)
        for a, b in zip((ours, *ours_of(out)), (expected, *plain_of(out)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.slow
def test_attention_with_more_keys_than_queries() -> None:
    draw = np.random.default_rng(0).normal
    with jax.enable_x64(True):
        q, k, v = (jnp.asarray(draw(size=(2, n, 2, 4))) for n in (3, 9, 9))
        mask = jnp.asarray(np.random.default_rng(1).random((2, 3, 9)) < 0.5).at[..., 0].set(True)
        np.testing.assert_allclose(attention(q, k, v, mask), plain(q, k, v, mask), rtol=1e-12)


@pytest.mark.slow
def test_bfloat16_attention_accumulates_in_float32() -> None:
    draw = np.random.default_rng(0).normal
    wide = [jnp.asarray(draw(size=(2, 30, 2, 16)), jnp.bfloat16).astype(jnp.float32) for _ in "qkv"]
    narrow, mask = [a.astype(jnp.bfloat16) for a in wide], causal(30, 30)
    ours, ours_of = jax.vjp(lambda *qkv: attention(*qkv, mask), *narrow)
    expected, plain_of = jax.vjp(lambda *qkv: plain(*qkv, mask), *wide)
    for a, b in zip((ours, *ours_of(ours)), (expected, *plain_of(expected)), strict=True):
        assert a.dtype == jnp.bfloat16
        assert jnp.linalg.norm((a - b).ravel()) < 8e-3 * jnp.linalg.norm(b.ravel())


SEGMENTS = [[7, 7, 7, 2, 2, 9], [0, 1, 1, 1, 1, 0]]
MASKS = {
    None: [
        [
            [1, 0, 0, 0, 0, 0],
            [1, 1, 0, 0, 0, 0],
            [1, 1, 1, 0, 0, 0],
            [0, 0, 0, 1, 0, 0],
            [0, 0, 0, 1, 1, 0],
            [0, 0, 0, 0, 0, 1],
        ],
        [
            [1, 0, 0, 0, 0, 0],
            [0, 1, 0, 0, 0, 0],
            [0, 1, 1, 0, 0, 0],
            [0, 1, 1, 1, 0, 0],
            [0, 1, 1, 1, 1, 0],
            [0, 0, 0, 0, 0, 1],
        ],
    ],
    2: [
        [
            [1, 0, 0, 0, 0, 0],
            [1, 1, 0, 0, 0, 0],
            [0, 1, 1, 0, 0, 0],
            [0, 0, 0, 1, 0, 0],
            [0, 0, 0, 1, 1, 0],
            [0, 0, 0, 0, 0, 1],
        ],
        [
            [1, 0, 0, 0, 0, 0],
            [0, 1, 0, 0, 0, 0],
            [0, 1, 1, 0, 0, 0],
            [0, 0, 1, 1, 0, 0],
            [0, 0, 0, 1, 1, 0],
            [0, 0, 0, 0, 0, 1],
        ],
    ],
}
"""By window. A document's number may come again later in the row: it is another document."""


@pytest.mark.parametrize("window", MASKS)
def test_document_attention_sees_what_the_mask_shows(
    window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Equal scores and one value for each key: an output is positive where its key is seen.
    q = np.zeros((2, 6, 1, 6), np.float32)
    v = np.broadcast_to(np.eye(6, dtype=np.float32)[:, None], q.shape).copy()
    theirs = document_attention(q, q, v, jnp.array(SEGMENTS), window)
    np.testing.assert_array_equal(theirs[:, :, 0] > 0, MASKS[window])
    for compiling in (False, True):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda c=compiling: c)
        tensors = map(torch.from_numpy, (q, q, v))
        ours = torch_module.document_attention(*tensors, torch.tensor(SEGMENTS), window)
        np.testing.assert_array_equal(ours[:, :, 0] > 0, MASKS[window])


def documents(T: int, rng: np.random.Generator) -> np.ndarray:
    """Segments [5, T]: a document of all, documents of one token, and random ones."""
    random = np.sort(rng.integers(0, 4, (3, T)), axis=1)
    return np.concatenate([np.zeros((1, T), int), np.arange(T)[None], random])


def draw(T: int, heads: int, groups: int) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """Queries, keys and values, the gradient of their attention, and segments."""
    rng = np.random.default_rng(0)
    q, k, v, out = (rng.normal(size=(5, T, n, 4)) for n in (heads, groups, groups, heads))
    return [q, k, v], out, documents(T, rng)


def torch_grads(
    function: Any, qkv: list[np.ndarray], out: np.ndarray, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """Values of a function of queries, keys and values, and their gradients."""
    leaves = [torch.tensor(a, dtype=dtype, requires_grad=True) for a in qkv]
    value = function(*leaves)
    value.backward(torch.tensor(out, dtype=dtype))
    return [value.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


@pytest.mark.slow
@pytest.mark.parametrize(("heads", "groups"), [(6, 2), (3, 1)])
@pytest.mark.parametrize(
    ("window", "queries"), [(None, (4, 9)), (5, (4, 9)), (1, (64, 64)), (17, (64, 64))]
)
def test_document_attention_is_attention_under_its_mask(
    heads: int,
    groups: int,
    window: int | None,
    queries: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "QUERY_CHUNK", queries)
    qkv, out, segments = draw(17, heads, groups)
    back_TT = np.arange(17)[:, None] - np.arange(17)
    same_BTT = segments[:, :, None] == segments[:, None]
    mask = torch.tensor(same_BTT & (back_TT >= 0) & (back_TT < (window or 17)))
    expected = torch_grads(lambda *a: torch_module.attention(*a, mask), qkv, out)
    ours = torch_grads(
        lambda *a: torch_module.document_attention(*a, torch.tensor(segments), window), qkv, out
    )

    @jax.jit
    def jax_grads(qkv: list[Array], out: Array, segments: Array) -> list[Array]:
        value, grads_of = jax.vjp(lambda *a: document_attention(*a, segments, window), *qkv)
        return [value, *grads_of(out)]

    with jax.enable_x64(True):
        theirs = jax_grads(qkv, out, segments)
    for a, b, c in zip(ours, theirs, expected, strict=True):
        np.testing.assert_allclose(a, c, rtol=1e-12, atol=1e-13)
        np.testing.assert_allclose(b, c, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1.2e-2)])
def test_document_attention_in_low_precision(dtype: torch.dtype, tolerance: float) -> None:
    qkv, out, segments = draw(40, 6, 2)

    def function(*leaves: Tensor) -> Tensor:
        return torch_module.document_attention(*leaves, torch.tensor(segments))

    expected = torch_grads(function, qkv, out)
    for a, b in zip(torch_grads(function, qkv, out, dtype), expected, strict=True):
        assert a.dtype == dtype
        assert (a - b).norm() < tolerance * b.norm()


def test_one_document_is_bit_identical_to_causal() -> None:
    qkv, out, _ = draw(40, 6, 2)
    qkv, out = [a[:1] for a in qkv], out[:1]

    def sdpa(*leaves: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in leaves)
        out_BHTK = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out_BHTK.transpose(1, 2)

    def one_document(*leaves: Tensor) -> Tensor:
        return torch_module.document_attention(*leaves, torch.zeros(1, 40, dtype=torch.long))

    expected = torch_grads(sdpa, qkv, out, torch.float32)
    for function in (torch_module.attention, one_document):
        for a, b in zip(torch_grads(function, qkv, out, torch.float32), expected, strict=True):
            assert torch.equal(a, b)


@pytest.mark.slow
def test_document_attention_compiles_without_a_graph_break() -> None:
    qkv, out, segments = draw(17, 6, 2)
    compiled = torch.compile(torch_module.document_attention, backend="aot_eager", fullgraph=True)
    # Other documents are no other program.
    for rows in map(torch.tensor, (segments, segments[::-1].copy())):
        ours, expected = (
            torch_grads(lambda *a, f=f, rows=rows: f(*a, rows, 5), qkv, out)
            for f in (compiled, torch_module.document_attention)
        )
        for a, b in zip(ours, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_document_attention_plans_without_values(device: str) -> None:
    with FakeTensorMode():
        q, k = (torch.empty(2, 17, n, 4, device=device, requires_grad=True) for n in (6, 2))
        segments = torch.empty(2, 17, dtype=torch.int32, device=device)
        assert torch_module.needs_document_mask(segments)
        out = torch_module.attention(q, k, k, torch_module.document_mask(segments, 5))
        out.sum().backward()
        assert q.grad is not None and out.shape == q.grad.shape == (2, 17, 6, 4)
