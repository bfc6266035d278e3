"""Train the model in PyTorch.

python -m mooshak_torch.train --config configs/demo.yaml
torchrun --nproc-per-node 2 -m mooshak_torch.train --config configs/demo.yaml
"""

import contextlib
import math
import os
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from mooshak import checkpoints
from mooshak import config as configuration
from mooshak.checkpoints import Checkpoints
from mooshak.config import Config, ModelConfig
from mooshak.errors import command
from mooshak.evaluation import validation_metrics
from mooshak.initial import initial_weight
from mooshak.interchange import Checkpoint
from mooshak.memory import WARM, keep_memory, share_heap
from mooshak.run_log import RunLog, stop_request
from mooshak.schedule import learning_rate
from mooshak.tokenizer import Tokenizer
from mooshak_torch.checkpoint import begin, open_checkpoint, restore, start_saving
from mooshak_torch.loss import HeadLoss
from mooshak_torch.model import Model, initialize
from mooshak_torch.optimizer import LossScale, clip_gradients, make_optimizer, moments, set_step
from mooshak_torch.parallel import Parallel, compile_layers, make_parallel, rematerialise
from mooshak_torch.profile import profiled
from mooshak_torch.zero import ZeroOptimizer, make_engine


def train(config: Config, resume: str = "auto", profile: bool = False) -> None:
    """Train until `train.steps` are done, a signal comes, or `train.stop_at` is reached.

    `profile` traces the third step from here, in RUN/profile.
    """
    from mooshak.data.batches import train_batches, validation_sequences
    from mooshak.data.shards import ensure

    parallel = make_parallel(config)
    precise()
    tokenizer, _ = ensure(config)
    path = checkpoints.resume_from(config, resume)
    step, validation_loss, source = 0, None, None
    with contextlib.ExitStack() as open_files:
        if path is not None:
            readable = checkpoints.readable(path, "torch", parallel)
            source = open_checkpoint(open_files.enter_context(readable))
            step, validation_loss = checkpoints.check_resume(config, source, tokenizer.fingerprint)
        objective, optimizer = make_state(config, parallel, tokenizer, source)
        scale = make_loss_scale(config, optimizer, source)
    model = model_of(objective)
    validation = validation_sequences(config) if config.evaluate.every else {}
    batches = train_batches(config, step, parallel.part, parallel.parts)
    saver = Checkpoints(config, parallel.main)
    device = torch.cuda.get_device_name() if parallel.device.type == "cuda" else "cpu"
    log = RunLog(config, step, parallel.main, device, parallel.world)
    last = min(config.train.steps, config.train.stop_at or config.train.steps)
    warm = step + WARM
    traced = step + 2 if profile and parallel.main else None
    profile_dir = Path(config.run.dir) / "profile"
    stopped = False
    try:
        with stop_request() as stop, parallel.naming_hangs():
            while step < last and not stopped:
                start = time.perf_counter()
                rate = learning_rate(config, step)
                batch = torch.from_numpy(np.asarray(next(batches))).to(parallel.device).long()
                with profiled(profile_dir) if step == traced else contextlib.nullcontext():
                    loss, norm = train_step(
                        objective, optimizer, batch, rate, config, parallel, scale
                    )
                    stopping = loss.new_tensor(float(stop.is_set()))
                    flags = parallel.sum(torch.stack([loss, stopping]))
                    stopped = flags[1].item() > 0
                step += 1
                if step == warm:
                    keep_memory()
                metrics = {"loss": flags[0].item(), "learning_rate": rate, "grad_norm": norm.item()}
                if scale is not None:
                    metrics["loss_scale"] = scale.scale
                metrics |= memory(parallel.device)
                seconds = time.perf_counter() - start
                if validation and (step % config.evaluate.every == 0 or step == last):
                    score = partial(evaluate, objective, config=config, parallel=parallel)
                    measured = validation_metrics(score, validation, tokenizer.token_bytes())
                    validation_loss = measured["validation_loss"]
                    metrics |= measured
                if step % config.train.log_every == 0 or step == last:
                    log.log(step, seconds, metrics)
                saver.raise_failure()
                every = config.checkpoint.every
                if step == last or stopped or (every and step % every == 0):
                    state = checkpoints.trainer_state(
                        config,
                        step,
                        "torch",
                        tokenizer.fingerprint,
                        validation_loss,
                        parallel.world,
                        parallel.layout,
                    )
                    if scale is not None:
                        state["loss_scale"] = asdict(scale)
                    saver.save(
                        state, partial(start_saving, model, optimizer, group=parallel.saving)
                    )
            saver.finish()
    finally:
        log.close()
        parallel.close()
    if parallel.main:
        if stopped and step < config.train.steps:
            print(f"stopped after step {step}, saved; the same command continues (--resume auto)")
        else:
            print(f"step {step} of {config.train.steps} done: {saver.directory / str(step)}")


class Objective(nn.Module):
    """The model and its loss in one module, as DDP and FSDP want them."""

    def __init__(self, model: Model, chunk: int):
        super().__init__()
        self.model = model
        self.loss = HeadLoss(model.lm_head or model.embeddings, chunk)

    def forward(self, batch_BS: Tensor) -> Tensor:
        """Summed cross entropy in nats of tokens 1 .. S - 1, each given those before it."""
        loss: Tensor = self.loss(self.model.hidden(batch_BS[:, :-1]), batch_BS[:, 1:])
        return loss


