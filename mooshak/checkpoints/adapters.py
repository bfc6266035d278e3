"""Checkpoints with adapters: added to a base, and merged into it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from mooshak.checkpoints.base import FULL_SLICE, Checkpoint, cast
from mooshak.checkpoints.formats import model_of
from mooshak.config.lora import TOKEN_ROWS, LoraConfig, is_adapter
from mooshak.config.sections import Config
from mooshak.errors import InputError, require
from mooshak.numerics.init_weights import initial_weight, row_norms


def with_adapters(source: Checkpoint, lora: LoraConfig, seed: int, dtype: np.dtype) -> Checkpoint:
    """Return the checkpoint with initial adapters in `dtype`: its function does not change.

    `lora_a` is drawn, `lora_b` is zero, `dora_magnitude` has the norms of the rows, and
    `token_rows` are those of their table.
    """
    model = replace(source.model, lora=lora)
    adapters = {name: s for name, s in model.parameter_shapes().items() if is_adapter(name)}
    tensors = dict(source.tensors) | {name: (dtype, shape) for name, shape in adapters.items()}

    def read(key: str, rows: slice = FULL_SLICE) -> np.ndarray:
        if key not in adapters:
            return source.read(key, rows)
        if key.endswith(".dora_magnitude"):
            weight = key.replace("dora_magnitude", "weight")
            return row_norms(source.read(weight, rows)).astype(dtype)
        if key.endswith(f".{TOKEN_ROWS}"):
            table = key.replace(TOKEN_ROWS, "weight")
            found = [source.read(table, slice(i, i + 1)) for i in lora.trainable_token_indices]
            return np.concatenate(found)[rows].astype(dtype)
        return initial_weight(model, seed, key, rows, dtype=dtype)

    return replace(
        source, model=model, tensors=tensors, read=read, trainer_state=None, checksums={}
    )


def check_live_reference(config: Config, first: int) -> None:
    """Raise `InputError` where the model without its adapters is not the initial model.

    A live reference turns the adapters off. `first` is the step to start from.
    """
    lora = config.model.lora
    if lora is None:
        return
    is_policy = config.data.format == "prompts"
    advice = "set " + ("grpo.beta 0" if is_policy else "dpo.precompute_reference true")
    require(
        not lora.modules_to_save,
        f"lora.modules_to_save changes the base model, which is the live reference; {advice}",
    )
    require(
        first > 0 or not config.init.from_ or model_of(Path(config.init.from_)).lora is None,
        f"init.from {config.init.from_} has adapters, so it is not its base, which would be the "
        f"live reference; {advice}, or merge them with parity.convert --merge-lora",
    )


def without_adapters(source: Checkpoint) -> Checkpoint:
    """Return the base of a checkpoint: its weights without adapters."""
    tensors = {key: t for key, t in source.tensors.items() if not is_adapter(key)}
    model = replace(source.model, lora=None)
    tensors = {key: tensors[key] for key in model.parameter_shapes()}
    return replace(source, model=model, tensors=tensors, trainer_state=None)


def merged(
    source: Checkpoint,
    dtype: np.dtype | None = None,
    report: Callable[[float, float, float], None] = lambda weight, moved, lost: None,
) -> Checkpoint:
    """Return the weights of a checkpoint with its adapters merged: w + s b a, with DoRA rescaled.

    Rows of trained tokens replace those of their table. Computed in float64 and rounded once, to
    `dtype` or, by default, to the dtype of each weight. `report` gets, of each merged block, the
    sums of the squares of the weight, of its change, and of the error of the rounding. Raises
    `InputError` for a checkpoint without adapters.
    """
    lora = source.model.lora
    if lora is None:
        raise InputError(f"{source.path} has no adapters to merge")
    base = without_adapters(source)
    tensors = {
        key: (stored if dtype is None else dtype, shape)
        for key, (stored, shape) in base.tensors.items()
    }

    def read(key: str, rows: slice = FULL_SLICE) -> np.ndarray:
        weight, wanted = source.read(key, rows), tensors[key][0]
        module = key.removesuffix(".weight")
        if f"{module}.{TOKEN_ROWS}" in source.tensors:
            weight = _with_token_rows(source, module, weight, rows, lora)
        if f"{module}.lora_a.weight" not in source.tensors:
            return cast(weight, wanted, source.label(key))
        exact = _merged_rows(source, module, weight, rows, lora)
        result = cast(exact, wanted, source.label(key))
        parts = (weight, exact - weight.astype(np.float64), exact - result.astype(np.float64))
        report(*(float(np.square(part, dtype=np.float64).sum()) for part in parts))
        return result

    return replace(base, tensors=tensors, read=read, checksums={})


def _with_token_rows(
    source: Checkpoint, module: str, weight: np.ndarray, rows: slice, lora: LoraConfig
) -> np.ndarray:
    """Return rows of a table, in which those of the trained tokens are replaced."""
    result, trained = weight.copy(), source.read(f"{module}.{TOKEN_ROWS}")
    start, stop, _ = rows.indices(source.tensors[f"{module}.weight"][1][0])
    for token, row in zip(lora.trainable_token_indices, trained, strict=True):
        if start <= token < stop:
            result[token - start] = row
    return result


def _merged_rows(
    source: Checkpoint, module: str, weight: np.ndarray, rows: slice, lora: LoraConfig
) -> np.ndarray:
    """Return rows of a merged matrix, float64."""
    a = source.read(f"{module}.lora_a.weight").astype(np.float64)
    b = source.read(f"{module}.lora_b.weight", rows).astype(np.float64)
    result: np.ndarray = weight.astype(np.float64) + lora.scale * (b @ a)
    if lora.dora:
        magnitude = source.read(f"{module}.dora_magnitude", rows).astype(np.float64)
        result *= (magnitude / row_norms(result))[:, None]
    return result
