"""The training step of the PyTorch model: state, one optimizer step, evaluation."""

import math
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from mooshak.checkpoints.base import Checkpoint
from mooshak.config.sections import Config
from mooshak.numerics.init_weights import initial_weight
from mooshak.tokenizer.base import Tokenizer
from mooshak_torch.checkpoint import load_init_weights, restore
from mooshak_torch.distributed.deepspeed import ZeroOptimizer, make_engine
from mooshak_torch.distributed.mesh import Parallel
from mooshak_torch.distributed.parallelize import parallelize
from mooshak_torch.objectives import make_objective, model_of
from mooshak_torch.optimizer import LossScale, clip_gradients, make_optimizer, moments, set_step
from mooshak_torch.params import initialize


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
    objective = parallelize(objective, parallel, config)
    model = model_of(objective)
    optimizer = make_optimizer(model, config.optimizer)
    # Made by the first step they would lie among the activations, and cut up the heap.
    moments(model, optimizer)
    if source is not None:
        restore(model, optimizer, source)
    elif config.init.from_:
        load_init_weights(model, config, tokenizer, parallel)
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
    parts = batch_BS.chunk(config.train.gradient_accumulation_steps)
    n_tokens = batch_BS[:, 1:].numel() * parallel.dp_size
    loss = torch.zeros((), dtype=next(objective.parameters()).dtype, device=batch_BS.device)
    for i, part in enumerate(parts):
        with parallel.no_sync(objective, i < len(parts) - 1):
            part_loss = objective(part) / n_tokens
            # DDP, FSDP and DeepSpeed average over the processes, and the parts are to be added.
            parallel.backward(objective, part_loss * (parallel.dp_size * scale))
        loss += part_loss.detach()
    if isinstance(optimizer, ZeroOptimizer):
        norm = optimizer.clip(config.optimizer.max_grad_norm)
    elif loss_scale is None:
        norm = clip_gradients(objective.parameters(), config.optimizer.max_grad_norm)
    else:
        norm = clip_gradients(objective.parameters(), config.optimizer.max_grad_norm, scale)
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
    mine_NS, rows = every_NS[parallel.dp_rank :: parallel.dp_size], config.evaluate.batch_size
    # All processes go through the model equally often: it gathers its parameters together.
    for start in range(0, math.ceil(len(every_NS) / parallel.dp_size), rows):
        batch_BS = mine_NS[start : start + rows]
        if len(batch_BS):
            total += objective(batch_BS)
        else:
            objective(every_NS[:1])
    return parallel.sum(total).item()


def set_matmul_precision() -> None:
    """float32 means float32: no TF32 in matrix products."""
    torch.set_float32_matmul_precision("highest")


def peak_memory(device: torch.device) -> dict[str, float]:
    """Peak memory in bytes: of the GPU, or of this process."""
    if device.type == "cuda":
        return {"memory_bytes": float(torch.cuda.max_memory_allocated(device))}
    import resource

    return {"memory_bytes": 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}
