"""Adapters in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.

The names of the modules are those of the Hugging Face model (`hf_name`).
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mooshak.checkpoints.adapters import with_adapters
from mooshak.checkpoints.base import FULL_SLICE, Checkpoint, check_tensors, size_of
from mooshak.checkpoints.hf import hf_name
from mooshak.checkpoints.safetensors import entry_reader, read_entries, write_tensors
from mooshak.config.lora import TOKEN_ROWS, LoraConfig, frozen_parameters, is_adapter
from mooshak.config.model import ModelConfig
from mooshak.errors import InputError
from mooshak.files import atomic_directory, read_object

CONFIG_FILE = "adapter_config.json"
PREFIX = "base_model.model."
KINDS = {
    "lora_a.weight": "lora_A.weight",
    "lora_b.weight": "lora_B.weight",
    "dora_magnitude": "lora_magnitude_vector",
    TOKEN_ROWS: "token_adapter.trainable_tokens_delta",
}
"""End of our name of an adapter's tensor -> the end of PEFT's."""


def peft_name(name: str) -> str:
    """Return PEFT's name of a trained tensor, such as `layers.0.attention.wq.lora_a.weight`."""
    for ours, theirs in KINDS.items():
        if name.endswith(f".{ours}"):
            module = hf_name(name.removesuffix(ours) + "weight").removesuffix("weight")
            return f"{PREFIX}{module}{theirs}"
    return PREFIX + hf_name(name)


def trained_names(model: ModelConfig) -> dict[str, str]:
    """Return PEFT's name -> our name, of the adapters, of trained rows and of `modules_to_save`."""
    shapes = model.parameter_shapes()
    frozen = frozen_parameters(shapes, model.lora)
    return {peft_name(name): name for name in shapes if name not in frozen}


def write_adapter(path: Path, source: Checkpoint, base: str = "") -> None:
    """Write the adapters of a checkpoint, which PEFT loads on its model in Hugging Face's format.

    `base` is the directory of that model. Raises `InputError` if there are no adapters.
    """
    lora = source.model.lora
    if lora is None:
        raise InputError(f"{source.path} has no adapters; --to hf writes the model")
    names = trained_names(source.model)
    tensors = {theirs: source.tensors[ours] for theirs, ours in sorted(names.items())}

    def read(key: str, rows: slice = FULL_SLICE) -> np.ndarray:
        return source.read(names[key], rows)

    modules = {
        is_lora: sorted(
            {
                hf_name(ours.split(".lora_")[0] + ".weight" if is_lora else ours).split(".")[-2]
                for ours in names.values()
                if is_adapter(ours) == is_lora and not ours.endswith(("dora_magnitude", TOKEN_ROWS))
            }
        )
        for is_lora in (True, False)
    }
    tables = [name.split(".")[-3] for name in names if name.endswith(KINDS[TOKEN_ROWS])]
    config = {
        "base_model_name_or_path": base,
        "bias": "none",
        "inference_mode": True,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "modules_to_save": modules[False] or None,
        "peft_type": "LORA",
        "r": lora.rank,
        "target_modules": modules[True],
        "task_type": "CAUSAL_LM",
        "trainable_token_indices": dict.fromkeys(tables, lora.trainable_token_indices) or None,
        "use_dora": lora.dora,
        "use_rslora": lora.rslora,
    }
    with atomic_directory(path, sum(map(size_of, tensors.values()))) as to:
        (to / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        write_tensors(to, "adapter_model", tensors, read)


def open_adapter(path: Path, base: Checkpoint) -> Checkpoint:
    """Open an adapter as a checkpoint: the model `base` with the adapters of a directory of PEFT's.

    Raises `InputError` for an adapter of another kind or of another model.
    """
    stored = read_entries(path, "adapter_model", required=True)
    lora = _lora(path, read_object(path / CONFIG_FILE), set(stored), base.model)
    model = replace(base.model, lora=lora)
    known = {peft_name(name): name for name in model.parameter_shapes()}
    if left_over := sorted(set(stored) - set(known)):
        raise InputError(f"{path}: tensor {left_over[0]} is not one of {base.path}: another model?")
    keys = {known[key]: key for key in stored}
    tensors = dict(base.tensors) | {
        name: (stored[key].dtype, stored[key].shape) for name, key in keys.items()
    }
    tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith("exp_avg")}
    read_stored = entry_reader(stored)

    # PEFT may train the rows of one table only.
    whole = with_adapters(base, lora, 0, np.dtype(np.float32))
    rest = {key: whole.tensors[key] for key in model.parameter_shapes() if key.endswith(TOKEN_ROWS)}
    tensors = rest | tensors

    def read(key: str, rows: slice = FULL_SLICE) -> np.ndarray:
        return read_stored(keys[key], rows) if key in keys else whole.read(key, rows)

    tensors = check_tensors(path, model, tensors)
    return replace(base, path=path, model=model, tensors=tensors, read=read, trainer_state=None)


def _lora(path: Path, config: dict[str, Any], stored: set[str], model: ModelConfig) -> LoraConfig:
    """Return the adapters that a configuration of PEFT and the names of its tensors describe."""
    where = path / CONFIG_FILE
    if config.get("peft_type") != "LORA":
        raise InputError(f"{where}: peft_type {config.get('peft_type')} is not LORA")
    for key in ("rank_pattern", "alpha_pattern", "layers_to_transform", "layer_replication"):
        if config.get(key):
            raise InputError(f"{where}: {key} is not supported: adapters are alike in all layers")
    if config.get("bias", "none") != "none" or config.get("fan_in_fan_out"):
        raise InputError(f"{where}: bias and fan_in_fan_out are not supported")
    tokens = _trained_tokens(where, config.get("trainable_token_indices"))
    full = replace(model, lora=LoraConfig(rank=1, trainable_token_indices=tokens))
    ours = {peft_name(name): name for name in full.parameter_shapes()}
    names = [ours[key] for key in stored if key in ours]
    targets = {name.split(".")[-3] for name in names if name.endswith(".lora_a.weight")}
    saved = {
        "norms" if name.endswith("norm.weight") else name.removesuffix(".weight")
        for name in names
        if not is_adapter(name)
    }
    try:
        return LoraConfig(
            rank=config["r"],
            alpha=config["lora_alpha"],
            targets=sorted(targets),
            modules_to_save=sorted(saved),
            trainable_token_indices=tokens,
            rslora=bool(config.get("use_rslora")),
            dora=bool(config.get("use_dora")),
        )
    except (KeyError, InputError) as error:
        raise InputError(f"{where} is not a configuration of LoRA: {error}") from error


def _trained_tokens(where: Path, given: Any) -> list[int]:
    """Return the tokens whose rows are trained, the same of all tables and in ascending order."""
    tables = list(given.values()) if isinstance(given, dict) else [given or []]
    if any(tokens != tables[0] or tokens != sorted(set(tokens)) for tokens in tables):
        raise InputError(
            f"{where}: trainable_token_indices must be the same ascending ids for all tables"
        )
    result: list[int] = tables[0]
    return result
