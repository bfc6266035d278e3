"""Find the tokenizer of a checkpoint, and the files that belong to it."""

import json
from pathlib import Path
from typing import overload

from mooshak.config.parse import load_config
from mooshak.errors import InputError
from mooshak.tokenizer.metadata import (
    GENERATION_CONFIG,
    HF_CONFIG,
    NFC_FILE,
    TEXT_NORMALIZATION,
    is_nfc,
)

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
    GENERATION_CONFIG,
    HF_CONFIG,
    TEXT_NORMALIZATION,
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
    if has_settings and is_nfc(path.parent):
        own[TEXT_NORMALIZATION] = NFC_FILE
    return own | {name: path}


def generation_files(path: Path) -> dict[str, Path]:
    """Return the files of a checkpoint directory that name its end tokens: name -> file."""
    found = {
        name: path / name for name in (GENERATION_CONFIG, HF_CONFIG) if (path / name).is_file()
    }
    return found | ({HF_CONFIG: path / "config.json"} if is_hf(path) else {})


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
    # Of a Hugging Face directory with both, transformers reads the tokenizer.json.
    run = checkpoint.absolute().parent.parent
    for directory in (checkpoint, run / "tokenizer"):
        for name in ("tokenizer.json", "tokenizer.model"):
            if (directory / name).is_file():
                return directory / name
    if (run / "config.yaml").is_file():
        return _of_run(run)
    if not required:
        return None
    raise InputError(
        f"{checkpoint} has no tokenizer.model or .json; name one with --tokenizer.path"
    )


def _of_run(run: Path) -> Path:
    """Return the tokenizer that RUN/config.yaml names.

    Older versions wrote paths that are relative to the directory in which the run was started.
    """
    config = load_config(run / "config.yaml")
    path, directory = Path(config.tokenizer.path), Path(config.run.dir)
    parts = () if directory.is_absolute() else directory.parts
    if path.is_absolute() or path.exists() or run.parts[len(run.parts) - len(parts) :] != parts:
        return path
    return Path(*run.parts[: len(run.parts) - len(parts)]) / path


def files_of_checkpoint(path: Path) -> dict[str, Path]:
    """Return the files that are copied with the weights of a checkpoint: name -> file.

    Where the directory has no tokenizer, that of its run.
    """
    files = tokenizer_files(path)
    if is_nfc(path):
        files[TEXT_NORMALIZATION] = NFC_FILE
    if any(name in files for name in VOCABULARY_FILES):
        return files
    try:
        found = find_tokenizer(path, None, required=False)
    except InputError:  # A configuration that this version does not read.
        found = None
    return files if found is None or not found.is_file() else files_of_tokenizer(found) | files
