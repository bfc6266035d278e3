"""Find the tokenizer of a checkpoint, and the files that belong to it."""

from pathlib import Path

from mooshak.errors import InputError

HF_CONFIG = "hf_config.json"
"""Their `config.json`, of a checkpoint that came from Hugging Face."""
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
"""Files that come along with the weights, whatever the kind of the checkpoint becomes."""


def tokenizer_files(path: Path) -> dict[str, Path]:
    """The files of a checkpoint directory that come along with its weights."""
    return {name: path / name for name in TOKENIZER_FILES if (path / name).is_file()}


def find_tokenizer(checkpoint: Path, given: str | None) -> Path:
    """The tokenizer of a checkpoint: the one given, the one inside, or that of its run."""
    if given:
        return Path(given)
    for inside in (checkpoint / "tokenizer.model", checkpoint / "tokenizer.json"):
        if inside.is_file():
            return inside
    config = checkpoint.parent.parent / "config.yaml"
    if config.is_file():
        from mooshak.config.parse import load_config

        return Path(load_config(config).tokenizer.path)
    raise InputError(f"{checkpoint} has no tokenizer.model or .json; name one with --tokenizer")
