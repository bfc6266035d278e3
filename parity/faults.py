"""Faults that people make, planted in one framework on purpose: what the check has to find.

Each is planted by replacing a function of the framework, or by reading a checkpoint wrongly. They
are the negative controls of `parity.check`, and `tests/parity/test_faults.py` plants every one.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
import torch.nn.functional as F

import mooshak_jax.model
import mooshak_jax.objectives
import mooshak_jax.ops.cross_entropy
import mooshak_jax.optimizer
import mooshak_jax.params
import mooshak_jax.step
import mooshak_torch.model
import mooshak_torch.objectives
import mooshak_torch.ops.cross_entropy
import mooshak_torch.optimizer
import mooshak_torch.step
from mooshak.checkpoints.base import FULL_SLICE, Checkpoint
from mooshak.data.packing import IGNORE_INDEX, Batch
from mooshak.numerics import rope
from mooshak.numerics.schedule import learning_rate

Patch = tuple[Any, str, Any]
"""An object, the name of its attribute, and what is put in the attribute's place."""

tm, jm = mooshak_torch.model, mooshak_jax.model
ts, to = mooshak_torch.step, mooshak_torch.objectives
js, jo = mooshak_jax.step, mooshak_jax.objectives


@dataclass(frozen=True)
class Fault:
    """One fault: in the code of each framework, or in how a checkpoint is read."""

    part: str
    """The part of the check that has to find it."""
    place: str
    """Regular expression for the place that the check has to name."""
    torch: Callable[[], list[Patch]] | None = None
    jax: Callable[[], list[Patch]] | None = None
    read: Callable[[Checkpoint], Checkpoint] | None = None
    """The checkpoint as the faulty framework reads it."""
    architecture: str = "mooshak"
    """Which architecture has the operation."""


@contextmanager
def inject_fault(name: str, framework: str) -> Iterator[None]:
    """Plant a fault in `torch` or `JAX`, inside the block."""
    plant = FAULTS[name].torch if framework == "torch" else FAULTS[name].jax
    assert plant is not None, f"{name} is a fault of checkpoints"
    # What was compiled without the fault, or with it, must not be used again.
    jax.clear_caches()
    try:
        with ExitStack() as stack:
            for target, attribute, value in plant():
                stack.enter_context(mock.patch.object(target, attribute, value))
            yield
    finally:
        jax.clear_caches()


def _rotate_pairs_torch(self: tm.Rope, x: torch.Tensor, positions: tm.Positions) -> torch.Tensor:
    half = x.shape[-1] // 2
    cos, sin = positions.cos_BT1K[..., half:], positions.sin_BT1K[..., half:]
    a, b = x.to(cos.dtype)[..., 0::2], x.to(cos.dtype)[..., 1::2]
    return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2).to(x.dtype)


def _rotate_pairs_jax(self: jm.Rope, x: jax.Array, positions: jm.Positions) -> jax.Array:
    cos, sin = positions.cos_BT1k, positions.sin_BT1k
    a, b = x.astype(cos.dtype)[..., 0::2], x.astype(cos.dtype)[..., 1::2]
    return jnp.stack((a * cos - b * sin, b * cos + a * sin), -1).reshape(x.shape).astype(x.dtype)


def _theta(module: Any) -> list[Patch]:
    tables = rope.rope_tables
    return [
        (module, "rope_tables", lambda m: tables(replace(m, rope_theta=1.01 * m.rope_theta))),
    ]


def _eps(kind: Any) -> list[Patch]:
    original = kind.__init__

    def init(self: Any, dim: int, eps: float, dtype: Any) -> None:
        original(self, dim, 1e-6, dtype)

    return [(kind, "__init__", init)]


def _norm_torch(axis: int = -1, offset: float = 0.0) -> list[Patch]:
    def forward(self: tm.RMSNorm, x: torch.Tensor) -> torch.Tensor:
        wide = x.to(self.weight.dtype)
        scale = torch.rsqrt(wide.square().mean(axis, keepdim=True) + self.eps)
        return (wide * scale * (self.weight + offset)).to(x.dtype)

    return [(tm.RMSNorm, "forward", forward)]


