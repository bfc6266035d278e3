"""Tensor and sequence parallelism (arXiv:1909.08053, arXiv:2205.05198) with DTensor."""

import warnings
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_tensor,
)

from mooshak.config.lora import is_adapter
from mooshak.config.sections import Config
from mooshak.errors import require
from mooshak_torch.model import MLP, Attention, Model, RMSNorm
from mooshak_torch.ops.cross_entropy import FusedLinearCrossEntropy

COLUMNS = ("embeddings", "wq", "wk", "wv", "w1", "w3", "lm_head")
ROWS = ("wo", "w2")
TP_PLAN = {
    **{f"{name}.{key}": Shard(0) for name in COLUMNS for key in ("weight", "bias")},
    **{f"{name}.weight": Shard(1) for name in ROWS},
}
"""End of a canonical name -> the placement over the axis `tensor`; others are replicated."""

ADAPTER_PLAN = {
    **{f"{name}.lora_b.weight": Shard(0) for name in COLUMNS},
    **{f"{name}.dora_magnitude": Shard(0) for name in COLUMNS},
    **{f"{name}.lora_a.weight": Shard(1) for name in ROWS},
}
"""The same for adapters: the rank is not sharded."""

# FSDP2 warns that writes into views would be lost; no output is written to.
warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view", UserWarning)


def apply_tp(objective: nn.Module, mesh: DeviceMesh, config: Config) -> None:
    """Shard heads, MLP width and vocabulary over the axis `tensor` (arXiv:1909.08053), in place.

    Between attention and MLP the hidden states are replicated, or sharded by sequence
    (`parallel.sequence_parallel`, arXiv:2205.05198). Parameters become DTensors. Hooks convert the
    modules' inputs to DTensors and their outputs back to local tensors.
    """
    model, loss = objective.model, objective.loss
    assert isinstance(model, Model) and isinstance(loss, FusedLinearCrossEntropy)
    require(
        not model.embeddings.token_ids,
        "lora.trainable_token_indices: torch has no tensor parallelism of these rows; set the mesh "
        "axis tensor to 1",
    )
    replicated, last = Replicate(), Shard(-1)
    hidden: Placement = Shard(1) if config.parallel.sequence_parallel else replicated
    for path, module in model.named_modules():
        name = path.rpartition(".")[2]
        for key, parameter in list(module.named_parameters(recurse=False)):
            value = distribute_tensor(parameter, mesh, [_placement(f"{path}.{key}")])
            module.register_parameter(key, nn.Parameter(value, parameter.requires_grad))
        if isinstance(module, Attention | MLP):
            _convert_input(module, mesh, hidden, replicated)
        if isinstance(module, Attention) and module.wo is None:
            _convert_output(module, mesh, hidden, local=last)
        if name in ("wq", "wk", "wv", "w1", "w3"):
            _convert_output(module, mesh, last)
        elif name in ("wo", "w2"):
            _convert_input(module, mesh, last, last)
            _convert_output(module, mesh, hidden)
        elif name in ("q_norm", "k_norm"):
            _convert_input(module, mesh, Shard(2), Shard(2))
            _convert_output(module, mesh, Shard(2))
        elif isinstance(module, RMSNorm):
            _convert_input(module, mesh, hidden, hidden)
            _convert_output(module, mesh, hidden)
    _convert_input(model.embeddings, mesh, replicated, replicated)
    _convert_output(model.embeddings, mesh, hidden)
    if model.lm_head is not None:
        _convert_input(model.lm_head, mesh, hidden, replicated)
        _convert_output(model.lm_head, mesh, replicated)

    def gather(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        x = DTensor.from_local(inputs[0], mesh, [hidden]).redistribute(placements=[replicated])
        # Each process has the loss of its part of the vocabulary: its gradient is a partial sum.
        return x.to_local(grad_placements=[Partial()]), *inputs[1:]

    loss.register_forward_pre_hook(gather)


def _placement(name: str) -> Placement:
    """Return the placement of a parameter by the end of its canonical name."""
    plan = ADAPTER_PLAN if is_adapter(name) else TP_PLAN
    return next((p for end, p in plan.items() if f".{name}".endswith(f".{end}")), Replicate())


def _convert_input(module: nn.Module, mesh: DeviceMesh, local: Placement, used: Placement) -> None:
    """Convert the first input, a local tensor placed as `local`, to a DTensor placed as `used`."""

    def hook(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        x = DTensor.from_local(inputs[0], mesh, [local])
        return x.redistribute(placements=[used]), *inputs[1:]

    module.register_forward_pre_hook(hook)


def _convert_output(
    module: nn.Module, mesh: DeviceMesh, wanted: Placement, local: Placement | None = None
) -> None:
    """Convert the output to a local tensor placed as `wanted`.

    The output is a DTensor, or, with `local`, a local tensor placed as `local`.
    """

    def hook(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        if local is not None:
            output = DTensor.from_local(output, mesh, [local])
        assert isinstance(output, DTensor)
        return output.redistribute(placements=[wanted]).to_local()

    module.register_forward_hook(hook)
