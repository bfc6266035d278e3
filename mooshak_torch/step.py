"""Training step of the PyTorch model: state, one optimizer step, evaluation.

Mirror: mooshak_jax/step.py.
"""

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mooshak.checkpoints.base import Checkpoint
from mooshak.checkpoints.resume import loss_scale_of, n_updates, skipped_steps
from mooshak.config.sections import Config
from mooshak.data.packing import Batch, pad_rows
from mooshak.numerics.init_weights import initial_weight
from mooshak.tokenizer.base import Tokenizer
from mooshak_torch.checkpoint import (
    load_init_weights,
    open_checkpoint,
    open_init_weights,
    restore,
    start_saving,
)
from mooshak_torch.distributed.deepspeed import Values, ZeroOptimizer, make_engine
from mooshak_torch.distributed.mesh import Parallel, make_parallel
from mooshak_torch.distributed.parallelize import parallelize
from mooshak_torch.lora import disable_adapters
from mooshak_torch.objectives import make_objective, model_of, unwrap
from mooshak_torch.optimizer import LossScale, Optimizer
from mooshak_torch.params import gather_weights, initialize
from mooshak_torch.profile import profiled
from mooshak_torch.reference import add_reference, compute_log_probs, make_reference


class Trainer:
    """Training state in PyTorch; implements `mooshak.training.loop.Trainer`."""

    framework = "torch"

    def __init__(self, config: Config):
        self.config, self.processes = config, make_parallel(config)
        set_matmul_precision()
        parallel = self.processes
        self.world_size = self.n_devices = parallel.world_size
        self.layout, self.rows = parallel.layout, parallel.rows(config.train.batch_size)
        is_gpu = parallel.device.type == "cuda"
        self.device = torch.cuda.get_device_name() if is_gpu else "cpu"
        self.open_checkpoint, self.profiled = open_checkpoint, profiled
        self.explain_timeouts, self.peak_memory = parallel.explain_timeouts, peak_memory

    def initialize(self, tokenizer: Tokenizer) -> None:
        self._set_state(tokenizer, None)

    def restore(self, source: Checkpoint) -> None:
        self._set_state(None, source)

    def _set_state(self, tokenizer: Tokenizer | None, source: Checkpoint | None) -> None:
        self.objective, self.optimizer = make_state(self.config, self.processes, tokenizer, source)
        self.loss_scale = make_loss_scale(self.config, self.optimizer, source)
        state = None if source is None else source.trainer_state
        self._earlier, self._skipped = loss_scale_of(state), skipped_steps(state)
        self.reference: nn.Module | None = None

    def load_reference(self, tokenizer: Tokenizer) -> None:
        self.reference = make_reference(self.objective, self.config, self.processes, tokenizer)

    def step(
        self, batch: Batch, rate: float, stop: Callable[[], bool]
    ) -> tuple[dict[str, float], bool]:
        parallel, scale = self.processes, self.loss_scale
        local_batch = add_reference(self.reference, parallel.shard_local_batch(batch), self.config)
        loss, norm = train_step(
            self.objective, self.optimizer, local_batch, rate, self.config, parallel, scale
        )
        more = unwrap(self.objective).metrics
        # One collective for the loss, the flag and the metrics.
        values = [loss, loss.new_tensor(float(stop())), *more.values()]
        total, stopping, *rest = parallel.sum(torch.stack(values)).tolist()
        metrics = {"loss": total, "grad_norm": norm.item(), **dict(zip(more, rest, strict=True))}
        if scale is not None:
            metrics["loss_scale"] = scale.scale
        elif self.config.train.on_nonfinite == "skip":
            self._skipped += not all(map(math.isfinite, metrics.values()))
        return metrics, stopping > 0

    def evaluate(self, batch: Batch) -> dict[str, float]:
        return evaluate(self.objective, batch, self.config, self.processes, self.reference)

    def reference_log_probs(self, batch: Batch) -> np.ndarray:
        if self.reference is None:
            return compute_log_probs(self.objective, batch, self.config, self.processes)
        with disable_adapters(model_of(self.reference)):
            return compute_log_probs(self.reference, batch, self.config, self.processes)

    def token_log_probs(self, batch: Batch) -> np.ndarray:
        return compute_log_probs(self.objective, batch, self.config, self.processes)

    def gather_weights(self) -> Checkpoint:
        return gather_weights(model_of(self.objective), self.processes.is_main)

    def start_saving(self, path: Path) -> Callable[[], None]:
        return start_saving(self.optimizer.state(), path, self.processes.checkpoint_group)

    def find_nonfinite(self) -> str:
        return self.optimizer.find_nonfinite()

    def trainer_state(self) -> dict[str, Any]:
        scale = None if self.loss_scale is None else {"loss_scale": asdict(self.loss_scale)}
        skipped = {"skipped_steps": self._skipped} if self._skipped else {}
        return (scale or self._earlier) | skipped

    def close(self) -> None:
        self.processes.close()


