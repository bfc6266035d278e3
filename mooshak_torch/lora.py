"""Low-rank adapters (LoRA, arXiv:2106.09685) of the matrices of a layer.

Mirror: mooshak_jax/lora.py. The adapters are children of the linear layer that they change, with
the canonical names `lora_a.weight`, `lora_b.weight` and `dora_magnitude`.
Shapes: B batch, T time, I contracted width, O output width, R rank.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mooshak.config.lora import TARGETS, LoraConfig, is_target
from mooshak_torch.ops.matmul import linear


class Matrix(nn.Module):
    """One of the two matrices of an adapter. Weight [out, in]."""

    def __init__(self, n_in: int, n_out: int, dtype: torch.dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_out, n_in, dtype=dtype))


def set_adapters(block: Any, lora: LoraConfig, compute: torch.dtype) -> None:
    """Add adapters to the linear layers of a block.

    Adapters have the dtype of the parameters. The block's own matrices are not trained, and are
    converted to the compute dtype.
    """
    for name, group in TARGETS.items():
        layer: Any = getattr(getattr(block, group), name, None)
        if layer is None:
            continue
        if is_target(lora, name):
            (n_out, n_in), dtype = layer.weight.shape, layer.weight.dtype
            layer.lora = lora
            layer.lora_a = Matrix(n_in, lora.rank, dtype)
            layer.lora_b = Matrix(lora.rank, n_out, dtype)
            if lora.dora:
                layer.dora_magnitude = nn.Parameter(torch.empty(n_out, dtype=dtype))
        for key, value in list(layer.named_parameters(recurse=False)):
            if key != "dora_magnitude":
                setattr(layer, key, nn.Parameter(value.detach().to(compute), requires_grad=False))


@contextmanager
def disable_adapters(model: nn.Module) -> Iterator[None]:
    """Turn off the adapters of a model inside the block: it is its base."""
    found = [
        (module, key, value)
        for module in model.modules()
        for key in ("lora", "token_ids")
        if (value := getattr(module, key, None))
    ]
    for module, key, _ in found:
        setattr(module, key, None)
    try:
        yield
    finally:
        for module, key, value in found:
            setattr(module, key, value)


def set_token_rows(module: Any, lora: LoraConfig | None) -> None:
    """Add the trained rows of some tokens to a table: the embedding, or the output head."""
    if lora is not None and lora.trainable_token_indices:
        weight = module.weight
        module.token_ids = lora.trainable_token_indices
        shape = len(module.token_ids), weight.shape[1]
        module.token_rows = nn.Parameter(torch.empty(shape, dtype=weight.dtype))


def table_of(module: Any) -> Tensor:
    """Return the table [V, D] of an embedding or an output head, with its trained rows."""
    weight_VD: Tensor = module.weight
    if not module.token_ids:
        return weight_VD
    ids = torch.tensor(module.token_ids, device=weight_VD.device)
    return weight_VD.index_copy(0, ids, module.token_rows)


def look_up(tokens_BT: Tensor, module: Any) -> Tensor:
    """Return the rows [B, T, D] of tokens in an embedding, those of trained tokens included."""
    x_BTD = F.embedding(tokens_BT, module.weight)
    if not module.token_ids:
        return x_BTD
    # Not from `table_of`: no copy of the table is needed for some of its rows.
    ids = torch.tensor(module.token_ids, device=tokens_BT.device)
    is_trained_BTN = tokens_BT.unsqueeze(-1) == ids
    own_BTD = F.embedding(is_trained_BTN.int().argmax(-1), module.token_rows)
    return torch.where(is_trained_BTN.any(-1, keepdim=True), own_BTD, x_BTD)


def add_adapter(y_BTO: Tensor, x_BTI: Tensor, layer: Any, lora: LoraConfig) -> Tensor:
    """Return the output of an adapted linear layer, [B, T, O], from y = x w^T without adapter.

    It is y + s x a^T b^T, where s is `lora.scale`; with DoRA (arXiv:2402.09353) times
    magnitude / |w + s b a|, the norm of each row, which is a constant for the gradients, as in
    PEFT.
    """
    a_RI, b_OR = layer.lora_a.weight, layer.lora_b.weight
    low_BTR = linear(x_BTI, a_RI.to(x_BTI.dtype))
    y_BTO = y_BTO + linear(low_BTR, b_OR.to(x_BTI.dtype)) * lora.scale
    if not lora.dora:
        return y_BTO
    norm_O = _merged_norm(layer.weight, a_RI, b_OR, lora)
    return y_BTO * (layer.dora_magnitude / norm_O).to(y_BTO.dtype)


@torch.no_grad()
def _merged_norm(w_OI: Tensor, a_RI: Tensor, b_OR: Tensor, lora: LoraConfig) -> Tensor:
    """Return the norm [O] of each row of w + s b a, in the dtype of the adapters."""
    merged_OI = w_OI.to(b_OR.dtype) + (b_OR @ a_RI) * lora.scale
    return torch.linalg.vector_norm(merged_OI, dim=1)
