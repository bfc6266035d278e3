"""Training step of the JAX model: state, one compiled optimizer step, evaluation.

Mirror: mooshak_torch/step.py.
"""

import contextlib
import math
import os
from collections.abc import Callable, Set
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mooshak.checkpoints.base import MOMENTS, Checkpoint
from mooshak.checkpoints.resume import loss_scale_of, n_updates, skipped_steps
from mooshak.config.sections import Config
from mooshak.data.packing import Batch, pad_rows
from mooshak.errors import InputError
from mooshak.numerics.metrics import objective_metrics
from mooshak.tokenizer.base import Tokenizer
from mooshak_jax.checkpoint import load_init_weights, open_checkpoint, restore, start_saving
from mooshak_jax.distributed.mesh import Parallel, make_parallel
from mooshak_jax.model import PARAM_DTYPE
from mooshak_jax.objectives import CausalLM, compile_forward, make_objective
from mooshak_jax.optimizer import adamw, clip_gradients
from mooshak_jax.params import abstract_params, gather_weights, initialize, join, split_trained
from mooshak_jax.profile import profiled
from mooshak_jax.reference import Reference, add_reference, make_log_probs, make_reference

State = dict[str, Any]
"""The trees `params`, `exp_avg` and `exp_avg_sq`, and `step`, the optimizer steps done.

Moments are only those of trained parameters. A preference objective adds `metrics`, the means over
the pairs of the latest step.
"""


class Trainer:
    """Training state in JAX; implements `mooshak.training.loop.Trainer`."""

    framework = "jax"

    def __init__(self, config: Config):
        if config.train.dtype == "float16":
            raise InputError(
                "train.dtype float16 needs a loss scale, which only mooshak_torch.train has; use "
                "bfloat16"
            )
        self.config, self.processes = config, make_parallel(config)
        set_matmul_precision(config)
        parallel = self.processes
        self.world_size, self.n_devices = parallel.world_size, parallel.mesh.size
        self.layout, self.rows = parallel.layout, parallel.rows(config.train.batch_size)
        self.device: str = jax.devices()[0].device_kind
        self.open_checkpoint, self.profiled = open_checkpoint, profiled
        self.explain_timeouts, self.peak_memory = contextlib.nullcontext, peak_memory
        self._train_step = make_train_step(config, parallel)
        self._evaluate = make_evaluate(config, parallel)
        self._log_probs = make_log_probs(config, parallel, parallel.replicated)
        self.reference: Reference | None = None
        self._finite = jax.jit(
            partial(jax.tree.map, lambda x: jnp.isfinite(x).all()),
            out_shardings=parallel.replicated,
        )

    def initialize(self, tokenizer: Tokenizer) -> None:
        config, parallel = self.config, self.processes
        if config.init.from_:
            params = load_init_weights(config, tokenizer, parallel)
        else:
            params = initialize(
                config.model, config.train.dtype, config.run.seed, parallel=parallel
            )
        self.state, self._earlier = initial_state(params, config.frozen), dict[str, Any]()
        self._skipped = 0
        self._add_metrics()

    def restore(self, source: Checkpoint) -> None:
        assert source.trainer_state is not None
        model, dtype, frozen = self.config.model, self.config.train.dtype, self.config.frozen
        self.state = restore(model, dtype, source, self.processes, frozen)
        self.state["step"] = np.int32(n_updates(source.trainer_state))
        self._earlier = loss_scale_of(source.trainer_state)
        self._skipped = skipped_steps(source.trainer_state)
        self._add_metrics()

    def load_reference(self, tokenizer: Tokenizer) -> None:
        self.reference = make_reference(self.config, self.processes, tokenizer)

    def _add_metrics(self) -> None:
        """Add the metrics of the latest step, zeros before one, to the state."""
        for name, like in abstract_metrics(self.config, self.processes).items():
            zero = jax.device_put(np.zeros((), like.dtype), like.sharding)
            self.state.setdefault("metrics", {})[name] = zero

    def step(
        self, batch: Batch, rate: float, stop: Callable[[], bool]
    ) -> tuple[dict[str, float], bool]:
        global_batch = self.processes.shard_local_batch(batch)
        global_batch = add_reference(self.reference, self.state["params"], global_batch)
        self.state, loss, norm = self._train_step(self.state, global_batch, rate)
        # The processes exchange their flags while the devices compute.
        stopping = self.processes.any_process(stop())
        metrics = {"loss": float(loss), "grad_norm": float(norm)}
        means = self.state.get("metrics", {})  # A compiled function sorts the names.
        metrics |= {name: float(means[name]) for name in objective_metrics(self.config)}
        if self.config.train.on_nonfinite == "skip":
            self._skipped += not all(map(math.isfinite, metrics.values()))
        return metrics, stopping

    def evaluate(self, batch: Batch) -> dict[str, float]:
        params, config = self.state["params"], self.config
        return evaluate(self._evaluate, params, batch, config, self.processes, self.reference)

    def reference_log_probs(self, batch: Batch) -> np.ndarray:
        global_batch = self.processes.shard_global_batch(batch)
        params, log_probs = self.state["params"], self._log_probs
        if self.reference is not None:
            params, log_probs = self.reference.params_of(params), self.reference.replicated
        return np.asarray(log_probs(params, global_batch), np.float64)

    def token_log_probs(self, batch: Batch) -> np.ndarray:
        global_batch = self.processes.shard_global_batch(batch)
        return np.asarray(self._log_probs(self.state["params"], global_batch), np.float64)

    def gather_weights(self) -> Checkpoint:
        return gather_weights(self.state["params"], self.config.model)

    def start_saving(self, path: Path) -> Callable[[], None]:
        return start_saving({key: self.state[key] for key in ("params", *MOMENTS)}, path)

    def find_nonfinite(self) -> str:
        finite = self._finite({key: self.state[key] for key in ("params", *MOMENTS)})
        for path, good in jax.tree_util.tree_leaves_with_path(finite):
            if not good:
                group, *names = (str(getattr(key, "key", key)) for key in path)
                return ".".join([*([] if group == "params" else [group]), *names])
        return ""

    def trainer_state(self) -> dict[str, Any]:
        return self._earlier | ({"skipped_steps": self._skipped} if self._skipped else {})

    def close(self) -> None:
        """Do nothing: JAX disconnects from the other processes when this one exits."""