def _norm_jax(axis: int = -1, offset: float = 0.0) -> list[Patch]:
    def call(self: jm.RMSNorm, x: jax.Array) -> jax.Array:
        wide = x.astype(self.scale.dtype)
        scale = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis, keepdims=True) + self.eps)
        return (wide * scale * (self.scale[...] + offset)).astype(x.dtype)

    return [(jm.RMSNorm, "__call__", call)]


def _block(kind: Any, call: str, norm_after: bool, residual: bool) -> list[Patch]:
    def block(self: Any, x: Any, rope: Any, positions: Any, cache: Any = None) -> Any:
        attention = self.attention(x, rope, positions, cache)
        attention, *rest = attention if isinstance(attention, tuple) else (attention,)
        h = x + attention if residual else attention
        mlp = self.mlp_norm(self.mlp(h)) if norm_after else self.mlp(self.mlp_norm(h))
        out = self.output_norm(h + mlp)
        return (out, *rest) if rest else out

    return [(kind, call, block)]


def _post_norm(kind: Any, call: str) -> list[Patch]:
    """A Llama block that norms the attention's output, not its input."""

    def block(self: Any, x: Any, rope: Any, positions: Any, cache: Any = None) -> Any:
        attention = self.attention(x, rope, positions, cache)
        attention, *rest = attention if isinstance(attention, tuple) else (attention,)
        h = x + self.attention_norm(attention)
        out = h + self.mlp(self.mlp_norm(h))
        return (out, *rest) if rest else out

    return [(kind, call, block)]


def _window(module: Any) -> list[Patch]:
    """A window that reaches one position further back."""
    original = module.Attention.mask

    def mask(self: Any, queries: Any, n_keys: int) -> Any:
        before = queries - self.window
        further = before[..., None] == _positions_like(queries, n_keys)
        return original(self, queries, n_keys) | further

    return [(module.Attention, "mask", mask)]


def _positions_like(queries: Any, n: int) -> Any:
    return torch.arange(n) if isinstance(queries, torch.Tensor) else jnp.arange(n)


def _unscaled_frequencies(module: Any) -> list[Patch]:
    tables = rope.rope_tables
    return [(module, "rope_tables", lambda m: tables(replace(m, rope_scaling=None)))]


def _mlp_torch() -> list[Patch]:
    def forward(self: tm.MLP, x: torch.Tensor) -> torch.Tensor:
        return self.w2(F.gelu(self.w1(x), approximate="tanh") * self.w3(x))

    return [(tm.MLP, "forward", forward)]


def _mlp_jax() -> list[Patch]:
    def call(self: jm.MLP, x: jax.Array) -> jax.Array:
        return self.w2(jax.nn.gelu(self.w1(x)) * self.w3(x))

    return [(jm.MLP, "__call__", call)]


def _attend(module: Any, change: Callable[..., Any]) -> list[Patch]:
    return [(module.Attention, "attend", staticmethod(change(module.Attention.attend)))]


def _mask_torch(attend: Any) -> Any:
    def changed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any) -> torch.Tensor:
        if mask is None:
            mask = torch.ones(1, q.shape[1], k.shape[1], dtype=torch.bool).tril(1)
        return attend(q, k, v, mask)

    return changed


def _mask_jax(attend: Any) -> Any:
    return lambda q, k, v, mask: attend(q, k, v, mask | jnp.roll(mask, 1, -1).at[..., 0].set(True))


def _unscaled(attend: Any) -> Any:
    return lambda q, k, v, mask: attend(q * q.shape[-1] ** 0.5, k, v, mask)


def _softmax32_torch(attend: Any) -> Any:
    def changed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any) -> torch.Tensor:
        return attend(q.float(), k.float(), v.float(), mask).to(q.dtype)

    return changed


def _softmax32_jax(attend: Any) -> Any:
    def changed(q: jax.Array, k: jax.Array, v: jax.Array, mask: Any) -> jax.Array:
        return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None])

    return changed


def _coarse(kind: Any, call: str, round_: Callable[[Any], Any]) -> list[Patch]:
    """Products of float32 matrices of rounded elements."""
    original = getattr(kind, call)

    def coarse(self: Any, x: Any) -> Any:
        return original(self, round_(x))

    return [(kind, call, coarse)]


