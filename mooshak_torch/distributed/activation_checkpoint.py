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
    torch.ops.mooshak.linear.default,  # The same in a compiled graph (mooshak_torch/ops/matmul.py).
)
"""Operations whose results `train.remat dots` saves."""


def apply_ac(model: Model, policy: str) -> None:
    """Apply activation checkpointing to the layers (`train.remat`), in place.

    The backward pass recomputes a layer from its input (full), or from its input and the results of
    its matrix products (dots).
    """
    if policy == "none":
        return
    selective = partial(create_selective_checkpoint_contexts, _save_products)
    options: dict[str, Any] = {"context_fn": selective} if policy == "dots" else {}
    for layer in disable_own_recompute(model):
        layer.forward = partial(
            checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False, **options
        )


def _save_products(_: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    save = operation in SAVED_OPS
    return CheckpointPolicy.MUST_SAVE if save else CheckpointPolicy.PREFER_RECOMPUTE


def disable_own_recompute(model: Model) -> list[Any]:
    """Turn off the layers' own recomputation (`recompute_in_backward`); return the layers."""
    layers: list[Any] = list(model.layers)
    for layer in layers:
        layer.recompute_activations = layer.mlp.recompute_activations = False
    return layers
