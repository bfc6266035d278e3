"""Workers in JAX: ours, and a plain training loop as in the guides of Flax and optax."""

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array

from benchmarks.case import Size, config
from benchmarks.serving import decode_tales, engine_options, load_pair, serve
from benchmarks.worker import Repeat, by_turns, timed
from mooshak.checkpoints.base import MOMENTS
from mooshak.data.packing import Batch, make_batch
from mooshak.training.malloc import WARMUP_STEPS, retain_freed_memory, use_single_arena
from mooshak_jax import load
from mooshak_jax.checkpoint import start_saving
from mooshak_jax.decode import generate as our_generate
from mooshak_jax.distributed.mesh import make_parallel
from mooshak_jax.engine import Engine
from mooshak_jax.lm import LM
from mooshak_jax.objectives import make_objective
from mooshak_jax.params import initialize, make_graphdef, merge
from mooshak_jax.step import initial_state, make_train_step, set_matmul_precision


def train(size: Size) -> Repeat:
    """Time an optimizer step of our trainer."""
    step, batch = _our_step(size), make_batch(_batch(size))
    return _warm(lambda: step(batch), WARMUP_STEPS)


def train_with_pipeline(size: Size) -> Repeat:
    """Compare the time of steps with the input pipeline with that on a constant batch."""
    from benchmarks.pipeline import our_batches

    step, batches = _our_step(size), our_batches(size)
    batch = next(batches)
    work = (lambda: step(next(batches)), lambda: step(batch))
    _warm(work[0], WARMUP_STEPS)
    return lambda: by_turns(*work, size["steps"])


def gradients(size: Size) -> Repeat:
    """Time loss and gradients of our model, as in a step."""
    params = _params(size)
    objective = make_objective(config(size).model, config(size))
    options = make_parallel(config(size)).compiler_options
    both = jax.jit(jax.value_and_grad(objective), compiler_options=options)
    return _warm(lambda: both(params, make_batch(_batch(size))))


def block(size: Size) -> Repeat:
    """Time forward and backward of our layer."""
    use_single_arena()  # As the trainer's command does.
    graphdef, params = make_graphdef(config(size).model, "float32"), _params(size)
    shape = (size["batch_size"], size["sequence_length"], size["dim"])
    x_BTD, out_BTD = (jnp.asarray(a) for a in np.random.default_rng(0).normal(size=(2, *shape)))

    def dot(params: Any, x_BTD: Array) -> Array:
        model = merge(graphdef, params)
        positions_BT = jnp.arange(shape[1])[None]
        return jnp.sum(
            model.layers[0](x_BTD, model.rope, model.rope.lookup(positions_BT))[0] * out_BTD
        )

    options = make_parallel(config(size)).compiler_options
    both = jax.jit(jax.grad(dot, (0, 1)), compiler_options=options)
    return _warm(lambda: both(params, x_BTD), WARMUP_STEPS)


def generate(size: Size) -> Repeat:
    """Time our greedy decoding."""
    graphdef, params = make_graphdef(config(size).model, "float32"), _params(size)
    prompts = _batch(size)[:, : size["prompt"]].tolist()
    return _warm(lambda: our_generate(graphdef, params, prompts, size["new_tokens"]))


def engine(size: Size) -> Repeat:
    """Time our engine on requests of unequal lengths."""
    lm = _random_lm(size)
    return serve(lm, Engine(lm, **engine_options(size)), size)


def engine_on_batch(size: Size) -> Repeat:
    """Time our engine on the batch of `generate`."""
    return engine(size | {name: (size[name], size[name]) for name in ("prompt", "new_tokens")})


def plain(size: Size) -> Repeat:
    """Time greedy decoding of tales."""
    return decode_tales(load_pair(size, load, _random_lm)[0], None, size)


def speculative(size: Size) -> Repeat:
    """Time greedy decoding of tales with a draft."""
    return decode_tales(*load_pair(size, load, _random_lm), size)


def _random_lm(size: Size) -> LM:
    parallel = make_parallel(config(size))
    return LM(config(size).model, "float32", _params(size), None, parallel)


def prefill(size: Size) -> Repeat:
    """Time our generation of a single token, which is the prefill of the prompt."""
    return generate(size | {"new_tokens": 1})


def save(size: Size) -> Repeat:
    """Time how long a save in the background blocks training."""
    return _save(size, blocking=False)


def save_blocking(size: Size) -> Repeat:
    """Time a save until the state is on the disk."""
    return _save(size, blocking=True)


