"""AdamW with weight decay on matrices only, and clipping by the global norm.

Mirror: mooshak_jax/optimizer.py.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from mooshak.checkpoints.base import MOMENTS
from mooshak.config.sections import OptimizerConfig
from mooshak.numerics.schedule import has_weight_decay


class Optimizer:
    """AdamW and gradient clipping for one process, DDP and FSDP2.

    `distributed.deepspeed.ZeroOptimizer` has the same interface.
    """

    def __init__(self, objective: nn.Module, model: nn.Module, config: OptimizerConfig):
        self.objective, self.model = objective, model
        self.inner = make_optimizer(model, config)
        # Allocated now: between the activations of the first step they would fragment the heap.
        moments(model, self.inner)

    def zero_grad(self) -> None:
        """Drop the gradients."""
        self.inner.zero_grad(set_to_none=True)

    @contextmanager
    def no_sync(self, when: bool) -> Iterator[None]:
        """Skip the reduction of gradients inside the block (all micro-batches but the last)."""
        if when and isinstance(self.objective, DistributedDataParallel):
            with self.objective.no_sync():
                yield
        elif when and isinstance(self.objective, FSDPModule):
            self.objective.set_requires_gradient_sync(False)
            yield
            self.objective.set_requires_gradient_sync(True)
        else:
            yield

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradients of a loss in the parameters."""
        loss.backward()

    def clip(self, max_norm: float | None, scale: float = 1.0) -> Tensor:
        """Divide the gradients by the loss scale and clip them; see `clip_gradients`."""
        return clip_gradients(self.objective.parameters(), max_norm, scale)

    def step(self, rate: float) -> None:
        """Update the parameters with the learning rate `rate`."""
        for group in self.inner.param_groups:
            group["lr"] = rate
        self.inner.step()

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Return `params`, `exp_avg`, `exp_avg_sq` by canonical name, not copied."""
        return {"params": dict(self.model.named_parameters()), **moments(self.model, self.inner)}

    def find_nonfinite(self) -> str:
        """Return a tensor of this process's state that is not finite, or an empty text."""
        state = self.state()
        tensors = dict(state["params"])
        tensors |= {
            f"{moment}.{name}": t for moment in MOMENTS for name, t in state[moment].items()
        }
        return first_nonfinite(tensors)

    def set_step(self, step: int) -> None:
        """Set the number of steps done, for the bias correction of the moments."""
        set_step(self.inner, step)


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Return AdamW (arXiv:1711.05101) for the parameters that are not frozen.

    In two groups: with decay, without.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {
            "params": [p for name, p in named if has_weight_decay(name) == decayed],
            "weight_decay": config.weight_decay if decayed else 0.0,
        }
        for decayed in (True, False)
    ]
    return torch.optim.AdamW(
        groups,
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=named[0][1].device.type in ("cuda", "cpu"),
    )


@dataclass
class LossScale:
    """Dynamic loss scale of float16 runs (arXiv:1710.03740), a power of two.

    torch's GradScaler checks this process's gradients for infinities; the global norm, which
    clipping needs anyway, includes those of all processes.
    """

    scale: float = 2.0**16
    clean: int = 0
    """Steps since the scale was last changed."""
    skipped: int = 0
    """Steps without an update, because a gradient was not finite."""

    def update(self, finite: bool) -> None:
        """Halve the scale after a non-finite gradient, double it after 2000 finite ones."""
        self.clean += 1
        if not finite:
            self.scale, self.clean, self.skipped = self.scale / 2, 0, self.skipped + 1
        elif self.clean == 2000:
            self.scale, self.clean = self.scale * 2, 0


def clip_gradients(
    parameters: Iterable[Tensor], max_norm: float | None, scale: float = 1.0
) -> Tensor:
    """Scale the gradients by max_norm / max(norm, max_norm), in place; return the global norm.

    None does not clip. The gradients are first divided by `scale`, the loss scale. The norm is over
    all processes.

    Not `torch.nn.utils.clip_grad_norm_`: it adds 1e-6 to the norm, which alone makes the frameworks
    differ by 1.5e-9 after 20 steps.
    """
    grads = [_reduce_partial(p) for p in parameters if p.grad is not None]
    shards = [g.to_local() if isinstance(g, DTensor) else g for g in grads]
    replicas = [_count_replicas(g) for g in grads]
    squares = [_sum_squares(s) / n for s, n in zip(shards, replicas, strict=True)]
    square = torch.stack(squares).sum()
    if any(isinstance(g, DTensor) for g in grads):
        dist.all_reduce(square)
    norm = square.sqrt().to(shards[0].dtype) / scale
    if max_norm is not None:
        torch._foreach_mul_(shards, max_norm / torch.clamp(norm, min=max_norm) / scale)
    elif scale != 1:
        torch._foreach_mul_(shards, 1 / scale)
    return norm


@torch.no_grad()
def first_nonfinite(tensors: Mapping[str, Tensor]) -> str:
    """Return the first key whose tensor, or local shard, is not finite, or an empty text."""
    shards = (t.to_local() if isinstance(t, DTensor) else t for t in tensors.values())
    finite = torch.stack([shard.isfinite().all() for shard in shards]).tolist()
    return next((key for key, good in zip(tensors, finite, strict=True) if not good), "")


def _sum_squares(tensor: Tensor) -> Tensor:
    """Return the sum of squares of a tensor in float64.

    Row by row: on a CPU, torch's float32 norm of 40 million elements at once is 0.3 % too small.
    """
    return torch.linalg.vector_norm(tensor, dim=-1).double().square().sum()


def _reduce_partial(parameter: Tensor) -> Tensor:
    """Return the gradient with the placements of its parameter.

    With tensor parallelism the gradient of a norm's gain is a partial sum, over this process's
    heads or part of the sequence.
    """
    grad = parameter.grad
    assert grad is not None
    if isinstance(parameter, DTensor) and isinstance(grad, DTensor):
        grad = parameter.grad = grad.redistribute(placements=parameter.placements)
    return grad


def _count_replicas(tensor: Tensor) -> int:
    """Return the number of processes that hold the same shard."""
    if not isinstance(tensor, DTensor):
        return 1
    sizes = zip(tensor.placements, tensor.device_mesh.shape, strict=True)
    return math.prod(size for placement, size in sizes if placement.is_replicate())


def moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    """Return `exp_avg` and `exp_avg_sq` by canonical name, not copied; zeros before a step.

    Frozen parameters have none.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for parameter in trained.values():
        state = optimizer.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state.update({moment: torch.zeros_like(parameter) for moment in MOMENTS})
    return {
        moment: {n: optimizer.state[p][moment] for n, p in trained.items()} for moment in MOMENTS
    }


def set_step(optimizer: torch.optim.Optimizer, step: int) -> None:
    """Set the number of steps done, for the bias correction of the moments."""
    for state in optimizer.state.values():
        state["step"].fill_(step)