def initial_state(params: Any, frozen: Set[str] = frozenset()) -> State:
    """Return the state before the first step; moments have the shardings of the parameters."""
    trained, _ = split_trained(params, frozen)
    shardings = jax.tree.map(lambda p: p.sharding, trained)
    zeros = jax.jit(partial(jax.tree.map, jnp.zeros_like), out_shardings=shardings)
    moments = {moment: zeros(trained) for moment in MOMENTS}
    return {"params": params, **moments, "step": np.int32(0)}


def abstract_state(config: Config, parallel: Parallel) -> State:
    """Return shapes, dtypes and shardings of the state, without arrays."""
    params = abstract_params(config.model, config.train.dtype, parallel)
    trained, _ = split_trained(params, config.frozen)
    step = jax.ShapeDtypeStruct((), jnp.int32, sharding=parallel.replicated)
    state = {"params": params, **dict.fromkeys(MOMENTS, trained), "step": step}
    metrics = abstract_metrics(config, parallel)
    return state | ({"metrics": metrics} if metrics else {})


def abstract_metrics(config: Config, parallel: Parallel) -> dict[str, Any]:
    """Return shapes and shardings of the metrics that the objective has next to the loss."""
    names = objective_metrics(config)
    dtype = PARAM_DTYPE[config.train.dtype]
    return {name: jax.ShapeDtypeStruct((), dtype, sharding=parallel.replicated) for name in names}


