"""Attention in JAX, a piece of the queries at a time, beside all of it at once."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from mooshak_jax.attention import attention

from mooshak_jax.ops import attention as module


def plain(q_BTHK: Array, k_BSGK: Array, v_BSGK: Array, mask_BTS: Array) -> Array:
    B, T, H, K = q_BTHK.shape
    q_BTGRK = q_BTHK.reshape(B, T, k_BSGK.shape[2], -1, K)
    scores_BGRTS = jnp.einsum("BTGRK,BSGK->BGRTS", q_BTGRK, k_BSGK) / math.sqrt(K)
    weights_BGRTS = jax.nn.softmax(jnp.where(mask_BTS[:, None, None], scores_BGRTS, -jnp.inf), -1)
    return jnp.einsum("BGRTS,BSGK->BTGRK", weights_BGRTS, v_BSGK).reshape(B, T, H, K)


def causal(T: int, window: int) -> Array:
    back_TT = jnp.arange(T)[:, None] - jnp.arange(T)
    return ((back_TT >= 0) & (back_TT < window))[None]


@pytest.mark.parametrize(("heads", "groups"), [(2, 2), (6, 2), (3, 1)])
@pytest.mark.parametrize(
    ("queries", "T", "window"), [((4, 9), 30, 30), ((4, 9), 17, 5), ((64, 64), 30, 30)]
)
def test_values_and_gradients_are_those_of_all_at_once(
    heads: int,
    groups: int,
    queries: tuple[int, int],
    T: int,
    window: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "QUERIES", queries)
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


def test_more_keys_than_queries_are_seen_as_the_mask_has_it() -> None:
    draw = np.random.default_rng(0).normal
    with jax.enable_x64(True):
        q, k, v = (jnp.asarray(draw(size=(2, n, 2, 4))) for n in (3, 9, 9))
        mask = jnp.asarray(np.random.default_rng(1).random((2, 3, 9)) < 0.5).at[..., 0].set(True)
        np.testing.assert_allclose(attention(q, k, v, mask), plain(q, k, v, mask), rtol=1e-12)


def test_bfloat16_is_added_up_in_float32() -> None:
    draw = np.random.default_rng(0).normal
    wide = [jnp.asarray(draw(size=(2, 30, 2, 16)), jnp.bfloat16).astype(jnp.float32) for _ in "qkv"]
    narrow, mask = [a.astype(jnp.bfloat16) for a in wide], causal(30, 30)
    ours, ours_of = jax.vjp(lambda *qkv: attention(*qkv, mask), *narrow)
    expected, plain_of = jax.vjp(lambda *qkv: plain(*qkv, mask), *wide)
    for a, b in zip((ours, *ours_of(ours)), (expected, *plain_of(expected)), strict=True):
        assert a.dtype == jnp.bfloat16
        assert jnp.linalg.norm((a - b).ravel()) < 8e-3 * jnp.linalg.norm(b.ravel())
