"""Write a checkpoint as a directory that transformers loads.

A Llama-shaped model becomes one of transformers' own classes; the mooshak architecture is exported
with its code (`remote_code/`, loaded with `trust_remote_code=True`). A SentencePiece model is also
written as a `tokenizer.json` with the same ids. Before the directory gets its name, transformers
reads it back: its logits and token ids must be ours (export_hf_check.py).
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mooshak.checkpoints import base, safetensors
from mooshak.checkpoints.base import Checkpoint
from mooshak.checkpoints.hf import hf_name, open_checkpoint
from mooshak.checkpoints.hf_config import model_to_hf
from mooshak.files import atomic_directory, read_object
from mooshak.tokenizer.metadata import HF_CONFIG
from parity.export_check import refuse
from parity.export_tokenizer import TOKEN_IDS, source_tokenizer, write_json, write_tokenizer

REMOTE_CODE = Path(__file__).parent / "remote_code"
AUTO_MAP = {
    "AutoConfig": "configuration_mooshak.MooshakConfig",
    "AutoModelForCausalLM": "modeling_mooshak.MooshakForCausalLM",
}
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def write_checkpoint(
    path: Path,
    source: Checkpoint,
    shard_size: int | None = None,
    check: bool = True,
    force: bool = False,
) -> None:
    """Write the weights of a checkpoint of any kind; `path` exists only when it is complete.

    Raises `InputError` where no architecture of transformers computes the model's function, and,
    unless `force` is true, where the `check` by transformers finds a difference.
    """
    # It needs torch and transformers, which are optional here.
    from parity.export_hf_check import hf_differences

    model, tokenizer = source.model, source_tokenizer(source)
    files = dict(source.tokenizer_files)
    original = read_object(files.pop(HF_CONFIG)) if HF_CONFIG in files else None
    source = replace(source, tokenizer_files=files)
    config = model_to_hf(model, original)
    names = {hf_name(name): name for name in model.parameter_shapes()}
    tensors = {theirs: source.tensors[names[theirs]] for theirs in sorted(names)}

    def read(key: str, rows: slice = base.FULL_SLICE) -> np.ndarray:
        return source.read(names[key], rows)

    config |= _dtype(tensors)
    if model.architecture == "mooshak":
        config["auto_map"] = AUTO_MAP
    with atomic_directory(path, source.n_bytes) as directory:
        ids = write_tokenizer(directory, source, tokenizer)
        config |= {key: id for key, id in ids.items() if config.get(key) is None}
        if "generation_config.json" not in files:
            ids = {key: config[key] for key in TOKEN_IDS.values() if config.get(key) is not None}
            write_json(directory / "generation_config.json", ids)
        if model.architecture == "mooshak":
            for file in REMOTE_CODE.glob("*.py"):
                shutil.copyfile(file, directory / file.name)
        write_json(directory / "config.json", config)
        safetensors.write_tensors(directory, "model", tensors, read, shard_size)
        base.verify(open_checkpoint(directory))
        differences = hf_differences(directory, source, tokenizer) if check else []
        refuse(path, differences, force)
        nfc = tokenizer is not None and tokenizer.nfc
        card = model_card(source, config, nfc, differences)
        (directory / "README.md").write_text(card, "utf-8")


def _dtype(tensors: dict[str, Any]) -> dict[str, str]:
    """Return the dtype of the weights under the keys of transformers 5 and of transformers 4."""
    names = {dtype: DTYPES[name] for name, dtype in base.DTYPES.items()}
    kinds = {names[dtype] for dtype, _ in tensors.values()}
    kind = kinds.pop() if len(kinds) == 1 else "float32"
    return {"dtype": kind, "torch_dtype": kind}


def model_card(
    source: Checkpoint, config: dict[str, Any], nfc: bool = False, differences: Sequence[str] = ()
) -> str:
    """Render the model card (`README.md`): sizes, the metrics of its run, known differences."""
    model, remote = source.model, source.model.architecture == "mooshak"
    trust = ", trust_remote_code=True" if remote else ""
    card = f"""---
library_name: transformers
pipeline_tag: text-generation
---

# {config["architectures"][0]}, {model.parameter_count():,} parameters

| | |
|---|---|
| layers | {model.n_layers} |
| hidden size | {model.dim} |
| attention heads (key/value heads) | {model.n_heads} ({model.G}) |
| vocabulary | {model.vocab_size:,} |
| maximum sequence length | {model.max_seq_len:,} |
| dtype | {config["dtype"]} |
"""
    for name, value in training_figures(source).items():
        card += f"| {name} | {value} |\n"
    if nfc:
        card += "| text | Unicode NFC; a prompt is to be in this form, too |\n"
    if differences:
        card += "\nThis export differs from its checkpoint:\n\n"
        card += "".join(f"- {line}\n" for line in differences)
    return (
        card
        + f"""
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("."{trust})
tokenizer = AutoTokenizer.from_pretrained("."{trust})
tokens = model.generate(**tokenizer("एक", return_tensors="pt"), max_new_tokens=64)
print(tokenizer.decode(tokens[0], skip_special_tokens=True))
```
"""
    )


def training_figures(source: Checkpoint) -> dict[str, str]:
    """Read the metrics of a training checkpoint's run up to its step; empty for weights only."""
    state = source.trainer_state
    if state is None:
        return {}
    data = state.get("data") or {}
    tokens = state["step"] * data.get("batch_size", 0) * data.get("sequence_length", 0)
    figures = {"steps": f"{state['step']:,}", "tokens seen": f"{tokens:,}"}
    metrics = source.path.parent.parent / "metrics.jsonl"
    lines = metrics.read_text("utf-8").splitlines() if metrics.is_file() else []
    measured: dict[str, Any] = {}
    for line in map(json.loads, lines):
        if line["step"] <= state["step"]:
            measured |= line
    for key, value in measured.items():
        if key in ("loss", "validation_loss") or key.startswith("bits_per_byte"):
            figures[key.replace("_", " ")] = f"{value:.4f}"
    return figures
