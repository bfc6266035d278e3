"""Train the model in JAX.

python -m mooshak_jax.train --config configs/demo.yaml --mesh data=2
"""

import contextlib
import os
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import jax
import numpy as np

from mooshak.checkpoints import formats
from mooshak.checkpoints.base import MOMENTS
from mooshak.checkpoints.init_from import resolve
from mooshak.checkpoints.manager import CheckpointManager
from mooshak.checkpoints.resume import check_resume, resume_from, trainer_state
from mooshak.config.parse import config_parser, parse_config
from mooshak.config.sections import Config
from mooshak.errors import InputError, command
from mooshak.evaluation.bits_per_byte import validation_metrics
from mooshak.numerics.schedule import learning_rate
from mooshak.training.malloc import WARMUP_STEPS, retain_freed_memory, use_single_arena
from mooshak.training.metrics import RunLog, stop_request
from mooshak_jax.checkpoint import load_init_weights, open_checkpoint, restore, start_saving
from mooshak_jax.distributed.mesh import make_parallel
from mooshak_jax.params import initialize
from mooshak_jax.profile import profiled
from mooshak_jax.step import (
    cache_compilations,
    evaluate,
    initial_state,
    make_evaluate,
    make_train_step,
    peak_memory,
    set_matmul_precision,
)


def train(config: Config, resume: str = "auto", profile: bool = False) -> None:
    """Train until `train.steps` are done, a signal comes, or `train.stop_after_step` is reached.

    `profile` traces the third step from here, in RUN/profile.
    """
    from mooshak.data.batches import batches_of_rows, validation_sequences
    from mooshak.data.shards import load_or_prepare_shards

    if config.train.dtype == "float16":
        raise InputError(
            "train.dtype float16 needs its gradients scaled, which only mooshak_torch.train does; "
            "use bfloat16"
        )
    parallel = make_parallel(config)
    set_matmul_precision(config)
    tokenizer, _ = load_or_prepare_shards(config)
    path = resume_from(config, resume)
    step, validation_loss = 0, None
    if path is None and config.init.from_:
        state = initial_state(load_init_weights(config, tokenizer, parallel))
    elif path is None:
        params = initialize(config.model, config.train.dtype, config.run.seed, parallel=parallel)
        state = initial_state(params)
    else:
        with formats.ensure_readable_format(path, "jax", parallel) as readable:
            source = open_checkpoint(readable)
            step, validation_loss = check_resume(config, source, tokenizer.fingerprint)
            state = restore(config.model, config.train.dtype, source, parallel)
            state["step"] = np.int32(step)
    update = make_train_step(config, parallel)
    measure = make_evaluate(config, parallel)
    validation = validation_sequences(config) if config.evaluate.every else {}
    rows = parallel.rows_here(config.train.batch_size)
    batches = batches_of_rows(config, rows, step)
    device = jax.devices()[0].device_kind
    last = min(config.train.steps, config.train.stop_after_step or config.train.steps)
    warm = step + WARMUP_STEPS
    traced = step + 2 if profile and parallel.is_main else None
    profile_dir = Path(config.run.dir) / "profile"
    stopped = False
    # Outermost: once one process has ended, launchers send SIGTERM to those that are still closing.
    with (
        stop_request() as stop,
        contextlib.closing(parallel),
        contextlib.closing(
            RunLog(config, step, parallel.is_main, device, parallel.mesh.size)
        ) as log,
    ):
        saver = CheckpointManager(config, parallel)
        while step < last and not stopped:
            start = time.perf_counter()
            rate = learning_rate(config, step)
            batch = parallel.shard_local_batch(np.asarray(next(batches)))
            with profiled(profile_dir) if step == traced else contextlib.nullcontext():
                state, loss, norm = update(state, batch, rate)
                stopped = parallel.any_process(stop.is_set() or saver.failed)
                jax.block_until_ready(norm)
            if stopped:
                saver.raise_failure()
            step += 1
            if step == warm:
                retain_freed_memory()
            metrics = {"loss": float(loss), "learning_rate": rate, "grad_norm": float(norm)}
            metrics |= peak_memory()
            seconds = time.perf_counter() - start
            if validation and (step % config.evaluate.every == 0 or step == last):
                score = partial(
                    evaluate, measure, state["params"], config=config, parallel=parallel
                )
                measured = validation_metrics(score, validation, tokenizer.token_bytes())
                validation_loss = measured["validation_loss"]
                metrics |= measured
            if step % config.train.log_every == 0 or step == last:
                with saver.defer_failure(f"step {step} could not be logged"):
                    log.log(step, seconds, metrics)
            every = config.checkpoint.every
            if step == last or stopped or (every and step % every == 0):
                description = trainer_state(
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
    if parallel.is_main:
        if stopped and step < config.train.steps:
            print(f"stopped after step {step}, saved; the same command continues (--resume auto)")
        else:
            print(f"step {step} of {config.train.steps} done: {saver.directory / str(step)}")


@command
def main() -> None:
    use_single_arena()
    parser = config_parser(__doc__.split("\n")[0])
    parser.add_argument("--resume", default="auto", help="auto, never, or a checkpoint's directory")
    parser.add_argument(
        "--profile", action="store_true", help="say where the third step's time goes"
    )
    draft, arguments = parse_config(parser)
    config = resolve(draft)
    cache_compilations()
    if arguments.profile and "TPU_SKIP_MDS_QUERY" in os.environ and not find_spec("jax_plugins"):
        # There is no accelerator. The profiler would call into libtpu, and crash where that is of
        # another version.
        jax.config.update("jax_platforms", "cpu")
    train(config, arguments.resume, arguments.profile)


if __name__ == "__main__":
    main()