def make_objective(model: ModelConfig, config: Config) -> Objective:
    """The objective on the meta device: shapes without memory, for `Parallel.wrap`."""
    with torch.device("meta"):
        objective = Objective(Model(model, config.train.dtype), config.train.loss_chunk)
    rematerialise(objective.model, config.train.remat)
    if config.train.compile:
        compile_layers(objective.model, config)
    return objective


def make_state(
    config: Config, parallel: Parallel, tokenizer: Tokenizer, source: Checkpoint | None
) -> tuple[nn.Module, torch.optim.Optimizer | ZeroOptimizer]:
    """The objective on the mesh and its optimizer, as in a checkpoint or at the beginning."""
    objective: nn.Module = make_objective(config.model, config)
    if parallel.strategy == "deepspeed":
        values = source.read if source else partial(initial_weight, config.model, config.run.seed)
        objective, engine = make_engine(objective, config, parallel.device, values)
        if source is not None and source.trainer_state is not None:
            engine.restore(source.read, source.trainer_state["step"])
        return objective, engine
    objective = parallel.wrap(objective, config)
    model = model_of(objective)
    optimizer = make_optimizer(model, config.optimizer)
    # Made by the first step they would lie among the activations, and cut up the heap.
    moments(model, optimizer)
    if source is not None:
        restore(model, optimizer, source)
    elif config.init.from_:
        begin(model, config, tokenizer, parallel)
    else:
        initialize(model, config.run.seed)
    return objective, optimizer


def make_loss_scale(
    config: Config, optimizer: torch.optim.Optimizer | ZeroOptimizer, source: Checkpoint | None
) -> LossScale | None:
    """The scale of a float16 run, as in a checkpoint or at the beginning."""
    if config.train.dtype != "float16" or isinstance(optimizer, ZeroOptimizer):
        return None
    state = {} if source is None else source.trainer_state or {}
    scale = LossScale(**state.get("loss_scale", {}))
    if source is not None:
        # Skipped steps have not moved the moments.
        set_step(optimizer, state["step"] - scale.skipped)
    return scale


def model_of(objective: nn.Module) -> Model:
    """The model in an objective, wrapped or not."""
    model = getattr(objective, "module", objective).model
    assert isinstance(model, Model)
    return model


def train_step(
    objective: nn.Module,
    optimizer: torch.optim.Optimizer | ZeroOptimizer,
    batch_BS: Tensor,
    rate: float,
    config: Config,
    parallel: Parallel,
    loss_scale: LossScale | None = None,
) -> tuple[Tensor, Tensor]:
    """One optimizer step on this process's rows of the batch, [B, T + 1] tokens.

    Returns this process's part of the mean loss (the parts add up) and the gradient's norm.
    """
    optimizer.zero_grad(set_to_none=True)
    scale = 1.0 if loss_scale is None else loss_scale.scale
    parts = batch_BS.chunk(config.train.accumulation)
    n_tokens = batch_BS[:, 1:].numel() * parallel.parts
    loss = torch.zeros((), dtype=next(objective.parameters()).dtype, device=batch_BS.device)
    for i, part in enumerate(parts):
        with parallel.without_reduction(objective, i < len(parts) - 1):
            part_loss = objective(part) / n_tokens
            # DDP, FSDP and DeepSpeed average over the processes, and the parts are to be added.
            parallel.backward(objective, part_loss * (parallel.parts * scale))
        loss += part_loss.detach()
    if isinstance(optimizer, ZeroOptimizer):
        norm = optimizer.clip(config.optimizer.clip_norm)
    elif loss_scale is None:
        norm = clip_gradients(objective.parameters(), config.optimizer.clip_norm)
    else:
        norm = clip_gradients(objective.parameters(), config.optimizer.clip_norm, scale)
        loss_scale.update(finite=bool(norm.isfinite()))
        if not norm.isfinite():
            return loss, norm
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    return loss, norm


@torch.no_grad()
def evaluate(
    objective: nn.Module, sequences_NS: np.ndarray, config: Config, parallel: Parallel
) -> float:
    """Summed cross entropy, in nats, of all tokens but the first of each sequence."""
    total = torch.zeros((), dtype=torch.float64, device=parallel.device)
    every_NS = torch.from_numpy(sequences_NS).long().to(parallel.device)
    mine_NS, rows = every_NS[parallel.part :: parallel.parts], config.evaluate.batch_size
    # All processes go through the model equally often: it gathers its parameters together.
    for start in range(0, math.ceil(len(every_NS) / parallel.parts), rows):
        batch_BS = mine_NS[start : start + rows]
        if len(batch_BS):
            total += objective(batch_BS)
        else:
            objective(every_NS[:1])
    return parallel.sum(total).item()


def precise() -> None:
    """float32 means float32: no TF32 in matrix products."""
    torch.set_float32_matmul_precision("highest")


def memory(device: torch.device) -> dict[str, float]:
    """Peak memory in bytes: of the GPU, or of this process."""
    if device.type == "cuda":
        return {"memory_bytes": float(torch.cuda.max_memory_allocated(device))}
    import resource

    return {"memory_bytes": 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}


@command
def main() -> None:
    share_heap()
    # Grain imports JAX, which must not take hold of the GPU here.
    os.environ["JAX_PLATFORMS"] = "cpu"
    parser = configuration.parser(__doc__.split("\n")[0])
    parser.add_argument("--resume", default="auto", help="auto, never, or a checkpoint's directory")
    parser.add_argument(
        "--profile", action="store_true", help="say where the third step's time goes"
    )
    config, arguments = configuration.parse(parser)
    train(config, arguments.resume, arguments.profile)


if __name__ == "__main__":
    main()
