"""Noise of NEFTune: equal bits in NumPy, torch and JAX, its range, and what it depends on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from mooshak.numerics.neftune import embedding_noise, noise_keys, noise_scales

T, D = 37, 24


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_noise_has_the_same_bits_everywhere(dtype: str) -> None:
    keys_BT = noise_keys(5, 11, range(3), T)
    scales_BT = np.random.default_rng(0).uniform(0, 0.1, (3, T)).astype(dtype)
    index_D = np.arange(D, dtype=np.int32)
    ours = embedding_noise(keys_BT, index_D, scales_BT)
    tensors = (torch.from_numpy(one) for one in (keys_BT, index_D, scales_BT))
    in_torch = embedding_noise(*tensors).numpy()
    with jax.enable_x64(dtype == "float64"):
        in_jax = jax.jit(embedding_noise)(*map(jnp.asarray, (keys_BT, index_D, scales_BT)))
        np.testing.assert_array_equal(in_torch, np.asarray(in_jax))
    assert in_torch.dtype == in_jax.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(in_torch, ours.astype(dtype))


def test_noise_is_uniform_within_its_scale() -> None:
    noise = embedding_noise(
        noise_keys(0, 0, range(8), 512), np.arange(64, dtype=np.int32), np.ones((8, 512))
    )
    assert -1 <= noise.min() < -0.9999 and 0.9999 < noise.max() < 1
    # 262,144 numbers: six standard errors of mean, variance and correlations.
    n = noise.size
    assert abs(noise.mean()) < 6 * (1 / 3 / n) ** 0.5
    assert abs((noise**2).mean() - 1 / 3) < 6 * (4 / 45 / n) ** 0.5
    for axis in range(3):
        shifted = np.roll(noise, 1, axis)
        assert abs((noise * shifted).mean()) < 6 * (1 / 3) * n**-0.5, axis


def test_keys_depend_on_seed_step_row_and_position_only() -> None:
    keys = noise_keys(3, 7, range(4), T)
    assert keys.dtype == np.int32 and keys.shape == (4, T)
    np.testing.assert_array_equal(noise_keys(3, 7, [2], T), keys[2:3])
    np.testing.assert_array_equal(noise_keys(3, 7, range(4), T - 8), keys[:, :-8])
    for other in (noise_keys(4, 7, range(4), T), noise_keys(3, 8, range(4), T), keys[::-1]):
        assert (other != keys).mean() > 0.99
    assert len(np.unique(keys)) == keys.size


def test_scales_are_those_of_the_paper() -> None:
    segments = np.array([[1, 1, 1, 1, 2, 2, 0], [1, 0, 0, 0, 0, 0, 0]])
    scales = noise_scales(segments, 5.0, 16)
    first = [5 / (4 * 16) ** 0.5] * 4 + [5 / (2 * 16) ** 0.5] * 2 + [0]
    np.testing.assert_allclose(scales, [first, [5 / 16**0.5, 0, 0, 0, 0, 0, 0]], rtol=1e-15)