def _round_torch(x: torch.Tensor) -> torch.Tensor:
    return x.bfloat16().to(x.dtype) if x.dtype == torch.float32 else x


def _round_jax(x: jax.Array) -> jax.Array:
    # By integers: XLA may leave out a conversion there and back.
    if x.dtype != jnp.float32:
        return x
    return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)


def _embedding(kind: Any, call: str) -> list[Patch]:
    original = getattr(kind, call)

    def scaled(self: Any, tokens: Any) -> Any:
        rows = original(self, tokens)
        return rows * rows.shape[-1] ** 0.5

    return [(kind, call, scaled)]


def _unshifted_torch() -> list[Patch]:
    def forward(self: Any, batch: Batch) -> torch.Tensor:
        loss: torch.Tensor = self.loss(self.model.hidden_states(batch.tokens), batch.tokens)
        return loss

    return [(to.CausalLM, "forward", forward)]


def _unshifted_jax() -> list[Patch]:
    def call(self: Any, params: Any, batch: Batch) -> jax.Array:
        model = mooshak_jax.params.merge(self.graphdef, params)
        hidden = model.hidden_states(batch.tokens)
        return jo.cross_entropy(hidden, model.head_DV, batch.tokens, self.chunk)

    return [(jo.CausalLM, "__call__", call)]


def _padding(module: Any) -> list[Patch]:
    def counting(original: Any) -> Any:
        return lambda x, w, labels, chunk: original(x, w, labels * (labels != IGNORE_INDEX), chunk)

    names = ("cross_entropy", "token_log_probs")
    return [(module, name, counting(getattr(module, name))) for name in names]


def _clipped(change: Callable[[Any, Any, float], Any]) -> list[Patch]:
    """`change(gradients, norm, max_norm)` gives JAX's clipped gradients."""

    def clip(grads: Any, max_norm: float) -> tuple[Any, Any]:
        norm = optax.tree.norm(grads)
        return change(grads, norm, max_norm), norm

    return [(js, "clip_gradients", clip)]


def _clip_afterwards_torch() -> list[Patch]:
    def clip(parameters: Any, max_norm: float, scale: float) -> torch.Tensor:
        return torch.nn.utils.get_total_norm([p.grad for p in parameters])

    return [(mooshak_torch.optimizer, "clip_gradients", clip)]


def _clip_epsilon_torch() -> list[Patch]:
    def clip(parameters: Any, max_norm: float, scale: float) -> torch.Tensor:
        return torch.nn.utils.clip_grad_norm_(parameters, max_norm)

    return [(mooshak_torch.optimizer, "clip_gradients", clip)]


def _optimizer_torch(change: Callable[[Any, Any, Any], Any]) -> list[Patch]:
    """`change(make_optimizer, model, config)` makes torch's optimizer."""
    original = mooshak_torch.optimizer.make_optimizer

    def make(model: Any, config: Any) -> Any:
        return change(original, model, config)

    return [(mooshak_torch.optimizer, "make_optimizer", make)]


def _optimizer_jax(change: Callable[..., Any]) -> list[Patch]:
    """`change(adamw, state, grads, rate, config)` makes JAX's step."""
    original = js.adamw
    return [(js, "adamw", lambda *args: change(original, *args))]


def _uncorrected_torch(make: Any, model: Any, config: Any) -> Any:
    optimizer = make(model, config)
    mooshak_torch.optimizer.moments(model, optimizer)
    mooshak_torch.optimizer.set_step(optimizer, 10**6)
    return optimizer


def _uncorrected_jax(adamw: Any, state: Any, *args: Any) -> Any:
    return adamw(state | {"step": state["step"] + 10**6}, *args) | {"step": state["step"] + 1}


def _step_torch(change: Callable[[int, list, Any], tuple[Any, float]]) -> list[Patch]:
    """`change(step, batches seen, config)` gives the batch and the rate that torch takes."""
    original, seen = ts.train_step, []

    def train_step(
        objective: Any, optimizer: Any, batch: Any, rate: Any, config: Any, *rest: Any
    ) -> Any:
        seen.append(batch)
        batch, rate = change(len(seen) - 1, seen, config)
        return original(objective, optimizer, batch, rate, config, *rest)

    return [(ts, "train_step", train_step)]


