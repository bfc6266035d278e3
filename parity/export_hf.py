"""Write a checkpoint as a directory that transformers loads.

A Llama-shaped model becomes one of transformers' own classes; the mooshak architecture is exported
with its code (`remote_code/`, loaded with `trust_remote_code=True`). A SentencePiece model is also
written as a `tokenizer.json` with the same ids.
"""

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, processors

from mooshak.checkpoints import base, safetensors
from mooshak.checkpoints.base import Checkpoint
from mooshak.checkpoints.hf import hf_name, open_checkpoint
from mooshak.checkpoints.hf_config import model_to_hf
from mooshak.config.model import ModelConfig
from mooshak.errors import InputError
from mooshak.files import atomic_directory
from mooshak.tokenizer.chat_template import CHAT_TEMPLATE
from mooshak.tokenizer.files import HF_CONFIG, find_tokenizer, tokenizer_files
from mooshak.tokenizer.sentencepiece import parse_proto

REMOTE_CODE = Path(__file__).parent / "remote_code"
AUTO_MAP = {
    "AutoConfig": "configuration_mooshak.MooshakConfig",
    "AutoModelForCausalLM": "modeling_mooshak.MooshakForCausalLM",
}
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}

_SPACE_MARK = "\u2581"


def write_checkpoint(path: Path, source: Checkpoint, shard_size: int | None = None) -> None:
    """Write the weights of a checkpoint of any kind; `path` exists only when it is complete.

    Raises `InputError` where no architecture of transformers computes the model's function.
    """
    model, files = source.model, exported_tokenizer_files(source)
    original = json.loads(files.pop(HF_CONFIG).read_bytes()) if HF_CONFIG in files else None
    config = model_to_hf(model, original)
    names = {hf_name(name): name for name in model.parameter_shapes()}
    tensors = {theirs: source.tensors[names[theirs]] for theirs in sorted(names)}

    def read(key: str, rows: slice = base.FULL_SLICE) -> np.ndarray:
        return source.read(names[key], rows)

    config |= _dtype(tensors)
    if model.architecture == "mooshak":
        config["auto_map"] = AUTO_MAP
    with atomic_directory(path, source.n_bytes) as directory:
        for name, file in files.items():
            shutil.copyfile(file, directory / name)
        described = {"tokenizer.json", "tokenizer_config.json"} & files.keys()
        if "tokenizer.model" in files and not described:
            config |= _write_tokenizer(files["tokenizer.model"], directory, model)
        if "generation_config.json" not in files:
            ids = {key: config[key] for key in TOKEN_IDS.values() if config.get(key) is not None}
            _write_json(directory / "generation_config.json", ids)
        if model.architecture == "mooshak":
            for file in REMOTE_CODE.glob("*.py"):
                shutil.copyfile(file, directory / file.name)
        _write_json(directory / "config.json", config)
        (directory / "README.md").write_text(model_card(source, config))
        safetensors.write_tensors(directory, "model", tensors, read, shard_size)
        base.verify(open_checkpoint(directory))


def exported_tokenizer_files(source: Checkpoint) -> dict[str, Path]:
    """Return name -> file of the tokenizer's files that are copied."""
    files = dict(source.tokenizer_files)
    if any(name.startswith("tokenizer") for name in files):
        return files
    # A directory of weights only, as other programs write, has no tokenizer to copy.
    with contextlib.suppress(InputError):
        found = find_tokenizer(source.path, None)
        siblings = tokenizer_files(found.parent)
        siblings.pop(HF_CONFIG, None)
        files |= siblings if found.name in siblings else {"tokenizer.model": found}
    return files


def _dtype(tensors: dict[str, Any]) -> dict[str, str]:
    """Return the dtype of the weights under the keys of transformers 5 and of transformers 4."""
    names = {dtype: DTYPES[name] for name, dtype in base.DTYPES.items()}
    kinds = {names[dtype] for dtype, _ in tensors.values()}
    kind = kinds.pop() if len(kinds) == 1 else "float32"
    return {"dtype": kind, "torch_dtype": kind}


