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

from mooshak.config.sections import Config
from mooshak_torch.model import MLP, Attention, Model, RMSNorm
from mooshak_torch.ops.cross_entropy import FusedLinearCrossEntropy

COLUMNS = ("embeddings", "wq", "wk", "wv", "w1", "w3", "lm_head")
ROWS = ("wo", "w2")
TP_PLAN = {
    **{f"{name}.{key}": Shard(0) for name in COLUMNS for key in ("weight", "bias")},
    **{f"{name}.weight": Shard(1) for name in ROWS},
}
"""End of a canonical name -> the dimension that the axis `tensor` cuts; others are whole."""

# Nobody writes into the output of an embedding or a layer, which DTensors give as views.
warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view", UserWarning)


def apply_tp(objective: nn.Module, mesh: DeviceMesh, config: Config) -> None:
    """Cut heads, MLP width and vocabulary over the axis `tensor` (arXiv:1909.08053), in place.

    Between attention and MLP the stream of hidden states is whole on every process, or cut by
    sequence (arXiv:2205.05198). Parameters become DTensors; modules compute on what they are given.
    """
    model, loss = objective.model, objective.loss
    assert isinstance(model, Model) and isinstance(loss, FusedLinearCrossEntropy)
    whole, last = Replicate(), Shard(-1)
    stream: Placement = Shard(1) if config.parallel.sequence_parallel else whole

    def take(module: nn.Module, is_now: Placement, wanted: Placement) -> None:
        """Make the module's first input a DTensor."""

        def hook(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            x = DTensor.from_local(inputs[0], mesh, [is_now])
            return x.redistribute(placements=[wanted]), *inputs[1:]

        module.register_forward_pre_hook(hook)

    def give(module: nn.Module, wanted: Placement, is_now: Placement | None = None) -> None:
        """Make the module's output a plain tensor, this process's part of it."""

        def hook(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
            if is_now is not None:
                output = DTensor.from_local(output, mesh, [is_now])
            assert isinstance(output, DTensor)
            return output.redistribute(placements=[wanted]).to_local()

        module.register_forward_hook(hook)

    for path, module in model.named_modules():
        name = path.rpartition(".")[2]
        for key, parameter in list(module.named_parameters(recurse=False)):
            placement = TP_PLAN.get(f"{name}.{key}", whole)
            value = distribute_tensor(parameter, mesh, [placement])
            module.register_parameter(key, nn.Parameter(value))
        if isinstance(module, Attention | MLP):
            take(module, stream, whole)
        if isinstance(module, Attention) and module.wo is None:
            give(module, stream, last)
        if name in ("wq", "wk", "wv", "w1", "w3"):
            give(module, last)
        elif name in ("wo", "w2"):
            take(module, last, last)
            give(module, stream)
        elif name in ("q_norm", "k_norm"):
            heads = Shard(2)
            take(module, heads, heads)
            give(module, heads)
        elif isinstance(module, RMSNorm):
            take(module, stream, stream)
            give(module, stream)
    take(model.embeddings, whole, whole)
    give(model.embeddings, stream)
    if model.lm_head is not None:
        take(model.lm_head, stream, whole)
        give(model.lm_head, whole)

    def gather(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        x = DTensor.from_local(inputs[0], mesh, [stream]).redistribute(placements=[whole])
        # The loss of a part of the vocabulary has a part of the gradient.
        return x.to_local(grad_placements=[Partial()]), *inputs[1:]

    loss.register_forward_pre_hook(gather)