def _step_jax(change: Callable[[int, list, Any], tuple[Any, float]]) -> list[Patch]:
    original = js.make_train_step

    def make_train_step(config: Any, *rest: Any) -> Any:
        update, seen = original(config, *rest), []

        def train_step(state: Any, batch: Any, rate: float) -> Any:
            seen.append(batch)
            batch, rate = change(len(seen) - 1, seen, config)
            return update(state, batch, rate)

        return train_step

    return [(js, "make_train_step", make_train_step)]


def _late(step: int, seen: list, config: Any) -> tuple[Any, float]:
    return seen[max(step - 1, 0)], learning_rate(config, step)


def _next_rate(step: int, seen: list, config: Any) -> tuple[Any, float]:
    return seen[step], learning_rate(config, step + 1)


def _summed_torch() -> list[Patch]:
    original = to.CausalLM.forward

    def forward(self: Any, batch: Batch) -> torch.Tensor:
        # The parts of an accumulated batch are told by their number of rows.
        return original(self, batch) * (2 if len(batch.tokens) == SUMMED_ROWS else 1)

    return [(to.CausalLM, "forward", forward)]


def _summed_jax() -> list[Patch]:
    original = jo.CausalLM.__call__

    def call(self: Any, params: Any, batch: Batch) -> jax.Array:
        return original(self, params, batch) * (2 if len(batch.tokens) == SUMMED_ROWS else 1)

    return [(jo.CausalLM, "__call__", call)]


SUMMED_ROWS = 2
"""Rows of a part in the accumulation of the check: a batch of four in two parts."""


def _cache_torch() -> list[Patch]:
    original = tm.KVCache.update

    def update(self: Any, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor) -> Any:
        return original(self, k, v, (positions + 1) % self.k_BSGK.shape[1])

    return [(tm.KVCache, "update", update)]


def _cache_jax() -> list[Patch]:
    original = jm.KVCache.update

    def update(self: Any, k: jax.Array, v: jax.Array, positions: jax.Array) -> Any:
        return original(self, k, v, (positions + 1) % self.k_BSGK.shape[1])

    return [(jm.KVCache, "update", update)]


def _renamed(names: dict[str, str]) -> Callable[[Checkpoint], Checkpoint]:
    """Read `names[key]` where `key` is asked for."""

    def change(source: Checkpoint) -> Checkpoint:
        def read(key: str, rows: slice = FULL_SLICE) -> np.ndarray:
            return source.read(names.get(key, key), rows)

        return replace(source, read=read)

    return change


