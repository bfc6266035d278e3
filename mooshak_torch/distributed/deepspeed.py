"""DeepSpeed's ZeRO 1, 2 and 3 (arXiv:1910.02054) with this project's optimizer and checkpoints.

Stage 1 shards the optimizer state over the processes, 2 also gradients, 3 also parameters. The
model casts its weights itself: DeepSpeed sees float32 in bfloat16 runs, too.
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
from mooshak_torch.model import Model
from mooshak_torch.optimizer import first_nonfinite, make_optimizer
from mooshak_torch.rope import Rope

Values = Callable[[str], np.ndarray]
"""Canonical name -> value of the full tensor."""


class ZeroOptimizer:
    """DeepSpeed engine with the interface of `mooshak_torch.optimizer.Optimizer`."""

    def __init__(self, engine: Any, model: Model):
        self.engine, self.named = engine, dict(model.named_parameters())
        zero = engine.optimizer
        self.shards_params = engine.zero_optimization_stage() == 3
        self.flats: list[Tensor] = (
            zero.fp32_partitioned_groups_flat
            if self.shards_params
            else zero.single_partition_of_fp32_groups
        )
        """This process's shards of the parameters, flattened and concatenated."""
        for flat in self.flats:
            moments = {moment: torch.zeros_like(flat) for moment in MOMENTS}
            zero.optimizer.state[flat] = {"step": torch.zeros(()), **moments}
        if not self.shards_params:
            # DeepSpeed itself links parameters and moments only after its first update.
            zero._lazy_init_hp_params_optimizer_state()

    def zero_grad(self) -> None:
        """Do nothing: the engine's `step` drops the gradients."""

    @contextmanager
    def no_sync(self, when: bool) -> Iterator[None]:
        """Skip the reduction of gradients inside the block (all micro-batches but the last)."""
        self.engine.set_gradient_accumulation_boundary(not when)
        yield

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradients of a loss in the parameters."""
        self.engine.backward(loss, scale_wrt_gas=False)

    def clip(self, max_norm: float | None, scale: float = 1.0) -> Tensor:
        """Set the next step to scale the gradients by max_norm / max(norm, max_norm).

        Returns the global norm. The loss scale is 1: `check` refuses float16. DeepSpeed scales by
        clip_grad / (norm + 1e-6) if that is less than one.
        """
        zero = self.engine.optimizer
        if self.shards_params:
            norm = torch.linalg.vector_norm(torch.stack(zero._get_norm_groups()))
        else:
            norm = zero.scaled_global_norm()
        clips = max_norm is not None and bool(norm > max_norm)
        zero.clip_grad = max_norm * (1 + 1e-6 / norm.item()) if clips else 0.0
        return norm

    def step(self, rate: float) -> None:
        """Update the parameters with the learning rate `rate`."""
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        self.engine.step()

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Return `params`, `exp_avg`, `exp_avg_sq` by canonical name, as copies in host memory.

        Tensors are gathered one at a time. Each process returns the full tensors that it will
        write, an equal share of all.
        """
        # Optional dependency.
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        state: dict[str, dict[str, Tensor]] = {group: {} for group in ("params", *MOMENTS)}
        for number, (name, parameter) in enumerate(self.named.items()):
            full = {m: safe_get_full_optimizer_state(parameter, m) for m in MOMENTS}
            full["params"] = safe_get_full_fp32_param(parameter)
            if number % dist.get_world_size() == dist.get_rank():
                for group, tensor in full.items():
                    state[group][name] = tensor.detach().to("cpu", copy=True)
        return state

    def find_nonfinite(self) -> str:
        """Return a part of this process's state that is not finite, or an empty text."""
        states = [self.engine.optimizer.optimizer.state[flat] for flat in self.flats]
        found = {f"parameters of group {i}": flat for i, flat in enumerate(self.flats)}
        for i, state in enumerate(states):
            found |= {f"{moment} of group {i}": state[moment] for moment in MOMENTS}
        return first_nonfinite(found)

    def set_step(self, step: int) -> None:
        """Set the number of steps done, for the bias correction of the moments."""
        for flat in self.flats:
            self.engine.optimizer.optimizer.state[flat]["step"].fill_(step)

    def restore(self, values: Values, step: int) -> None:
        """Set the moments, `values("exp_avg.NAME")`, and the number of steps done."""
        # Optional dependency.
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        self.set_step(step)
        for moment in MOMENTS:
            for name, parameter in self.named.items():
                value = torch.from_numpy(np.ascontiguousarray(values(f"{moment}.{name}")))
                value = value.to(self.flats[0].device, self.flats[0].dtype)
                if not self.shards_params:
                    safe_set_full_optimizer_state(parameter, value, moment)
                    continue
                # Shards of equal size for all processes, padded on the last.
                shard = value.new_zeros(parameter.ds_tensor.numel())  # type: ignore[attr-defined]
                elements = value.flatten()[dist.get_rank() * len(shard) :][: len(shard)]
                shard[: len(elements)] = elements
                safe_set_local_optimizer_state(parameter, shard, moment)