def optax_train(size: Size) -> Repeat:
    """Time a plain training step: Flax modules, all logits at once, an optax chain."""
    model = _Llama(size, nnx.Rngs(0))
    optimizer = nnx.Optimizer(
        model,
        optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-4, weight_decay=0.1)),
        wrt=nnx.Param,
    )
    batch_BS = jnp.asarray(_batch(size))

    @nnx.jit
    def step(model: nnx.Module, optimizer: nnx.Optimizer, batch_BS: Array) -> Array:
        def loss(model: nnx.Module) -> Array:
            logits_BTV = model(batch_BS[:, :-1])
            losses_BT = optax.softmax_cross_entropy_with_integer_labels(logits_BTV, batch_BS[:, 1:])
            return losses_BT.mean()

        value, grads = nnx.value_and_grad(loss)(model)
        optimizer.update(model, grads)
        return value

    return _warm(lambda: step(model, optimizer, batch_BS))


class _Llama(nnx.Module):
    def __init__(self, size: Size, rngs: nnx.Rngs):
        self.embed = nnx.Embed(size["vocab_size"], size["dim"], rngs=rngs)
        self.layers = nnx.List([_Layer(size, rngs) for _ in range(size["n_layers"])])
        self.norm = nnx.RMSNorm(size["dim"], rngs=rngs)
        self.head = nnx.Linear(size["dim"], size["vocab_size"], use_bias=False, rngs=rngs)

    def __call__(self, tokens_BT: Array) -> Array:
        x_BTD = self.embed(tokens_BT)
        for layer in self.layers:
            x_BTD = layer(x_BTD)
        return self.head(self.norm(x_BTD))


class _Layer(nnx.Module):
    def __init__(self, size: Size, rngs: nnx.Rngs):
        self.n_heads, D, F = size["n_heads"], size["dim"], size["hidden_dim"]
        linear = partial(nnx.Linear, use_bias=False, rngs=rngs)
        self.q, self.k, self.v, self.o = (linear(D, D) for _ in range(4))
        self.w1, self.w3, self.w2 = linear(D, F), linear(D, F), linear(F, D)
        self.norm1, self.norm2 = nnx.RMSNorm(D, rngs=rngs), nnx.RMSNorm(D, rngs=rngs)

    def __call__(self, x_BTD: Array) -> Array:
        h_BTD = self.norm1(x_BTD)
        q, k, v = (
            linear(h_BTD).reshape(*h_BTD.shape[:2], self.n_heads, -1)
            for linear in (self.q, self.k, self.v)
        )
        out = jax.nn.dot_product_attention(_rotated(q), _rotated(k), v, is_causal=True)
        x_BTD = x_BTD + self.o(out.reshape(x_BTD.shape))
        h_BTD = self.norm2(x_BTD)
        return x_BTD + self.w2(jax.nn.silu(self.w1(h_BTD)) * self.w3(h_BTD))


def _rotated(x_BTHK: Array) -> Array:
    T, half = x_BTHK.shape[1], x_BTHK.shape[3] // 2
    angles_Tk = jnp.arange(T)[:, None] / 10000 ** (jnp.arange(half) / half)
    cos, sin = (f(angles_Tk)[None, :, None] for f in (jnp.cos, jnp.sin))
    a, b = jnp.split(x_BTHK, 2, axis=-1)
    return jnp.concatenate((a * cos - b * sin, b * cos + a * sin), axis=-1)


def _save(size: Size, blocking: bool) -> Repeat:
    use_single_arena()
    retain_freed_memory()
    state = initial_state(_params(size))
    saved = {key: state[key] for key in ("params", *MOMENTS)}
    directory = tempfile.TemporaryDirectory()
    numbers = iter(range(10**6))

    def repeat() -> float:
        path = Path(directory.name) / str(next(numbers))
        waits: list[Callable[[], None]] = []

        def work() -> None:
            waits.append(start_saving(saved, path))
            if blocking:
                waits[0]()

        seconds = timed(work)
        waits[0]()
        return seconds

    repeat()
    return repeat


def _our_step(size: Size) -> Callable[[Batch], Any]:
    use_single_arena()  # As the trainer's command does.
    parallel = make_parallel(config(size))
    set_matmul_precision(config(size))
    state = initial_state(initialize(config(size).model, "float32", 0, parallel=parallel))
    step = make_train_step(config(size), parallel)
    rate: Any = np.float32(1e-4)

    def one(batch: Batch) -> Any:
        nonlocal state
        state, loss, norm = step(state, parallel.shard_local_batch(batch), rate)
        return jax.block_until_ready((loss, norm))

    return one


def _params(size: Size) -> Any:
    set_matmul_precision(config(size))
    return initialize(config(size).model, "float32", 0)


def _warm(work: Callable[[], Any], times: int = 2) -> Repeat:
    """Run the work before it is measured, to compile it and to allocate its memory."""

    def finished() -> None:
        jax.block_until_ready(work())

    for _ in range(times):
        finished()
    retain_freed_memory()  # Where a single arena is used.
    return lambda: timed(finished)


def _batch(size: Size) -> np.ndarray:
    """Return the same random tokens every time, int32 [B, T + 1]."""
    shape = (size["batch_size"], size["sequence_length"] + 1)
    return np.random.default_rng(0).integers(0, size["vocab_size"], shape).astype(np.int32)
