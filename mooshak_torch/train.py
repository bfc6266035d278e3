"""Train the model in PyTorch.

python -m mooshak_torch.train --config configs/demo.yaml
torchrun --nproc-per-node 2 -m mooshak_torch.train --config configs/demo.yaml
"""

import contextlib
import os
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import torch

from mooshak.checkpoints import formats
from mooshak.checkpoints.init_from import resolve
from mooshak.checkpoints.manager import CheckpointManager
from mooshak.checkpoints.resume import check_resume, resume_from, trainer_state
from mooshak.config.parse import config_parser, parse_config
from mooshak.config.sections import Config
from mooshak.errors import command
from mooshak.evaluation.bits_per_byte import validation_metrics
from mooshak.numerics.schedule import learning_rate
from mooshak.training.malloc import WARMUP_STEPS, retain_freed_memory, use_single_arena
from mooshak.training.metrics import RunLog, stop_request
from mooshak_torch.checkpoint import open_checkpoint, start_saving
from mooshak_torch.distributed.mesh import make_parallel
from mooshak_torch.objectives import model_of
from mooshak_torch.profile import profiled
from mooshak_torch.step import (
    evaluate,
    make_loss_scale,
    make_state,
    peak_memory,
    set_matmul_precision,
    train_step,
)


def train(config: Config, resume: str = "auto", profile: bool = False) -> None:
    """Train until `train.steps` are done, a signal comes, or `train.stop_after_step` is reached.

    `profile` traces the third step from here, in RUN/profile.
    """
    from mooshak.data.batches import train_batches, validation_sequences
    from mooshak.data.shards import load_or_prepare_shards

    parallel = make_parallel(config)
    set_matmul_precision()
    tokenizer, _ = load_or_prepare_shards(config)
    path = resume_from(config, resume)
    step, validation_loss, source = 0, None, None
    with contextlib.ExitStack() as open_files:
        if path is not None:
            readable = formats.ensure_readable_format(path, "torch", parallel)
            source = open_checkpoint(open_files.enter_context(readable))
            step, validation_loss = check_resume(config, source, tokenizer.fingerprint)
        objective, optimizer = make_state(config, parallel, tokenizer, source)
        scale = make_loss_scale(config, optimizer, source)
    model = model_of(objective)
    validation = validation_sequences(config) if config.evaluate.every else {}
    batches = train_batches(config, step, parallel.dp_rank, parallel.dp_size)
    device = torch.cuda.get_device_name() if parallel.device.type == "cuda" else "cpu"
    last = min(config.train.steps, config.train.stop_after_step or config.train.steps)
    warm = step + WARMUP_STEPS
    traced = step + 2 if profile and parallel.is_main else None
    profile_dir = Path(config.run.dir) / "profile"
    stopped = False
    # Outermost: once one process has ended, torchrun sends SIGTERM to those that are still closing.
    with (
        stop_request() as stop,
        contextlib.closing(parallel),
        contextlib.closing(
            RunLog(config, step, parallel.is_main, device, parallel.world_size)
        ) as log,
        parallel.explain_timeouts(),
    ):
        saver = CheckpointManager(config, parallel)
        while step < last and not stopped:
            start = time.perf_counter()
            rate = learning_rate(config, step)
            batch = torch.from_numpy(np.asarray(next(batches))).to(parallel.device).long()
            with profiled(profile_dir) if step == traced else contextlib.nullcontext():
                loss, norm = train_step(objective, optimizer, batch, rate, config, parallel, scale)
                stopping = loss.new_tensor(float(stop.is_set() or saver.failed))
                flags = parallel.sum(torch.stack([loss, stopping]))
                stopped = flags[1].item() > 0
            if stopped:
                saver.raise_failure()
            step += 1
            if step == warm:
                retain_freed_memory()
            metrics = {"loss": flags[0].item(), "learning_rate": rate, "grad_norm": norm.item()}
            if scale is not None:
                metrics["loss_scale"] = scale.scale
            metrics |= peak_memory(parallel.device)
            seconds = time.perf_counter() - start
            if validation and (step % config.evaluate.every == 0 or step == last):
                score = partial(evaluate, objective, config=config, parallel=parallel)
                measured = validation_metrics(score, validation, tokenizer.token_bytes())
                validation_loss = measured["validation_loss"]
                metrics |= measured
            if step % config.train.log_every == 0 or step == last:
                with saver.defer_failure(f"step {step} could not be logged"):
                    log.log(step, seconds, metrics)
            every = config.checkpoint.every
            if step == last or stopped or (every and step % every == 0):
                state = trainer_state(
                    config,
                    step,
                    "torch",
                    tokenizer.fingerprint,
                    validation_loss,
                    parallel.world_size,
                    parallel.layout,
                )
                if scale is not None:
                    state["loss_scale"] = asdict(scale)
                saver.save(
                    state, partial(start_saving, model, optimizer, group=parallel.checkpoint_group)
                )
        saver.finish()
    if parallel.is_main:
        if stopped and step < config.train.steps:
            print(f"stopped after step {step}, saved; the same command continues (--resume auto)")
        else:
            print(f"step {step} of {config.train.steps} done: {saver.directory / str(step)}")


@command
def main() -> None:
    use_single_arena()
    # Grain imports JAX, which must not take hold of the GPU here.
    os.environ["JAX_PLATFORMS"] = "cpu"
    parser = config_parser(__doc__.split("\n")[0])
    parser.add_argument("--resume", default="auto", help="auto, never, or a checkpoint's directory")
    parser.add_argument(
        "--profile", action="store_true", help="say where the third step's time goes"
    )
    draft, arguments = parse_config(parser)
    config = resolve(draft)
    train(config, arguments.resume, arguments.profile)


if __name__ == "__main__":
    main()