def _changed(key: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[..., Checkpoint]:
    """Read the tensor `key` changed."""

    def changed(source: Checkpoint) -> Checkpoint:
        def read(k: str, rows: slice = FULL_SLICE) -> np.ndarray:
            return change(source.read(k))[rows] if k == key else source.read(k, rows)

        return replace(source, read=read)

    return changed


def _swapped(a: str, b: str) -> dict[str, str]:
    return {a: b, b: a}


_LAYER = (
    "attention.wq.weight",
    "attention.wk.weight",
    "attention.wv.weight",
    "mlp_norm.weight",
    "mlp.w1.weight",
    "mlp.w2.weight",
    "mlp.w3.weight",
    "output_norm.weight",
)
_PERMUTED = {
    key: value
    for name in _LAYER
    for key, value in _swapped(f"layers.1.{name}", f"layers.2.{name}").items()
}

FAULTS = {
    "RoPE turns neighbours, not halves": Fault(
        "forward",
        "^layer 0 attention, RoPE of q",
        torch=lambda: [(tm.Rope, "forward", _rotate_pairs_torch)],
        jax=lambda: [(jm.Rope, "__call__", _rotate_pairs_jax)],
    ),
    "RoPE theta 1 % off": Fault(
        "forward", "^layer 0 attention, RoPE of q", lambda: _theta(tm), lambda: _theta(jm)
    ),
    "wq and wk of layer 1 swapped": Fault(
        "forward",
        "^layer 1 attention, wq$",
        read=_renamed(_swapped("layers.1.attention.wq.weight", "layers.1.attention.wk.weight")),
    ),
    "square wv of layer 1 transposed": Fault(
        "forward",
        "^layer 1 attention, wv$",
        read=_changed("layers.1.attention.wv.weight", np.transpose),
    ),
    "RMSNorm epsilon 1e-6": Fault(
        "forward", "^layer 0 mlp_norm$", lambda: _eps(tm.RMSNorm), lambda: _eps(jm.RMSNorm)
    ),
    "RMSNorm mean over time": Fault(
        "forward", "^layer 0 mlp_norm$", lambda: _norm_torch(axis=1), lambda: _norm_jax(axis=1)
    ),
    "RMSNorm gain plus one": Fault(
        "forward", "^layer 0 mlp_norm$", lambda: _norm_torch(offset=1), lambda: _norm_jax(offset=1)
    ),
    "norm after the MLP": Fault(
        "forward",
        "^layer 0, input of (mlp_norm|mlp)",
        lambda: _block(tm.MooshakBlock, "forward", norm_after=True, residual=True),
        lambda: _block(jm.MooshakBlock, "__call__", norm_after=True, residual=True),
    ),
    "residual of the attention missing": Fault(
        "forward",
        "^layer 0, input of mlp_norm",
        lambda: _block(tm.MooshakBlock, "forward", norm_after=False, residual=False),
        lambda: _block(jm.MooshakBlock, "__call__", norm_after=False, residual=False),
    ),
    "GELU for SiLU": Fault("forward", "^layer 0 mlp, silu", _mlp_torch, _mlp_jax),
    "w1 and w3 of layer 0 swapped": Fault(
        "forward",
        "^layer 0 mlp, w1$",
        read=_renamed(_swapped("layers.0.mlp.w1.weight", "layers.0.mlp.w3.weight")),
    ),
    "mask one position too late": Fault(
        "forward",
        "^layer 0 attention, softmax",
        lambda: _attend(tm, _mask_torch),
        lambda: _attend(jm, _mask_jax),
    ),
    "attention not scaled": Fault(
        "forward",
        "^layer 0 attention, softmax",
        lambda: _attend(tm, _unscaled),
        lambda: _attend(jm, _unscaled),
    ),
    "softmax in float32 inside float64": Fault(
        "forward",
        "^layer 0 attention, softmax",
        lambda: _attend(tm, _softmax32_torch),
        lambda: _attend(jm, _softmax32_jax),
    ),
    "bfloat16 products inside float32": Fault(
        "precision",
        "^layer 0 attention, wq$",
        lambda: _coarse(tm.Linear, "forward", _round_torch),
        lambda: _coarse(jm.Linear, "__call__", _round_jax),
    ),
    "embedding times sqrt(width)": Fault(
        "forward",
        "^embeddings$",
        lambda: _embedding(tm.Embedding, "forward"),
        lambda: _embedding(jm.Embedding, "__call__"),
    ),
    "layers 1 and 2 permuted": Fault(
        "forward", "^layer 1 attention, wq$", read=_renamed(_PERMUTED)
    ),
    "rows of lm_head permuted": Fault(
        "forward", "^lm_head$", read=_changed("lm_head.weight", lambda w: np.roll(w, 1, 0))
    ),
    "labels not shifted": Fault("loss", "^loss", _unshifted_torch, _unshifted_jax),
    "padding counts in the loss": Fault(
        "padding",
        "^loss of labels that are padding",
        lambda: _padding(mooshak_torch.ops.cross_entropy),
        lambda: _padding(mooshak_jax.ops.cross_entropy),
    ),
    "clipping after the step": Fault(
        "training",
        "^step 0, clipping",
        _clip_afterwards_torch,
        lambda: _clipped(lambda grads, norm, max_norm: grads),
    ),
    "1e-6 added to the norm that clips": Fault(
        "training",
        "^step 0, clipping",
        _clip_epsilon_torch,
        lambda: _clipped(
            lambda grads, norm, max_norm: jax.tree.map(
                lambda g: g * jnp.minimum(max_norm / (norm + 1e-6), 1), grads
            )
        ),
    ),
    "decay on gains": Fault(
        "training",
        "^step 0, weight decay of gains",
        lambda: [(mooshak_torch.optimizer, "has_weight_decay", lambda name: True)],
        lambda: [(mooshak_jax.optimizer, "has_weight_decay", lambda name: True)],
    ),
    "decay missing": Fault(
        "training",
        "^step 0, weight decay of matrices",
        lambda: [(mooshak_torch.optimizer, "has_weight_decay", lambda name: False)],
        lambda: [(mooshak_jax.optimizer, "has_weight_decay", lambda name: False)],
    ),
    "beta1 0.91": Fault(
        "training",
        "^step 0, clipping or beta1",
        lambda: _optimizer_torch(lambda make, model, c: make(model, replace(c, beta1=0.91))),
        lambda: _optimizer_jax(lambda adamw, s, g, r, c: adamw(s, g, r, replace(c, beta1=0.91))),
    ),
    "beta2 0.999": Fault(
        "training",
        "^step 0, exp_avg_sq",
        lambda: _optimizer_torch(lambda make, model, c: make(model, replace(c, beta2=0.999))),
        lambda: _optimizer_jax(lambda adamw, s, g, r, c: adamw(s, g, r, replace(c, beta2=0.999))),
    ),
    "AdamW epsilon ten times as large": Fault(
        "training",
        "^step 0, bias correction or epsilon",
        lambda: _optimizer_torch(lambda make, model, c: make(model, replace(c, eps=10 * c.eps))),
        lambda: _optimizer_jax(
            lambda adamw, s, g, r, c: adamw(s, g, r, replace(c, eps=10 * c.eps))
        ),
    ),
    "bias correction missing": Fault(
        "training",
        "^step 0, bias correction or epsilon",
        lambda: _optimizer_torch(_uncorrected_torch),
        lambda: _optimizer_jax(_uncorrected_jax),
    ),
    "learning rate of the next step": Fault(
        "training",
        "^step 0, learning rate",
        lambda: _step_torch(_next_rate),
        lambda: _step_jax(_next_rate),
    ),
    "accumulation by sum": Fault("training", "^step 0, accumulation", _summed_torch, _summed_jax),
    "data one batch late": Fault(
        "training",
        "^step 1, data order",
        lambda: _step_torch(_late),
        lambda: _step_jax(_late),
    ),
    "KV cache one position late": Fault("cache", "^KV cache", _cache_torch, _cache_jax),
    "norm after the attention": Fault(
        "forward",
        "^layer 0, input of attention$|^layer 0 attention, wq|^layer 0, input of attention",
        lambda: _post_norm(tm.LlamaBlock, "forward"),
        lambda: _post_norm(jm.LlamaBlock, "__call__"),
        architecture="llama",
    ),
    "window one position wider": Fault(
        "forward",
        "^layer 0 attention, softmax",
        lambda: _window(tm),
        lambda: _window(jm),
        architecture="llama",
    ),
    "frequencies of RoPE not rescaled": Fault(
        "forward",
        "^layer 0 attention, RoPE of q",
        lambda: _unscaled_frequencies(tm),
        lambda: _unscaled_frequencies(jm),
        architecture="llama",
    ),
    "rows of wo permuted": Fault(
        "forward",
        "^layer 1 attention, wo$",
        read=_changed("layers.1.attention.wo.weight", lambda w: np.roll(w, 1, 0)),
        architecture="llama",
    ),
    "bias of wk missing": Fault(
        "forward",
        "^layer 1 attention, wk$",
        read=_changed("layers.1.attention.wk.bias", np.zeros_like),
        architecture="llama",
    ),
    "norms of queries and keys swapped": Fault(
        "forward",
        "^layer 2 attention, q_norm$",
        read=_renamed(
            _swapped("layers.2.attention.q_norm.weight", "layers.2.attention.k_norm.weight")
        ),
        architecture="llama",
    ),
    "gains of the final norm missing": Fault(
        "forward",
        "^norm$",
        read=_changed("norm.weight", np.ones_like),
        architecture="llama",
    ),
}
"""Name -> fault."""
