"""AdamW with decay on matrices only, and clipping by the global norm."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from mooshak.config import OptimizerConfig
from mooshak.interchange import MOMENTS
from mooshak.schedule import decays


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW (arXiv:1711.05101) over every parameter, in two groups: with decay and without."""
    named = list(model.named_parameters())
    groups = [
        {
            "params": [p for name, p in named if decays(name) == decayed],
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


def clip_gradients(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale the gradients by max_norm / max(norm, max_norm), in place; returns the global norm.

    `torch.nn.utils.clip_grad_norm_` adds 1e-6 to the norm, which alone would part the frameworks by
    1.5e-9 after 20 steps.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads)
    scale = max_norm / torch.clamp(norm, min=max_norm)
    torch._foreach_mul_(grads, scale)
    return norm


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