def make_engine(
    objective: nn.Module, config: Config, device: torch.device, values: Values
) -> tuple[nn.Module, ZeroOptimizer]:
    """Return the engine of an objective on the meta device, with parameters from `values`.

    Returns the wrapped objective and its optimizer.
    """
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
        # One module at a time: with ZeRO 3 no process ever holds the full model.
        module.to_empty(device=device, recurse=False)
        with torch.no_grad():
            for key, parameter in module.named_parameters(recurse=False):
                # torch reads no bfloat16 of NumPy, which checkpoints from elsewhere have.
                value = np.ascontiguousarray(values(f"{path}.{key}"), np.float32)
                parameter.copy_(torch.from_numpy(value))
        if stage == 3:
            deepspeed.zero.Init(module=module, config_dict_or_path=settings)
    model.rope = Rope(model.config, model.rope.cos.dtype).to(device)
    if stage == 3:
        layer: Any
        for layer in model.layers:
            # A norm would be recomputed when its gain may not be gathered.
            layer.recompute_activations = False
        # The loss reads the head without calling it.
        head = model.lm_head or model.embeddings
        deepspeed.zero.register_external_parameter(objective.loss, head.weight)
    engine, *_ = deepspeed.initialize(
        model=objective, optimizer=make_optimizer(model, config.optimizer), config=settings
    )
    return engine, ZeroOptimizer(engine, model)


def check(config: Config) -> None:
    """Raise `InputError` for a configuration that DeepSpeed does not support."""
    if config.train.dtype not in ("float32", "bfloat16"):
        raise InputError(
            f"parallel.strategy deepspeed computes in float32 or bfloat16, not {config.train.dtype}"
        )
    if config.frozen:
        raise InputError(
            "parallel.strategy deepspeed trains all parameters; use fsdp for adapters and frozen "
            "parameters"
        )
    if config.data.format in ("preferences", "prompts"):
        kind = "preference" if config.data.format == "preferences" else "policy"
        raise InputError(f"parallel.strategy deepspeed has no {kind} objective; use fsdp")
    if config.train.on_nonfinite == "skip":
        raise InputError(
            "parallel.strategy deepspeed leaves out no step; train.on_nonfinite is stop"
        )
    _deepspeed(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def _deepspeed(device: torch.device) -> Any:
    """Import DeepSpeed with less logging. Raises `InputError` if it is not installed."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.disable(logging.WARNING)  # DeepSpeed logs dozens of lines in every process.
    try:
        import deepspeed
    except ImportError as error:
        raise InputError(
            f"parallel.strategy deepspeed needs pip install 'mooshak[deepspeed]' ({error})"
        ) from error
    finally:
        logging.disable(logging.NOTSET)
    # DeepSpeed would compile this CPU collective, which is for inference only, when it starts.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    return deepspeed
