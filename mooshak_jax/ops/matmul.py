"""Matrix products of the model.

The gradients of `linear` are products in the same order of operands. Those that JAX derives swap
them, and on a CPU XLA then makes a transposed copy of the wider one.
Shapes stand in the names: B batch, T time, D width that is summed over.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from mooshak_jax.distributed.sharding import Axes, constrain, gather

# float32 means float32: a GPU would multiply in TF32 and a TPU in bfloat16 otherwise.
PRECISION = {
    "float64": jax.lax.Precision.HIGHEST,
    "float32": jax.lax.Precision.HIGHEST,
    "bfloat16": jax.lax.DotAlgorithmPreset.BF16_BF16_F32,
    "float16": jax.lax.DotAlgorithmPreset.F16_F16_F32,
}


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def linear(x_BTD: Array, w: Array, b: Array | None, axes: Axes) -> Array:
    """x W (+ b) in the dtype of x; W [D, *out] and b [*out] have these logical axes.

    What `fsdp` has cut is gathered here, and again for the gradients. Those of W and b are added
    up, over tokens and devices, in the dtype of W: at least float32.
    """
    y = einsum("BTD,D...->BT...", x_BTD, gather(w, x_BTD.dtype, axes)).astype(x_BTD.dtype)
    return y if b is None else y + gather(b, x_BTD.dtype, axes[1:])


def _linear_forward(x_BTD: Array, w: Array, b: Array | None, axes: Axes) -> tuple[Array, Any]:
    return linear(x_BTD, w, b, axes), (x_BTD, w, b)


def _linear_backward(axes: Axes, kept: Any, dy: Array) -> tuple[Array, Array, Array | None]:
    x_BTD, w, b = kept
    out = "EFGH"[: w.ndim - 1]
    dx_BTD = einsum(f"BT{out},D{out}->BTD", dy, gather(w, dy.dtype, axes)).astype(dy.dtype)
    dw = constrain(einsum(f"BTD,BT{out}->D{out}", x_BTD, dy), *axes)
    db = None if b is None else constrain(dy.astype(b.dtype).sum((0, 1)), *axes[1:])
    return dx_BTD, dw, db


linear.defvjp(_linear_forward, _linear_backward)


def einsum(equation: str, a: Array, b: Array) -> Array:
    """einsum of two arrays of one dtype: bfloat16 is added up in float32, and rounded once."""
    wide = jnp.promote_types(a.dtype, jnp.float32)
    how: Any = {"precision": PRECISION[a.dtype.name], "preferred_element_type": wide}
    return jnp.einsum(equation, a, b, **how)
