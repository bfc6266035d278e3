"""Read Hugging Face checkpoints: the names of their tensors, and their files.

`hf_name` translates names, hf_config.py the configuration, and `open_checkpoint` reads such a
directory as any other checkpoint. Tokenizer, chat template and generation settings are copied
unchanged (`TOKENIZER_FILES`).

RoPE of HF's Llama rotates halves, as here: no matrix is permuted.
"""

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mooshak.checkpoints.base import (
    FULL_SLICE,
    Checkpoint,
    ReadTensor,
    Tensors,
    check_tensors,
    row_chunks,
)
from mooshak.checkpoints.checksums import verify_on_read
from mooshak.checkpoints.hf_config import model_from_hf
from mooshak.checkpoints.safetensors import entry_reader, read_entries
from mooshak.config.model import ModelConfig
from mooshak.errors import InputError
from mooshak.files import read_object
from mooshak.tokenizer.files import files_of_checkpoint
from mooshak.tokenizer.metadata import HF_CONFIG

MODELS = {
    "embeddings": "model.embed_tokens",
    "norm": "model.norm",
    "lm_head": "lm_head",
}
LAYERS = {
    "attention_norm": "input_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "attention.wo": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "mlp.w1": "mlp.gate_proj",
    "mlp.w2": "mlp.down_proj",
    "mlp.w3": "mlp.up_proj",
    "output_norm": "output_layernorm",
}
"""Module of a layer -> its Hugging Face name; `MODELS` has the modules outside of layers."""

NO_PARAMETERS = (
    r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",  # transformers before 4.32
    r"model\.layers\.\d+\.self_attn\.(bias|masked_bias)",
)
"""Tensors in some directories that are not parameters: they are ignored."""


def hf_name(name: str) -> str:
    """Translate `layers.3.mlp.w1.weight` to `model.layers.3.mlp.gate_proj.weight`."""
    if match := re.fullmatch(r"layers\.(\d+)\.(.+)\.(weight|bias)", name):
        return f"model.layers.{match[1]}.{LAYERS[match[2]]}.{match[3]}"
    module, _, last = name.rpartition(".")
    return f"{MODELS[module]}.{last}"


def read_config(path: Path) -> ModelConfig:
    """Read the model of a Hugging Face directory. Raises `InputError` if it is not supported."""
    config = path / "config.json"
    return model_from_hf(read_object(config), str(config))


@dataclass(frozen=True)
class HFTensors:
    """The tensors of a directory under their Hugging Face names."""

    tensors: Tensors
    read: ReadTensor
    checksums: Mapping[str, str]


def open_checkpoint(path: Path, stored: HFTensors | None = None) -> Checkpoint:
    """Open a Hugging Face directory; `stored` has its tensors if they are not safetensors.

    Raises `InputError` for a model that is not supported, or a tensor that is missing, has another
    shape, or belongs to no parameter.
    """
    model = read_config(path)
    found = stored or _safetensors(path, (HEAD,) if model.tie_embeddings else ())
    canonical = {hf_name(name): name for name in model.parameter_shapes()}
    computed = "|".join(NO_PARAMETERS)
    tensors = {
        canonical.get(name, name): tensor
        for name, tensor in found.tensors.items()
        if not re.fullmatch(computed, name)
    }
    if model.tie_embeddings and HEAD in tensors:
        tensor = tensors.pop(HEAD)
        if "embeddings.weight" in tensors:
            # Some programs write tied weights twice.
            _check_tied(path, found)
        else:
            tensors["embeddings.weight"], canonical[HEAD] = tensor, "embeddings.weight"
            del canonical[hf_name("embeddings.weight")]
    theirs = {ours: name for name, ours in canonical.items()}
    tensors = check_tensors(path, model, tensors, label)
    checksums = {
        canonical[name]: hash for name, hash in found.checksums.items() if name in canonical
    }

    def rows_of(key: str, rows: slice = FULL_SLICE) -> np.ndarray:
        return found.read(theirs[key], rows)

    read = verify_on_read(rows_of, tensors, checksums, lambda key: path)
    files = files_of_checkpoint(path) | {HF_CONFIG: path / "config.json"}
    return Checkpoint(path, "hf", model, None, tensors, read, checksums, files, label)


HEAD = "lm_head.weight"


def label(name: str) -> str:
    """Return the Hugging Face name of a parameter, with ours in brackets."""
    theirs = hf_name(name)
    return name if theirs == name else f"{theirs} ({name})"


def _check_tied(path: Path, there: HFTensors) -> None:
    """Raise `InputError` unless the output head is bit-equal to the embedding.

    If they differed, transformers 4 would use the embedding, and 5 both.
    """
    head, embedding = HEAD, hf_name("embeddings.weight")
    tensor = there.tensors[head]
    same = there.tensors.get(embedding) == tensor
    for rows in row_chunks(tensor) if same else ():
        a, b = there.read(head, rows), there.read(embedding, rows)
        same = same and np.array_equal(a.view(np.uint8), b.view(np.uint8))
    if not same:
        raise InputError(
            f"{path}: lm_head.weight differs from the embedding, to which tie_word_embeddings ties "
            "it; set that to false in config.json, or remove the tensor"
        )


def _safetensors(path: Path, optional: Collection[str]) -> HFTensors:
    stored = read_entries(path, "model", required=True, optional=optional)
    tensors = {key: (entry.dtype, entry.shape) for key, entry in stored.items()}
    checksums = {key: entry.checksum for key, entry in stored.items() if entry.checksum}
    return HFTensors(tensors, entry_reader(stored), checksums)


def has_safetensors(path: Path) -> bool:
    """Return whether the weights are safetensors, not a pickle, which only torch reads.

    Without either, safetensors are what is missing.
    """
    if any((path / f"model.safetensors{end}").is_file() for end in ("", ".index.json")):
        return True
    return not any((path / f"pytorch_model.bin{end}").is_file() for end in ("", ".index.json"))


def pickle_files(path: Path) -> list[Path]:
    """Return `pytorch_model.bin`, or else its shards. Raises `InputError` if a file is missing."""
    index = path / "pytorch_model.bin.index.json"
    names = {"pytorch_model.bin"}
    if index.is_file() and not (path / "pytorch_model.bin").is_file():
        try:
            names = set(json.loads(index.read_bytes())["weight_map"].values())
        except (ValueError, KeyError, AttributeError) as error:
            raise InputError(f"{index} is not an index of shards: {error!r}") from error
    files = [path / name for name in sorted(names)]
    if missing := [file for file in files if not file.is_file()]:
        raise InputError(f"{missing[0]} is missing; the checkpoint is incomplete")
    return files
