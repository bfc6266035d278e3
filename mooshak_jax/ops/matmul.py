"""Matrix products of the model, accumulated in at least float32.

Mirror: mooshak_torch/ops/matmul.py. `linear` has custom gradients: in those that JAX derives the
operands are swapped, and XLA for CPUs then copies the wider operand to transpose it.
Shapes: B batch, T time, D contracted width; `...` the output axes, one or several.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from mooshak_jax.distributed.sharding import Axes, constrain, gather

# By default a GPU multiplies float32 matrices in TF32, a TPU in bfloat16.
PRECISION = {
    "float64": jax.lax.Precision.HIGHEST,
    "float32": jax.lax.Precision.HIGHEST,
    "bfloat16": jax.lax.DotAlgorithmPreset.BF16_BF16_F32,
    "float16": jax.lax.DotAlgorithmPreset.F16_F16_F32,
}


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def linear(x_BTD: Array, w: Array, b: Array | None, axes: Axes) -> Array:
    """Return x w (+ b), [B, T, *out], in the dtype of x, for w [D, *out] and b [*out].

    `axes` are the logical axes of w. Weights that are sharded over `fsdp` are gathered here, and
    again for the gradients. The gradients of w and b are summed over tokens and devices in the
    dtype of w, at least float32.
    """
    y = einsum("BTD,D...->BT...", x_BTD, gather(w, x_BTD.dtype, axes)).astype(x_BTD.dtype)
    return y if b is None else y + gather(b, x_BTD.dtype, axes[1:])


def _linear_forward(x_BTD: Array, w: Array, b: Array | None, axes: Axes) -> tuple[Array, Any]:
    return linear(x_BTD, w, b, axes), (x_BTD, w, b)


def _linear_backward(axes: Axes, residuals: Any, dy: Array) -> tuple[Array, Array, Array | None]:
    x_BTD, w, b = residuals
    out = "EFGH"[: w.ndim - 1]
    dx_BTD = einsum(f"BT{out},D{out}->BTD", dy, gather(w, dy.dtype, axes)).astype(dy.dtype)
    dw = constrain(einsum(f"BTD,BT{out}->D{out}", x_BTD, dy), *axes)
    db = None if b is None else constrain(dy.astype(b.dtype).sum((0, 1)), *axes[1:])
    return dx_BTD, dw, db


linear.defvjp(_linear_forward, _linear_backward)


def einsum(equation: str, a: Array, b: Array) -> Array:
    """Return the einsum of two arrays of one dtype, accumulated and returned in >= float32."""
    wide = jnp.promote_types(a.dtype, jnp.float32)
    options: Any = {"precision": PRECISION[a.dtype.name], "preferred_element_type": wide}
    return jnp.einsum(equation, a, b, **options)