TOKEN_IDS = {"bos": "bos_token_id", "eos": "eos_token_id", "pad": "pad_token_id"}


def _write_tokenizer(file: Path, directory: Path, model: ModelConfig) -> dict[str, int]:
    """Write `tokenizer.json`, its configuration and the chat template; returns the special ids."""
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(file))
    fast_tokenizer(file).save(str(directory / "tokenizer.json"))
    ids = {name: getattr(pieces, f"{name}_id")() for name in ("bos", "eos", "pad", "unk")}
    specials = {f"{n}_token": pieces.id_to_piece(i) for n, i in ids.items() if i >= 0}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **specials,
        "clean_up_tokenization_spaces": False,
        "model_max_length": model.max_seq_len,
        "padding_side": "left",
    }
    _write_json(directory / "tokenizer_config.json", config)
    if pieces.is_control(pieces.piece_to_id("<|assistant|>")):
        (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return {key: ids[name] for name, key in TOKEN_IDS.items() if ids[name] >= 0}


def fast_tokenizer(file: Path) -> tokenizers.Tokenizer:
    """Convert a SentencePiece BPE model to a tokenizer of the `tokenizers` library, with equal ids.

    The vocabulary has spaces instead of SentencePiece's mark for them. The mark itself, where a
    text contains it, is thus encoded as bytes and decodes to itself. Special tokens are recognised
    in text, as chat templates require. Raises `InputError` for a model that normalises its text.
    """
    proto = parse_proto(file.read_bytes())
    spec = proto.normalizer_spec
    if proto.trainer_spec.model_type != 2 or spec.name not in ("identity", ""):
        raise InputError(
            f"{file} is not a BPE model without normalisation ({spec.name}); transformers has an "
            "equal of no other"
        )
    kinds = proto.SentencePiece
    plain = [p for p in proto.pieces if p.type in (kinds.NORMAL, kinds.USER_DEFINED)]
    ranked = sorted(plain, key=lambda p: -p.score)
    text = {p.piece: p.piece.replace(_SPACE_MARK, " ") for p in plain}
    merges = [
        (text[p.piece[:cut]], text[p.piece[cut:]])
        for p in ranked
        for cut in range(1, len(p.piece))
        if p.piece[:cut] in text and p.piece[cut:] in text
    ]
    ids = {text.get(p.piece, p.piece): i for i, p in enumerate(proto.pieces)}
    unknown = next(p.piece for p in proto.pieces if p.type == kinds.UNKNOWN)
    model = models.BPE(ids, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    result = tokenizers.Tokenizer(model)
    steps = [decoders.ByteFallback(), decoders.Fuse()]
    if spec.add_dummy_prefix:
        result.normalizer = normalizers.Prepend(" ")
        steps.append(decoders.Strip(" ", left=1))
    result.decoder = decoders.Sequence(steps)
    controls = [p for p in proto.pieces if p.type in (kinds.CONTROL, kinds.UNKNOWN)]
    result.add_special_tokens([AddedToken(p.piece, normalized=False) for p in controls])
    bos = proto.trainer_spec.bos_piece
    result.post_processor = processors.TemplateProcessing(
        f"{bos} $A", f"{bos} $A $B", [(bos, ids[bos])]
    )
    return result


def model_card(source: Checkpoint, config: dict[str, Any]) -> str:
    """Render the model card (`README.md`): sizes, and the metrics of its training run."""
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
    lines = metrics.read_text().splitlines() if metrics.is_file() else []
    measured: dict[str, Any] = {}
    for line in map(json.loads, lines):
        if line["step"] <= state["step"]:
            measured |= line
    for key, value in measured.items():
        if key in ("loss", "validation_loss") or key.startswith("bits_per_byte"):
            figures[key.replace("_", " ")] = f"{value:.4f}"
    return figures


def _write_json(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n")
