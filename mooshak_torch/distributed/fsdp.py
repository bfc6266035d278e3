"""FSDP2 and HSDP: shard parameters, gradients and optimizer state (arXiv:2304.11277)."""

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

from mooshak.config.sections import Config
from mooshak_torch.model import COMPUTE_DTYPE, Model, RMSNorm


def apply_fsdp(objective: nn.Module, mesh: DeviceMesh, config: Config) -> None:
    """Shard parameters, gradients and optimizer state over the axis `fsdp` (FSDP2), in place.

    A layer is all-gathered before it computes, its matrices in the compute dtype. In float32 are
    gathered: the gains of norms, which compute in float32, and the embedding and the output head,
    whose gradients are sums over many tokens. All gradients are reduced in the parameters' dtype.
    """
    parallel, model, loss = config.parallel, objective.model, objective.loss
    assert isinstance(model, Model) and isinstance(loss, nn.Module)
    axes = ("data", "fsdp") if mesh["data"].size() > 1 else ("fsdp",)
    wide, compute = model.embeddings.weight.dtype, COMPUTE_DTYPE[model.dtype]
    common: dict[str, Any] = {"mesh": mesh[axes]}
    if parallel.cpu_offload:
        common["offload_policy"] = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda")

    def policy(dtype: torch.dtype) -> MixedPrecisionPolicy:
        # The modules cast their inputs themselves.
        return MixedPrecisionPolicy(dtype, wide, cast_forward_inputs=False)

    if compute != wide:
        for module in model.modules():
            if isinstance(module, RMSNorm):
                fully_shard(module, reshard_after_forward=False, mp_policy=policy(wide), **common)
    for layer in model.layers:
        fully_shard(
            layer,
            reshard_after_forward=parallel.reshard_after_forward,
            mp_policy=policy(compute),
            **common,
        )
    # A tied table is used at both ends of the model: it stays gathered in between (root module).
    tied = model.lm_head is None
    for module in () if tied else (model.embeddings, loss):
        # `cross_entropy` computes the head's gradient in the forward pass; `token_log_probs` reads
        # the head in the backward pass too, and FSDP gathers it again.
        fully_shard(module, reshard_after_forward=True, mp_policy=policy(wide), **common)
    # The head is a parameter of `loss` and of `model`: FSDP must not add it to the root, too.
    head = set() if tied else set(loss.parameters())
    fully_shard(objective, mp_policy=policy(wide), ignored_params=head, **common)
    _prefetch(list(model.layers), parallel.prefetch)


def _prefetch(layers: list[Any], ahead: int) -> None:
    """Gather `ahead` layers before they are needed, in the forward and the backward pass."""
    for i, layer in enumerate(layers):
        layer.set_modules_to_forward_prefetch(layers[i + 1 : i + 1 + ahead])
        layer.set_modules_to_backward_prefetch(layers[max(0, i - ahead) : i][::-1])
