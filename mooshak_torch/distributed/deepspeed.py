"""DeepSpeed's ZeRO 1, 2 and 3 (arXiv:1910.02054) with this project's optimizer and checkpoints.

1 cuts the optimizer state over the processes, 2 the gradients too, 3 the parameters too. The model
casts on its own, so that DeepSpeed has float32 to deal with, in bfloat16 runs as well.
"""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from mooshak.checkpoints.base import MOMENTS
from mooshak.config.sections import Config
from mooshak.errors import InputError
from mooshak_torch.model import Model, Rope
from mooshak_torch.optimizer import make_optimizer

Values = Callable[[str], np.ndarray]
"""Canonical name -> value of the whole tensor."""


class ZeroOptimizer:
    """The interface of `mooshak_torch.optimizer.Optimizer` on top of a DeepSpeed engine."""

    def __init__(self, engine: Any, model: Model):
        self.engine, self.named = engine, dict(model.named_parameters())
        zero = engine.optimizer
        self.cut = engine.zero_optimization_stage() == 3
        """Whether parameters are cut too."""
        self.flats: list[Tensor] = (
            zero.fp32_partitioned_groups_flat if self.cut else zero.single_partition_of_fp32_groups
        )
        """This process's parts of the parameters, many in one."""
        for flat in self.flats:
            moments = {moment: torch.zeros_like(flat) for moment in MOMENTS}
            zero.optimizer.state[flat] = {"step": torch.zeros(()), **moments}
        if not self.cut:
            # DeepSpeed would look for them when it has updated the first of the groups.
            zero._lazy_init_hp_params_optimizer_state()

    def zero_grad(self) -> None:
        """Do nothing: the engine's `step` has dropped the gradients."""

    @contextmanager
    def no_sync(self, when: bool) -> Iterator[None]:
        """Leave gradients unreduced inside the block (all micro-batches but the last)."""
        self.engine.set_gradient_accumulation_boundary(not when)
        yield

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss to those of the parameters."""
        self.engine.backward(loss, scale_wrt_gas=False)

    def clip(self, max_norm: float, scale: float = 1.0) -> Tensor:
        """Have the next step scale the gradients by max_norm / max(norm, max_norm).

        Returns the global norm. `scale`, the loss's, is 1: `check` refuses float16. DeepSpeed's
        own factor is clip_grad / (norm + 1e-6), where that is less than one.
        """
        zero = self.engine.optimizer
        if self.cut:
            norm = torch.linalg.vector_norm(torch.stack(zero._get_norm_groups()))
        else:
            norm = zero.scaled_global_norm()
        zero.clip_grad = max_norm * (1 + 1e-6 / norm.item()) if norm > max_norm else 0.0
        return norm

    def step(self, rate: float) -> None:
        """Update the parameters with a learning rate."""
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        self.engine.step()

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Parameters and moments by canonical name, dealt out whole to the processes.

        They are put together one at a time; each is kept on the host of one process, which is the
        one that will write it.
        """
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        state: dict[str, dict[str, Tensor]] = {part: {} for part in ("params", *MOMENTS)}
        for number, (name, parameter) in enumerate(self.named.items()):
            whole = {m: safe_get_full_optimizer_state(parameter, m) for m in MOMENTS}
            whole["params"] = safe_get_full_fp32_param(parameter)
            if number % dist.get_world_size() == dist.get_rank():
                for part, tensor in whole.items():
                    state[part][name] = tensor.detach().to("cpu", copy=True)
        return state

    def set_step(self, step: int) -> None:
        """Set the number of steps done, which the moments' bias correction depends on."""
        for flat in self.flats:
            self.engine.optimizer.optimizer.state[flat]["step"].fill_(step)

    def restore(self, values: Values, step: int) -> None:
        """Set the moments (`values("exp_avg.NAME")`) and the number of steps done."""
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        self.set_step(step)
        for moment in MOMENTS:
            for name, parameter in self.named.items():
                value = torch.from_numpy(np.ascontiguousarray(values(f"{moment}.{name}")))
                value = value.to(self.flats[0].device, self.flats[0].dtype)
                if not self.cut:
                    safe_set_full_optimizer_state(parameter, value, moment)
                    continue
                # Parts of equal size for all processes, those of the last ones padded.
                part = value.new_zeros(parameter.ds_tensor.numel())  # type: ignore[attr-defined]
                mine = value.flatten()[dist.get_rank() * len(part) :][: len(part)]
                part[: len(mine)] = mine
                safe_set_local_optimizer_state(parameter, part, moment)


def make_engine(
    objective: nn.Module, config: Config, device: torch.device, values: Values
) -> tuple[nn.Module, ZeroOptimizer]:
    """The DeepSpeed engine of an objective on the meta device, whose parameters get `values`."""
    deepspeed = _deepspeed(device)
    model, stage = objective.model, config.parallel.zero_stage
    assert isinstance(model, Model)
    train, world = config.train, dist.get_world_size()
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": train.batch_size
        // (world * train.gradient_accumulation_steps),
        "gradient_accumulation_steps": train.gradient_accumulation_steps,
        "zero_optimization": {"stage": stage},
    }
    for path, module in model.named_modules():
        parameters = dict(module.named_parameters(recurse=False))
        if not parameters:
            continue
        # One module at a time: with ZeRO 3 no process ever holds the whole model.
        module.to_empty(device=device, recurse=False)
        with torch.no_grad():
            for key, parameter in module.named_parameters(recurse=False):
                parameter.copy_(torch.from_numpy(np.ascontiguousarray(values(f"{path}.{key}"))))
        if stage == 3:
            deepspeed.zero.Init(module=module, config_dict_or_path=settings)
    model.rope = Rope(model.config, model.rope.cos.dtype).to(device)
    if stage == 3:
        layer: Any
        for layer in model.layers:
            # A norm would be made again where its gain may not be gathered.
            layer.recompute_activations = False
        # The loss reads the head without calling it.
        head = model.lm_head or model.embeddings
        deepspeed.zero.register_external_parameter(objective.loss, head.weight)
    engine, *_ = deepspeed.initialize(
        model=objective, optimizer=make_optimizer(model, config.optimizer), config=settings
    )
    return engine, ZeroOptimizer(engine, model)


def check(config: Config) -> None:
    """Raises `InputError` where DeepSpeed cannot do what is asked."""
    if config.train.dtype not in ("float32", "bfloat16"):
        raise InputError(
            f"parallel.strategy deepspeed computes in float32 or bfloat16, not {config.train.dtype}"
        )
    if config.init.from_:
        raise InputError(
            "parallel.strategy deepspeed does not begin with init.from: make the first step with "
            "another strategy, and resume"
        )
    _deepspeed(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def _deepspeed(device: torch.device) -> Any:
    """The library, quiet. Raises `InputError` if it is not installed."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.disable(logging.WARNING)  # Dozens of lines from every process.
    try:
        import deepspeed
    except ImportError as error:
        raise InputError(
            f"parallel.strategy deepspeed needs pip install 'mooshak[deepspeed]' ({error})"
        ) from error
    finally:
        logging.disable(logging.NOTSET)
    # A collective for inference on CPUs, which DeepSpeed would compile when it starts.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    return deepspeed
