"""Elementwise operations of a layer, with custom gradients.

Mirror: mooshak_torch/ops/activations.py. XLA for CPUs recomputes a cheap operation wherever its
result is read, also inside the transposed copy of a matrix input that the matrix's gradient needs,
which is slow (docs/performance.md). It does not duplicate a division, so the last
operation before a matrix product is a division.
Shapes: B batch, T time, H heads, K head width, k half of K; D the last axis, over which `rms_norm`
normalizes; gate and up have the same shape.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(x: Array, gain_D: Array, eps: float) -> Array:
    """Return x / rms(x) * gain (arXiv:1910.07467), shape and dtype of x.

    Computed in the dtype of the gain and rounded once.
    """
    return _rms_norm_forward(x, gain_D, eps)[0]


def rotate(x_BTHK: Array, cos_BT1k: Array, sin_BT1k: Array) -> Array:
    """Return x rotated by its position's angles (arXiv:2104.09864), shape and dtype of x.

    The halves of the last axis are the real and imaginary parts of complex numbers. Computed in the
    dtype of the tables.
    """
    a_BTHk, b_BTHk = jnp.split(x_BTHK.astype(cos_BT1k.dtype), 2, axis=-1)
    rotated = (a_BTHk * cos_BT1k - b_BTHk * sin_BT1k, b_BTHk * cos_BT1k + a_BTHk * sin_BT1k)
    return jnp.concatenate(rotated, axis=-1).astype(x_BTHK.dtype)


@jax.custom_vjp
def swiglu(gate: Array, up: Array) -> Array:
    """Return silu(gate) * up (arXiv:2002.05202), shape and dtype of gate.

    Computed in at least float32 and rounded once.
    """
    wide = jnp.promote_types(gate.dtype, jnp.float32)
    return (gate.astype(wide) * up / (1 + jnp.exp(-gate.astype(wide)))).astype(gate.dtype)


def _rms_norm_forward(x: Array, gain_D: Array, eps: float) -> tuple[Array, Any]:
    wide = x.astype(gain_D.dtype)
    rms = jnp.sqrt(jnp.mean(jnp.square(wide), -1, keepdims=True) + eps)
    return (wide / (rms * (1 / gain_D))).astype(x.dtype), (x, gain_D, 1 / rms)


def _rms_norm_backward(eps: float, residuals: Any, grad: Array) -> tuple[Array, Array]:
    x, gain_D, scale = residuals
    dy, normed = grad.astype(gain_D.dtype), x.astype(gain_D.dtype) * scale
    product = dy * normed
    dgain_D = product.reshape(-1, len(gain_D)).sum(0)
    mean = jnp.mean(product * gain_D, -1, keepdims=True)
    return ((dy * gain_D - normed * mean) * scale).astype(x.dtype), dgain_D


rms_norm.defvjp(_rms_norm_forward, _rms_norm_backward)


def _swiglu_forward(gate: Array, up: Array) -> tuple[Array, Any]:
    return swiglu(gate, up), (gate, up)


def _swiglu_backward(residuals: Any, dy: Array) -> tuple[Array, Array]:
    gate, up = (a.astype(jnp.promote_types(a.dtype, jnp.float32)) for a in residuals)
    sigmoid = jax.nn.sigmoid(gate)
    dgate = dy * up * sigmoid * (1 + gate * (1 - sigmoid))
    return dgate.astype(dy.dtype), (dy * gate * sigmoid).astype(dy.dtype)


swiglu.defvjp(_swiglu_forward, _swiglu_backward)
