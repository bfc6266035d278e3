"""Train the model in JAX.

python -m mooshak_jax.train --config configs/demo.yaml --mesh data=2
"""

import contextlib
import os
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from mooshak import checkpoints
from mooshak import config as configuration
from mooshak.checkpoints import Checkpoints
from mooshak.config import Config
from mooshak.errors import InputError, command
from mooshak.evaluation import validation_metrics
from mooshak.interchange import MOMENTS
from mooshak.memory import WARM, keep_memory, share_heap
from mooshak.run_log import RunLog, stop_request
from mooshak.schedule import learning_rate
from mooshak_jax.checkpoint import (
    abstract_params,
    begin,
    graph,
    initialize,
    join,
    open_checkpoint,
    restore,
    start_saving,
)
from mooshak_jax.loss import cross_entropy
from mooshak_jax.model import PARAMETERS, Model
from mooshak_jax.optimizer import adamw, clip_gradients
from mooshak_jax.parallel import Parallel, make_parallel
from mooshak_jax.profile import profiled

State = dict[str, Any]
"""`params`, `exp_avg` and `exp_avg_sq`, trees alike, and `step`, the optimizer steps done."""


def train(config: Config, resume: str = "auto", profile: bool = False) -> None:
    """Train until `train.steps` are done, a signal comes, or `train.stop_at` is reached.

    `profile` traces the third step from here, in RUN/profile.
    """
    from mooshak.data.batches import batches_of_rows, validation_sequences
    from mooshak.data.shards import ensure

    if config.train.dtype == "float16":
        raise InputError(
            "train.dtype float16 needs its gradients scaled, which only mooshak_torch.train does; "
            "use bfloat16"
        )
    parallel = make_parallel(config)
    precise(config)
    tokenizer, _ = ensure(config)
    path = checkpoints.resume_from(config, resume)
    step, validation_loss = 0, None
    if path is None and config.init.from_:
        state = initial_state(begin(config, tokenizer, parallel))
    elif path is None:
        params = initialize(config.model, config.train.dtype, config.run.seed, parallel=parallel)
        state = initial_state(params)
    else:
        with checkpoints.readable(path, "jax", parallel) as readable:
            source = open_checkpoint(readable)
            step, validation_loss = checkpoints.check_resume(config, source, tokenizer.fingerprint)
            state = restore(config.model, config.train.dtype, source, parallel)
            state["step"] = np.int32(step)
    update = make_train_step(config, parallel)
    measure = make_evaluate(config, parallel)
    validation = validation_sequences(config) if config.evaluate.every else {}
    rows = parallel.rows_here(config.train.batch_size)
    batches = batches_of_rows(config, rows, step)
    saver = Checkpoints(config, parallel.main)
    log = RunLog(config, step, parallel.main, jax.devices()[0].device_kind, parallel.mesh.size)
    last = min(config.train.steps, config.train.stop_at or config.train.steps)
    warm = step + WARM
    traced = step + 2 if profile and parallel.main else None
    profile_dir = Path(config.run.dir) / "profile"
    stopped = False
    try:
        with stop_request() as stop:
            while step < last and not stopped:
                start = time.perf_counter()
                rate = learning_rate(config, step)
                batch = parallel.put(np.asarray(next(batches)))
                with profiled(profile_dir) if step == traced else contextlib.nullcontext():
                    state, loss, norm = update(state, batch, rate)
                    stopped = parallel.any_process(stop.is_set())
                    jax.block_until_ready(norm)
                step += 1
                if step == warm:
                    keep_memory()
                metrics = {"loss": float(loss), "learning_rate": rate, "grad_norm": float(norm)}
                metrics |= memory()
                seconds = time.perf_counter() - start
                if validation and (step % config.evaluate.every == 0 or step == last):
                    score = partial(
                        evaluate, measure, state["params"], config=config, parallel=parallel
                    )
                    measured = validation_metrics(score, validation, tokenizer.token_bytes())
                    validation_loss = measured["validation_loss"]
                    metrics |= measured
                if step % config.train.log_every == 0 or step == last:
                    log.log(step, seconds, metrics)
                saver.raise_failure()
                every = config.checkpoint.every
                if step == last or stopped or (every and step % every == 0):
                    description = checkpoints.trainer_state(
                        config,
                        step,
                        "jax",
                        tokenizer.fingerprint,
                        validation_loss,
                        jax.process_count(),
                        ",".join(f"{axis}={size}" for axis, size in parallel.mesh.shape.items()),
                    )
                    saved = {key: state[key] for key in ("params", *MOMENTS)}
                    saver.save(description, partial(start_saving, saved))
            saver.finish()
    finally:
        log.close()
    if parallel.main:
        if stopped and step < config.train.steps:
            print(f"stopped after step {step}, saved; the same command continues (--resume auto)")
        else:
            print(f"step {step} of {config.train.steps} done: {saver.directory / str(step)}")


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


def objective(graphdef: nnx.GraphDef, chunk: int, params: Any, batch_BS: Array) -> Array:
    """Summed cross entropy in nats of tokens 1 .. S - 1, each given those before it."""
    model: Model = join(graphdef, params)
    hidden_BTD = model.hidden(batch_BS[:, :-1])
    return cross_entropy(hidden_BTD, model.head_DV, batch_BS[:, 1:], chunk)


def make_train_step(
    config: Config, parallel: Parallel
) -> Callable[[State, Array, float], tuple[State, Array, Array]]:
    """The function of one optimizer step: (state, batch [B, T + 1], rate) -> (state, loss, norm).

    It is compiled once and takes over the memory of the state that it is given.
    """
    graphdef = graph(config.model, config.train.dtype, config.train.remat)
    compute = partial(objective, graphdef, config.train.loss_chunk)
    n_parts = config.train.accumulation

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
                zero = jnp.zeros((), PARAMETERS[config.train.dtype])
                nothing = (zero, jax.tree.map(jnp.zeros_like, state["params"]))
                (loss, grads), _ = jax.lax.scan(add_part, nothing, parts_nBS)
        grads, norm = clip_gradients(grads, config.optimizer.clip_norm)
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
    compute = partial(objective, graph(config.model, config.train.dtype), config.train.loss_chunk)

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
        total += float(measure(params, parallel.put_whole(batch_BS)))
    return total


IGNORED_ROW = -100
"""As a label it counts nothing; as an input it reads some row of the embedding, to no effect."""


def precise(config: Config) -> None:
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


def memory() -> dict[str, float]:
    """Peak memory in bytes: of the first device, or of this process."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return {"memory_bytes": float(stats["peak_bytes_in_use"])}
    import resource

    return {"memory_bytes": 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}


@command
def main() -> None:
    share_heap()
    parser = configuration.parser(__doc__.split("\n")[0])
    parser.add_argument("--resume", default="auto", help="auto, never, or a checkpoint's directory")
    parser.add_argument(
        "--profile", action="store_true", help="say where the third step's time goes"
    )
    config, arguments = configuration.parse(parser)
    cache_compilations()
    if arguments.profile and "TPU_SKIP_MDS_QUERY" in os.environ and not find_spec("jax_plugins"):
        # There is no accelerator. The profiler would call into libtpu, and crash where that is of
        # another version.
        jax.config.update("jax_platforms", "cpu")
    train(config, arguments.resume, arguments.profile)


if __name__ == "__main__":
    main()