def make_state(
    config: Config, parallel: Parallel, tokenizer: Tokenizer | None, source: Checkpoint | None
) -> tuple[nn.Module, Optimizer | ZeroOptimizer]:
    """Return the objective on the mesh and its optimizer, restored from `source` or initialized.

    `tokenizer` is the run's; needed to initialize from `init.from`.
    """
    objective: nn.Module = make_objective(config.model, config)
    if parallel.strategy == "deepspeed":
        with ExitStack() as stack:
            values: Values = partial(initial_weight, config.model, config.run.seed)
            if source is not None:
                values = source.read
            elif config.init.from_:
                assert tokenizer is not None
                opened = open_init_weights(config, tokenizer, parallel)
                values = stack.enter_context(opened).read
            objective, engine = make_engine(objective, config, parallel.device, values)
        if source is not None and source.trainer_state is not None:
            engine.restore(source.read, source.trainer_state["step"])
        return objective, engine
    objective = parallelize(objective, parallel, config)
    model = model_of(objective)
    optimizer = Optimizer(objective, model, config.optimizer)
    if source is not None:
        restore(optimizer, source)
    elif config.init.from_:
        assert tokenizer is not None
        load_init_weights(model, config, tokenizer, parallel)
    else:
        initialize(model, config.run.seed)
    return objective, optimizer


def make_loss_scale(
    config: Config, optimizer: Optimizer | ZeroOptimizer, source: Checkpoint | None
) -> LossScale | None:
    """Return the loss scale of a float16 run, from `source` if given; None for other dtypes.

    Sets the optimizer's count of updates to that of `source`.
    """
    state = {} if source is None else source.trainer_state or {}
    if source is not None:
        optimizer.set_step(n_updates(state))
    return LossScale(**state.get("loss_scale", {})) if config.train.dtype == "float16" else None


def train_step(
    objective: nn.Module,
    optimizer: Optimizer | ZeroOptimizer,
    batch: Batch[Tensor],
    rate: float,
    config: Config,
    parallel: Parallel,
    loss_scale: LossScale | None = None,
) -> tuple[Tensor, Tensor]:
    """Take one optimizer step on this process's rows of the batch.

    Returns this process's share of the mean loss, to be summed over the processes, and the global
    norm of the gradients before clipping. Parameters and moments do not change in a step that
    `train.on_nonfinite` or the loss scale leaves out.
    """
    optimizer.zero_grad()
    inner = unwrap(objective)
    inner.metrics = {}
    scale = 1.0 if loss_scale is None else loss_scale.scale
    denominator = inner.prepare(batch, parallel)
    batch = inner.complete(batch, parallel)
    micro_batches = batch.chunk(config.train.gradient_accumulation_steps)
    loss = torch.zeros((), dtype=next(objective.parameters()).dtype, device=batch.labels.device)
    for i, micro_batch in enumerate(micro_batches):
        with optimizer.no_sync(i < len(micro_batches) - 1):
            share = objective(micro_batch) / denominator
            # DDP, FSDP and DeepSpeed average gradients over the processes; here they are summed.
            optimizer.backward(share * (parallel.dp_size * scale))
        loss += share.detach()
    inner.metrics = {name: total / denominator for name, total in inner.metrics.items()}
    norm = optimizer.clip(config.optimizer.max_grad_norm, scale)
    if loss_scale is not None:
        loss_scale.update(finite=bool(norm.isfinite()))
        if not norm.isfinite():
            return loss, norm
    elif config.train.on_nonfinite == "skip" and not _is_finite(loss, norm, parallel):
        return loss, norm
    optimizer.step(rate)
    return loss, norm


def _is_finite(loss: Tensor, norm: Tensor, parallel: Parallel) -> bool:
    """Return whether the global loss and the norm are finite, in all processes alike."""
    return bool((parallel.sum(loss.clone()) + norm).isfinite())


@torch.no_grad()
def evaluate(
    objective: nn.Module,
    batch: Batch,
    config: Config,
    parallel: Parallel,
    reference: nn.Module | None = None,
) -> dict[str, float]:
    """Return sums over a batch [N, T] that every process has in full: `loss`, and the metrics.

    `loss` is the summed cross entropy in nats, or the summed loss of preference pairs. KTO's
    baseline is that of the rows of a forward pass.
    """
    total = torch.zeros((), dtype=torch.float64, device=parallel.device)
    local_batch = batch.rows(slice(parallel.dp_rank, None, parallel.dp_size))
    n_rows = math.ceil(config.evaluate.batch_size / parallel.dp_size)
    inner = unwrap(objective)
    inner.metrics = {}
    # Each process calls the model equally often, since all gather its parameters together.
    for start in range(0, math.ceil(len(batch.tokens) / parallel.dp_size), n_rows):
        rows = local_batch.rows(slice(start, start + n_rows))
        rows = rows if len(rows.tokens) else pad_rows(batch.rows(slice(0, 0)), 1)
        local = add_reference(reference, parallel.shard_local_batch(rows), config)
        total += objective(inner.complete(local, parallel))
    names = ["loss", *inner.metrics]
    sums = parallel.sum(torch.stack([total, *(one.double() for one in inner.metrics.values())]))
    return dict(zip(names, sums.tolist(), strict=True))


def set_matmul_precision() -> None:
    """Compute float32 products in float32, not TF32, and accumulate all products in float32."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    # By default cuBLAS may add partial sums of bfloat16 and float16 products in their own dtype.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


def peak_memory() -> dict[str, float]:
    """Return `memory_bytes`, the peak of this process's GPU, or of the process without one."""
    if torch.cuda.is_available():
        return {"memory_bytes": float(torch.cuda.max_memory_allocated())}
    # Unix only.
    import resource

    return {"memory_bytes": 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}
