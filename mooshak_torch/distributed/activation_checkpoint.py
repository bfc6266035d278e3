"""Activation checkpointing of layers (`train.remat`)."""

from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from mooshak_torch.model import Model

SAVED_OPS = (
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.mkldnn._linear_pointwise.default,
    torch.ops.mooshak.linear.default,  # The same, compiled (mooshak_torch/ops/matmul.py).
)
"""What `train.remat dots` keeps."""


def apply_ac(model: Model, policy: str) -> None:
    """Have the backward pass make the layers' activations again (`train.remat`), in place.

    full keeps the input of each layer, dots the results of matrix products, too.
    """
    if policy == "none":
        return
    kept = partial(create_selective_checkpoint_contexts, _keep_products)
    options: dict[str, Any] = {"context_fn": kept} if policy == "dots" else {}
    for layer in disable_own_recompute(model):
        layer.forward = partial(
            checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False, **options
        )


def _keep_products(_: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    keep = operation in SAVED_OPS
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


def disable_own_recompute(model: Model) -> list[Any]:
    """The layers, which no longer decide by themselves what is made again."""
    layers: list[Any] = list(model.layers)
    for layer in layers:
        layer.recompute_activations = layer.mlp.recompute_activations = False
    return layers
