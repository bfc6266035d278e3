"""Find the tokenizer of a checkpoint, and the files that belong to it."""

import json
from pathlib import Path
from typing import overload

from mooshak.config.parse import load_config
from mooshak.errors import InputError

HF_CONFIG = "hf_config.json"
"""Name of the Hugging Face `config.json` in a checkpoint that was converted from there."""
TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    HF_CONFIG,
)
"""Files that are copied with the weights into a checkpoint of any format."""


def tokenizer_files(path: Path) -> dict[str, Path]:
    """Return the files of a checkpoint directory that are copied with its weights: name -> file."""
    return {name: path / name for name in TOKENIZER_FILES if (path / name).is_file()}


def files_of_tokenizer(path: Path) -> dict[str, Path]:
    """Return the files of the tokenizer `path` that a checkpoint needs: name in it -> file.

    A SentencePiece model becomes `tokenizer.model`, a `.json` file `tokenizer.json`. The files with
    standard names (settings, chat template) next to it belong to it; next to a SentencePiece model,
    which does not need them, only if it has the standard name itself.
    """
    name = standard_name(path)
    has_settings = path.suffix == ".json" or path.name == name
    others = tokenizer_files(path.parent) if has_settings else {}
    own = {key: file for key, file in others.items() if key not in VOCABULARY_FILES}
    if has_settings and is_hf(path.parent):
        own[HF_CONFIG] = path.parent / "config.json"
    return own | {name: path}


def standard_name(path: Path) -> str:
    """Return the name of a tokenizer's file in a checkpoint."""
    return "tokenizer.json" if path.suffix == ".json" else "tokenizer.model"


VOCABULARY_FILES = ("tokenizer.model", "tokenizer.json")


def is_hf(path: Path) -> bool:
    """Return whether a directory is a Hugging Face model: its `config.json` has a `model_type`."""
    try:
        values = json.loads((path / "config.json").read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and "model_type" in values


@overload
def find_tokenizer(checkpoint: Path, given: str | None) -> Path: ...
@overload
def find_tokenizer(checkpoint: Path, given: str | None, required: bool) -> Path | None: ...
def find_tokenizer(checkpoint: Path, given: str | None, required: bool = True) -> Path | None:
    """Return the tokenizer of a checkpoint: `given`, the one in its directory, or that of its run.

    If there is none, returns None, or raises `InputError` if it is `required`.
    """
    if given:
        return Path(given)
    for inside in (checkpoint / "tokenizer.model", checkpoint / "tokenizer.json"):
        if inside.is_file():
            return inside
    config = checkpoint.parent.parent / "config.yaml"
    if config.is_file():
        return Path(load_config(config).tokenizer.path)
    if not required:
        return None
    raise InputError(
        f"{checkpoint} has no tokenizer.model or .json; name one with --tokenizer.path"
    )
