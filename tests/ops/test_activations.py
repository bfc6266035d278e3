"""Activations and RMSNorm against plain code: values, gradients, saved tensors."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mooshak.config.model import ModelConfig
from mooshak_jax.ops import activations as jax_activations
from mooshak_torch.distributed.activation_checkpoint import apply_ac
from mooshak_torch.model import Model
from mooshak_torch.ops.activations import recompute_in_backward, rms_norm, rotate, swiglu
from mooshak_torch.params import initialize
from mooshak_torch.rope import Rope

SIZE: dict[str, Any] = {"vocab_size": 32, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24}


def plain_rms_norm(x: Tensor, gain_D: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * gain_D


def plain_rotate(x_BTHK: Tensor, cos_BT1K: Tensor, sin_BT1K: Tensor) -> Tensor:
    a, b = x_BTHK.chunk(2, dim=-1)
    (_, cos), (_, sin) = cos_BT1K.chunk(2, dim=-1), sin_BT1K.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def tables() -> tuple[Tensor, Tensor]:
    rope = Rope(ModelConfig(**SIZE, max_seq_len=8), torch.float64)
    positions = rope.lookup(torch.tensor([[0, 1, 2, 5, 7]]))
    return positions.cos_BT1K, positions.sin_BT1K


PAIRS: dict[str, tuple[Callable, Callable, list[tuple[int, ...]]]] = {
    "rms_norm": (lambda x, g: rms_norm(x, g, 1e-5), plain_rms_norm, [(3, 5, 2, 8), (8,)]),
    "rotate": (
        lambda x: rotate(x, *tables()),
        lambda x: plain_rotate(x, *tables()),
        [(3, 5, 2, 8)],
    ),
    "swiglu": (swiglu, lambda gate, up: F.silu(gate) * up, [(3, 5, 8), (3, 5, 8)]),
}


@pytest.mark.parametrize("name", PAIRS)
def test_torch_values_and_gradients_equal_plain_code(name: str) -> None:
    ours, plain, shapes = PAIRS[name]
    torch.manual_seed(0)
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    y, expected = ours(*inputs), plain(*inputs)
    torch.testing.assert_close(y, expected, rtol=1e-14, atol=1e-14)
    out = torch.randn_like(y)
    for a, b in zip(
        torch.autograd.grad(y, inputs, out), torch.autograd.grad(expected, inputs, out), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)
    with torch.no_grad():
        torch.testing.assert_close(ours(*inputs), expected, rtol=1e-14, atol=1e-14)


# With a gain of nothing, and gates whose exponential is beyond all numbers.
JAX_PAIRS: dict[str, tuple[Callable, Callable, list[float]]] = {
    "rms_norm": (
        lambda x, g: jax_activations.rms_norm(x, g, 1e-5),
        lambda x, g: x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-5) * g,
        [0.0, 1.0, -2.0],
    ),
    "swiglu": (
        lambda up, gate: jax_activations.swiglu(gate, up),
        lambda up, gate: jax.nn.silu(gate) * up,
        [-1e3, 1e3, -40.0],
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", JAX_PAIRS)
def test_jax_values_and_gradients_equal_plain_code(name: str) -> None:
    ours, plain, special = JAX_PAIRS[name]
    draw = np.random.default_rng(0).normal
    with jax.enable_x64(True):
        x = jnp.asarray(draw(size=(3, 5, 8)))
        other = jnp.asarray(draw(size=8 if name == "rms_norm" else x.shape))
        other = other.at[..., :3].set(jnp.asarray(special))
        y, ours_of = jax.vjp(ours, x, other)
        expected, plain_of = jax.vjp(plain, x, other)
        out = jnp.asarray(draw(size=y.shape))
        for a, b in zip((y, *ours_of(out)), (expected, *plain_of(out)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.slow
@pytest.mark.parametrize("name", JAX_PAIRS)
def test_jax_low_precision_is_rounded_once(name: str) -> None:
    ours, plain, _ = JAX_PAIRS[name]
    draw = np.random.default_rng(0).normal
    x = jnp.asarray(draw(size=(3, 5, 8)), jnp.bfloat16)
    other = jnp.asarray(draw(size=8)) if name == "rms_norm" else x[::-1]
    y, gradients_of = jax.vjp(ours, x, other)
    expected = plain(x.astype(jnp.float32), other.astype(jnp.float32))
    assert y.dtype == jnp.bfloat16
    assert bool(jnp.all(jnp.abs(y - expected) <= jnp.abs(expected) * 2.0**-8))
    assert [g.dtype for g in gradients_of(y)] == [x.dtype, other.dtype]


def gradients(model: Model) -> dict[str, Tensor]:
    model(torch.arange(12).reshape(2, 6)).sin().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("architecture", ["llama", "mooshak"])
def test_recomputation_changes_no_gradient(architecture: str) -> None:
    config = ModelConfig(**SIZE, max_seq_len=8, architecture=architecture)
    models = [initialize(Model(config, "float64"), 0) for _ in range(3)]
    layer: Any
    for layer in models[1].layers:
        layer.recompute_activations = layer.mlp.recompute_activations = False
    apply_ac(models[2], "full")
    ours, plain, full = map(gradients, models)
    assert len(plain) == len(list(models[0].parameters()))
    for name, gradient in plain.items():
        assert torch.equal(ours[name], gradient), name
        assert torch.equal(full[name], gradient), name


@pytest.mark.slow
def test_recomputed_activations_are_not_saved() -> None:
    """Neither with a backward pass to come, nor, for an operation's own result, without one."""
    x, w = torch.randn(4, 8, requires_grad=True), torch.randn(8, 8, requires_grad=True)
    made: list[int] = []

    def make() -> Tensor:
        made.append(1)
        return x.detach() * 2

    def forward() -> tuple[Tensor, weakref.ref]:
        doubled = x * 2
        with recompute_in_backward(doubled, make):
            return (doubled @ w).exp(), weakref.ref(doubled)

    y, doubled = forward()
    assert doubled() is None
    (dw,) = torch.autograd.grad(y.sum(), w)
    torch.testing.assert_close(dw, (2 * x).T @ y)
    assert made == [1]

    class Mark:
        pass

    y, _ = forward()
    mark = Mark()
    node = weakref.ref(mark)
    assert y.grad_fn is not None
    y.grad_fn.metadata["mark"] = mark
    del y, mark
    gc.collect()
    assert node() is None
