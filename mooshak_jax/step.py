"""The training step of the JAX model: state, one compiled optimizer step, evaluation."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mooshak.checkpoints.base import MOMENTS
from mooshak.config.sections import Config
from mooshak_jax.distributed.mesh import Parallel
from mooshak_jax.model import PARAM_DTYPE
from mooshak_jax.objectives import objective
from mooshak_jax.optimizer import adamw, clip_gradients
from mooshak_jax.params import abstract_params, make_graphdef

State = dict[str, Any]
"""`params`, `exp_avg` and `exp_avg_sq`, trees alike, and `step`, the optimizer steps done."""


def initial_state(params: Any) -> State:
    """The state before the first step, its moments cut as the parameters are."""
    cut = jax.tree.map(lambda p: p.sharding, params)
    zeros = jax.jit(partial(jax.tree.map, jnp.zeros_like), out_shardings=cut)
    moments = {moment: zeros(params) for moment in MOMENTS}
    return {"params": params, **moments, "step": np.int32(0)}


def abstract_state(config: Config, parallel: Parallel) -> State:
    """Shapes, dtypes and shardings of the state, without allocating any."""
    params = abstract_params(config.model, config.train.dtype, parallel)
    step = jax.ShapeDtypeStruct((), jnp.int32, sharding=parallel.replicated)
    return {"params": params, **dict.fromkeys(MOMENTS, params), "step": step}


def make_train_step(
    config: Config, parallel: Parallel
) -> Callable[[State, Array, float], tuple[State, Array, Array]]:
    """The function of one optimizer step: (state, batch [B, T + 1], rate) -> (state, loss, norm).

    It is compiled once and takes over the memory of the state that it is given.
    """
    graphdef = make_graphdef(config.model, config.train.dtype, config.train.remat)
    compute = partial(objective, graphdef, config.train.loss_chunk)
    n_parts = config.train.gradient_accumulation_steps

    def train_step(state: State, batch_BS: Array, rate: Array) -> tuple[State, Array, Array]:
        n_tokens = batch_BS[:, 1:].size
        mean = jax.value_and_grad(lambda params, part: compute(params, part) / n_tokens)

        def add_part(total: Any, part_BS: Array) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, mean(state["params"], part_BS)), None

        with parallel.activate():
            if n_parts == 1:
                loss, grads = mean(state["params"], batch_BS)
            else:
                # Row r goes to part r % n_parts: every device keeps the rows that it has.
                parts_nBS = batch_BS.reshape(-1, n_parts, batch_BS.shape[1]).swapaxes(0, 1)
                zero = jnp.zeros((), PARAM_DTYPE[config.train.dtype])
                nothing = (zero, jax.tree.map(jnp.zeros_like, state["params"]))
                (loss, grads), _ = jax.lax.scan(add_part, nothing, parts_nBS)
        grads, norm = clip_gradients(grads, config.optimizer.max_grad_norm)
        return adamw(state, grads, rate, config.optimizer), loss, norm

    whole = parallel.replicated
    cut = jax.tree.map(lambda array: array.sharding, abstract_state(config, parallel))
    return jax.jit(
        train_step,
        in_shardings=(cut, parallel.rows, whole),
        out_shardings=(cut, whole, whole),
        donate_argnums=0,
        compiler_options=parallel.compiler_options,
    )


def make_evaluate(config: Config, parallel: Parallel) -> Callable[[Any, Array], Array]:
    """The compiled function (params, batch [B, T + 1]) -> summed cross entropy in nats."""
    compute = partial(
        objective, make_graphdef(config.model, config.train.dtype), config.train.loss_chunk
    )

    def measure(params: Any, batch_BS: Array) -> Array:
        with parallel.activate():
            return compute(params, batch_BS)

    abstract = abstract_params(config.model, config.train.dtype, parallel)
    cut = jax.tree.map(lambda array: array.sharding, abstract)
    return jax.jit(
        measure,
        in_shardings=(cut, parallel.rows),
        out_shardings=parallel.replicated,
        compiler_options=parallel.compiler_options,
    )


def evaluate(
    measure: Callable[[Any, Array], Array],
    params: Any,
    sequences_NS: np.ndarray,
    config: Config,
    parallel: Parallel,
) -> float:
    """Summed cross entropy, in nats, of all tokens but the first of each sequence."""
    n_shards = parallel.row_shards
    rows = -(-config.evaluate.batch_size // n_shards) * n_shards
    total = 0.0
    for start in range(0, len(sequences_NS), rows):
        batch_BS = sequences_NS[start : start + rows].astype(np.int32)
        # Rows are added to make a whole batch: a first token alone, then labels that do not count.
        missing = rows - len(batch_BS)
        filler_BS = np.full((missing, batch_BS.shape[1]), IGNORED_ROW, np.int32)
        batch_BS = np.concatenate([batch_BS, filler_BS])
        total += float(measure(params, parallel.shard_global_batch(batch_BS)))
    return total


IGNORED_ROW = -100
"""As a label it counts nothing; as an input it reads some row of the embedding, to no effect."""


def set_matmul_precision(config: Config) -> None:
    """float32 means float32 on every device, and float64 exists where it is asked for."""
    jax.config.update("jax_default_matmul_precision", "highest")
    if config.train.dtype == "float64":
        jax.config.update("jax_enable_x64", True)


def cache_compilations() -> None:
    """Keep what is compiled in the user's cache, unless JAX_COMPILATION_CACHE_DIR says where."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(home / "mooshak" / "jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def peak_memory() -> dict[str, float]:
    """Peak memory in bytes: of the first device, or of this process."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return {"memory_bytes": float(stats["peak_bytes_in_use"])}
    import resource

    return {"memory_bytes": 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}
