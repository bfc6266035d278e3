"""AdamW with decay on matrices only, and clipping by the global norm."""

import math
from collections.abc import Iterable, Iterator
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
    """AdamW and clipping of a model in one process, under DDP or under FSDP2.

    DeepSpeed's engine has the same interface: `distributed.deepspeed.ZeroOptimizer`.
    """

    def __init__(self, objective: nn.Module, model: nn.Module, config: OptimizerConfig):
        self.objective, self.model = objective, model
        self.inner = make_optimizer(model, config)
        # Allocated by the first step they would lie between activations and fragment the heap.
        moments(model, self.inner)

    def zero_grad(self) -> None:
        """Drop the gradients."""
        self.inner.zero_grad(set_to_none=True)

    @contextmanager
    def no_sync(self, when: bool) -> Iterator[None]:
        """Leave gradients unreduced inside the block (all micro-batches but the last)."""
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
        """Add the gradients of a loss to those of the parameters."""
        loss.backward()

    def clip(self, max_norm: float, scale: float = 1.0) -> Tensor:
        """Clip the gradients, divided by the loss's `scale`, as `clip_gradients` does."""
        return clip_gradients(self.objective.parameters(), max_norm, scale)

    def step(self, rate: float) -> None:
        """Update the parameters with a learning rate."""
        for group in self.inner.param_groups:
            group["lr"] = rate
        self.inner.step()

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Return `params`, `exp_avg`, `exp_avg_sq` by canonical name: the tensors themselves."""
        return {"params": dict(self.model.named_parameters()), **moments(self.model, self.inner)}

    def set_step(self, step: int) -> None:
        """Set the number of steps done, which the moments' bias correction depends on."""
        set_step(self.inner, step)


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW (arXiv:1711.05101) over every parameter, in two groups: with decay and without."""
    named = list(model.named_parameters())
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
    """Dynamic scaling of the loss in float16 runs (arXiv:1710.03740), by powers of two.

    Torch's GradScaler looks for infinities among this process's shards; the global norm, which
    clipping needs anyhow, has those of all.
    """

    scale: float = 2.0**16
    clean: int = 0
    """Steps since the scale was changed."""
    skipped: int = 0
    """Steps that did not change the parameters, because a gradient was not finite."""

    def update(self, finite: bool) -> None:
        """Halve the scale after a gradient that was not finite, double it after 2000 that were."""
        self.clean += 1
        if not finite:
            self.scale, self.clean, self.skipped = self.scale / 2, 0, self.skipped + 1
        elif self.clean == 2000:
            self.scale, self.clean = self.scale * 2, 0


def clip_gradients(parameters: Iterable[Tensor], max_norm: float, scale: float = 1.0) -> Tensor:
    """Scale the gradients by max_norm / max(norm, max_norm), in place; returns the global norm.

    They are divided by `scale` first, the loss's. The norm is over all processes.

    `torch.nn.utils.clip_grad_norm_` adds 1e-6 to the norm, which alone would part the frameworks by
    1.5e-9 after 20 steps.
    """
    grads = [_reduced(p) for p in parameters if p.grad is not None]
    parts = [g.to_local() if isinstance(g, DTensor) else g for g in grads]
    copies = [_copies(g) for g in grads]
    square = torch.stack([_square(p) / n for p, n in zip(parts, copies, strict=True)]).sum()
    if any(isinstance(g, DTensor) for g in grads):
        dist.all_reduce(square)
    norm = square.sqrt().to(parts[0].dtype) / scale
    torch._foreach_mul_(parts, max_norm / torch.clamp(norm, min=max_norm) / scale)
    return norm


def _square(tensor: Tensor) -> Tensor:
    """The sum of the squares of a tensor, float64.

    Row by row: on a CPU torch's float32 norm of 40 million elements at once is 0.3 % too small.
    """
    return torch.linalg.vector_norm(tensor, dim=-1).double().square().sum()


def _reduced(parameter: Tensor) -> Tensor:
    """The gradient, laid out as its parameter is.

    Under tensor parallelism, where each process saw its own heads or its own part of the sequence,
    the gradient of a norm's gain is still to be added up.
    """
    grad = parameter.grad
    assert grad is not None
    if isinstance(parameter, DTensor) and isinstance(grad, DTensor):
        grad = parameter.grad = grad.redistribute(placements=parameter.placements)
    return grad


def _copies(tensor: Tensor) -> int:
    """How many processes hold the same part of a tensor."""
    if not isinstance(tensor, DTensor):
        return 1
    sizes = zip(tensor.placements, tensor.device_mesh.shape, strict=True)
    return math.prod(size for placement, size in sizes if placement.is_replicate())


def moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    """`exp_avg` and `exp_avg_sq` by canonical name; the tensors themselves, zeros before a step."""
    for parameter in model.parameters():
        state = optimizer.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state.update({moment: torch.zeros_like(parameter) for moment in MOMENTS})
    return {
        moment: {n: optimizer.state[p][moment] for n, p in model.named_parameters()}
        for moment in MOMENTS
    }


def set_step(optimizer: torch.optim.Optimizer, step: int) -> None:
    """Set the number of steps done, which the correction of the moments' bias depends on."""
    for state in optimizer.state.values():
        state["step"].fill_(step)
