"""The training step of the JAX model: state, one compiled optimizer step, evaluation."""

import contextlib
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mooshak.checkpoints.base import MOMENTS, Checkpoint
from mooshak.config.sections import Config
from mooshak.data.packing import Batch, pad_rows
from mooshak.errors import InputError
from mooshak.tokenizer.base import Tokenizer
from mooshak_jax.checkpoint import load_init_weights, open_checkpoint, restore, start_saving
from mooshak_jax.distributed.mesh import Parallel, make_parallel
from mooshak_jax.model import PARAM_DTYPE
from mooshak_jax.objectives import make_objective
from mooshak_jax.optimizer import adamw, clip_gradients
from mooshak_jax.params import abstract_params, initialize
from mooshak_jax.profile import profiled

State = dict[str, Any]
"""`params`, `exp_avg` and `exp_avg_sq`, trees alike, and `step`, the optimizer steps done."""


class Trainer:
    """The training state in JAX, for `mooshak.training.loop`."""

    framework = "jax"

    def __init__(self, config: Config):
        if config.train.dtype == "float16":
            raise InputError(
                "train.dtype float16 needs its gradients scaled, which only mooshak_torch.train "
                "does; use bfloat16"
            )
        self.config, self.processes = config, make_parallel(config)
        set_matmul_precision(config)
        parallel = self.processes
        self.world_size, self.n_devices = jax.process_count(), parallel.mesh.size
        self.layout, self.rows = parallel.layout, parallel.rows_here(config.train.batch_size)
        self.device: str = jax.devices()[0].device_kind
        self.open_checkpoint, self.profiled = open_checkpoint, profiled
        self.explain_timeouts = contextlib.nullcontext
        self.peak_memory = peak_memory
        self.update, self.measure = (
            make_train_step(config, parallel),
            make_evaluate(config, parallel),
        )

    def initialize(self, tokenizer: Tokenizer) -> None:
        config, parallel = self.config, self.processes
        if config.init.from_:
            params = load_init_weights(config, tokenizer, parallel)
        else:
            params = initialize(
                config.model, config.train.dtype, config.run.seed, parallel=parallel
            )
        self.state = initial_state(params)

    def restore(self, source: Checkpoint) -> None:
        assert source.trainer_state is not None
        self.state = restore(self.config.model, self.config.train.dtype, source, self.processes)
        self.state["step"] = np.int32(source.trainer_state["step"])

    def step(self, batch: Batch, rate: float, stop: bool) -> tuple[dict[str, float], bool]:
        mine = self.processes.shard_local_batch(batch)
        self.state, loss, norm = self.update(self.state, mine, rate)
        stopping = self.processes.any_process(stop)
        return {"loss": float(loss), "grad_norm": float(norm)}, stopping

    def evaluate(self, batch: Batch) -> float:
        return evaluate(self.measure, self.state["params"], batch, self.config, self.processes)

    def start_saving(self, path: Path) -> Callable[[], None]:
        return start_saving({key: self.state[key] for key in ("params", *MOMENTS)}, path)

    def trainer_state(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        """Do nothing: JAX leaves the other processes when this one exits."""


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
) -> Callable[[State, Batch[Array], float], tuple[State, Array, Array]]:
    """The function of one optimizer step: (state, global batch, rate) -> (state, loss, norm).

    It is compiled once and takes over the memory of the state that it is given.
    """
    objective = make_objective(config.model, config)
    n_parts = config.train.gradient_accumulation_steps

    def train_step(state: State, batch: Batch[Array], rate: Array) -> tuple[State, Array, Array]:
        denominator = objective.prepare(batch)
        mean = jax.value_and_grad(lambda params, part: objective(params, part) / denominator)

        def add_part(total: Any, part: Batch[Array]) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, mean(state["params"], part)), None

        with parallel.activate():
            if n_parts == 1:
                loss, grads = mean(state["params"], batch)
            else:
                # Row r goes to part r % n_parts: every device keeps the rows that it has.
                parts = batch.map(lambda x: x.reshape(-1, n_parts, x.shape[1]).swapaxes(0, 1))
                zero = jnp.zeros((), PARAM_DTYPE[config.train.dtype])
                nothing = (zero, jax.tree.map(jnp.zeros_like, state["params"]))
                (loss, grads), _ = jax.lax.scan(add_part, nothing, parts)
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


def make_evaluate(config: Config, parallel: Parallel) -> Callable[[Any, Batch[Array]], Array]:
    """The compiled function (params, batch) -> summed cross entropy in nats."""
    forward_only = replace(config.train, remat="none")
    objective = make_objective(config.model, replace(config, train=forward_only))

    def measure(params: Any, batch: Batch[Array]) -> Array:
        with parallel.activate():
            return objective(params, batch)

    abstract = abstract_params(config.model, config.train.dtype, parallel)
    cut = jax.tree.map(lambda array: array.sharding, abstract)
    return jax.jit(
        measure,
        in_shardings=(cut, parallel.rows),
        out_shardings=parallel.replicated,
        compiler_options=parallel.compiler_options,
    )


def evaluate(
    measure: Callable[[Any, Batch[Array]], Array],
    params: Any,
    batch: Batch,
    config: Config,
    parallel: Parallel,
) -> float:
    """Summed cross entropy, in nats, of the labels of a batch [N, T] that are not ignored."""
    n_shards = parallel.row_shards
    rows = -(-config.evaluate.batch_size // n_shards) * n_shards
    total = 0.0
    for start in range(0, len(batch.tokens), rows):
        part = pad_rows(batch.rows(slice(start, start + rows)), rows)
        total += float(measure(params, parallel.shard_global_batch(part)))
    return total


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
