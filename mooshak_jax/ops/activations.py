"""The elementwise parts of a layer, with gradients of their own. Mirror of
mooshak_torch/ops/activations.py, but for what XLA makes again by itself.

XLA for CPUs makes again what is cheap wherever it is read, also in the transposed copy that the
gradient of a matrix needs of its input, which is slow (docs/performance.md). A division is too
expensive for that: where a matrix comes next, it is the last operation.
Shapes: B batch, T time, H heads, K head width, k half of it; D the last of any, which is normed;
gate and up have the same shape.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(x: Array, gain_D: Array, eps: float) -> Array:
    """x / rms(x) * gain (arXiv:1910.07467), in the dtype of the gain, cast once to that of x."""
    return _rms_norm_forward(x, gain_D, eps)[0]


def rotate(x_BTHK: Array, cos_BT1k: Array, sin_BT1k: Array) -> Array:
    """Both halves of x as the parts of complex numbers, turned, in the dtype of the tables.

    arXiv:2104.09864.
    """
    a_BTHk, b_BTHk = jnp.split(x_BTHK.astype(cos_BT1k.dtype), 2, axis=-1)
    rotated = (a_BTHk * cos_BT1k - b_BTHk * sin_BT1k, b_BTHk * cos_BT1k + a_BTHk * sin_BT1k)
    return jnp.concatenate(rotated, axis=-1).astype(x_BTHK.dtype)


@jax.custom_vjp
def swiglu(gate: Array, up: Array) -> Array:
    """silu(gate) * up (arXiv:2002.05202), in at least float32, rounded once."""
    wide = jnp.promote_types(gate.dtype, jnp.float32)
    return (gate.astype(wide) * up / (1 + jnp.exp(-gate.astype(wide)))).astype(gate.dtype)


def _rms_norm_forward(x: Array, gain_D: Array, eps: float) -> tuple[Array, Any]:
    wide = x.astype(gain_D.dtype)
    rms = jnp.sqrt(jnp.mean(jnp.square(wide), -1, keepdims=True) + eps)
    return (wide / (rms * (1 / gain_D))).astype(x.dtype), (x, gain_D, 1 / rms)


def _rms_norm_backward(eps: float, kept: Any, grad: Array) -> tuple[Array, Array]:
    x, gain_D, scale = kept
    dy, normed = grad.astype(gain_D.dtype), x.astype(gain_D.dtype) * scale
    product = dy * normed
    dgain_D = product.reshape(-1, len(gain_D)).sum(0)
    along = jnp.mean(product * gain_D, -1, keepdims=True)
    return ((dy * gain_D - normed * along) * scale).astype(x.dtype), dgain_D


rms_norm.defvjp(_rms_norm_forward, _rms_norm_backward)


def _swiglu_forward(gate: Array, up: Array) -> tuple[Array, Any]:
    return swiglu(gate, up), (gate, up)


def _swiglu_backward(kept: Any, dy: Array) -> tuple[Array, Array]:
    gate, up = (a.astype(jnp.promote_types(a.dtype, jnp.float32)) for a in kept)
    share = jax.nn.sigmoid(gate)
    dgate = dy * up * share * (1 + gate * (1 - share))
    return dgate.astype(dy.dtype), (dy * gate * share).astype(dy.dtype)


swiglu.defvjp(_swiglu_forward, _swiglu_backward)