def make_train_step(
    config: Config, parallel: Parallel
) -> Callable[[State, Batch[Array], float], tuple[State, Array, Array]]:
    """Return the compiled optimizer step: (state, global batch, rate) -> (state, loss, norm).

    `loss` is the mean over the global batch, `norm` the global norm of the gradients before
    clipping. The state's memory is donated: use the returned state. It does not change in a step
    that `train.on_nonfinite` leaves out.
    """
    objective, frozen = make_objective(config.model, config), config.frozen
    n_micro_batches = config.train.gradient_accumulation_steps

    def train_step(state: State, batch: Batch[Array], rate: Array) -> tuple[State, Array, Array]:
        denominator = objective.prepare(batch)
        params, rest = split_trained(state["params"], frozen)

        def measure(params: Any, rows: Batch[Array]) -> tuple[Array, Any]:
            measured = objective.measure(join(params, rest), rows)
            return jax.tree.map(lambda total: total / denominator, measured)

        mean = jax.value_and_grad(measure, has_aux=True)

        def add(total: Any, micro_batch: Batch[Array]) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, mean(params, micro_batch)), None

        with parallel.activate():
            batch = objective.complete(state["params"], batch)
            if n_micro_batches == 1:
                (loss, metrics), grads = mean(params, batch)
            else:
                # Row r goes to micro-batch r % n_micro_batches: no row moves between devices.
                micro_batches = batch.map(
                    lambda x: x.reshape(-1, n_micro_batches, x.shape[1]).swapaxes(0, 1)
                )
                zero = jnp.zeros((), PARAM_DTYPE[config.train.dtype])
                zeros = jax.tree.map(jnp.zeros_like, ((zero, state.get("metrics", {})), params))
                ((loss, metrics), grads), _ = jax.lax.scan(add, zeros, micro_batches)
        grads, norm = clip_gradients(grads, config.optimizer.max_grad_norm)

        def update(state: State, grads: Any) -> State:
            return adamw(state, grads, rate, config.optimizer)

        state = {key: state[key] for key in (*MOMENTS, "step")} | {"params": params}
        if config.train.on_nonfinite == "stop":
            state = update(state, grads)
        else:
            finite = jnp.isfinite(loss) & jnp.isfinite(norm)
            state = jax.lax.cond(finite, update, lambda state, _: state, state, grads)
        state |= {"params": join(state["params"], rest)}
        return state | ({"metrics": metrics} if metrics else {}), loss, norm

    replicated = parallel.replicated
    shardings = jax.tree.map(lambda array: array.sharding, abstract_state(config, parallel))
    return jax.jit(
        train_step,
        in_shardings=(shardings, parallel.batch_sharding, replicated),
        out_shardings=(shardings, replicated, replicated),
        donate_argnums=0,
        compiler_options=parallel.compiler_options,
    )


def make_evaluate(
    config: Config, parallel: Parallel
) -> Callable[[Any, Batch[Array]], dict[str, Array]]:
    """Return the compiled function (params, batch) -> sums over its rows: `loss`, and the metrics.

    `loss` is the summed cross entropy in nats, or the summed loss of preference pairs. KTO's
    baseline is that of the rows of a call.
    """

    def measure(objective: CausalLM, params: Any, batch: Batch[Array]) -> dict[str, Array]:
        loss, metrics = objective.measure(params, objective.complete(params, batch))
        return {"loss": loss, **metrics}

    return compile_forward(measure, config, parallel, parallel.replicated)


def evaluate(
    measure: Callable[[Any, Batch[Array]], dict[str, Array]],
    params: Any,
    batch: Batch,
    config: Config,
    parallel: Parallel,
    reference: Reference | None = None,
) -> dict[str, float]:
    """Return sums over a batch [N, T] that every process has in full: `loss`, and the metrics.

    `measure` is the result of `make_evaluate`.
    """
    n_rows = -(-config.evaluate.batch_size // parallel.dp_size) * parallel.dp_size
    sums: dict[str, float] = {}
    for start in range(0, len(batch.tokens), n_rows):
        rows = pad_rows(batch.rows(slice(start, start + n_rows)), n_rows)
        found = measure(params, add_reference(reference, params, parallel.shard_global_batch(rows)))
        sums = {name: sums.get(name, 0.0) + float(value) for name, value in found.items()}
    return sums


def set_matmul_precision(config: Config) -> None:
    """Compute float32 matrix products in float32; turn on x64 mode for float64 runs."""
    jax.config.update("jax_default_matmul_precision", "highest")
    if config.train.dtype == "float64":
        jax.config.update("jax_enable_x64", True)


def cache_compilations() -> None:
    """Cache compiled programs in JAX_COMPILATION_CACHE_DIR, by default the user's cache."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        home = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
        if not home.is_absolute():
            return  # The user of a container may have no home.
        jax.config.update("jax_compilation_cache_dir", str(home / "mooshak" / "jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def peak_memory() -> dict[str, float]:
    """Return `memory_bytes`, the peak of the first device, or of the process on a CPU."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return {"memory_bytes": float(stats["peak_bytes_in_use"])}
    # Unix only.
    import resource

    return {"memory_bytes": 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}
