"""Tokenizer settings of a directory: added and special tokens, BOS, end tokens, normalisation.

Hugging Face directories spread them over several files; this module reads all of them, in
transformers' order, for every tokenizer, for generation and for exports.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mooshak.errors import InputError
from mooshak.files import read_object

HF_CONFIG = "hf_config.json"
"""Name of the Hugging Face `config.json` in a checkpoint that was converted from there."""
GENERATION_CONFIG = "generation_config.json"
TEXT_NORMALIZATION = "text_normalization.json"
"""Our own file in a converted checkpoint that was trained on text in NFC: `{"unicode": "NFC"}`."""
NFC_FILE = Path(__file__).with_name(TEXT_NORMALIZATION)
SPECIAL_TOKENS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
"""In the order in which transformers adds those that the vocabulary lacks."""


@dataclass(frozen=True)
class AddedToken:
    """A token that is recognised in a text before the model of the tokenizer sees it."""

    content: str
    special: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False


@dataclass(frozen=True)
class TokenizerMetadata:
    """Settings of the tokenizer in a directory; all of them are empty if it has no such files."""

    directory: Path
    added: Mapping[int, AddedToken] = field(default_factory=dict)
    """Id -> token, of `added_tokens_decoder` and added_tokens.json."""
    unplaced: tuple[str, ...] = ()
    """Special tokens that no file gives an id."""
    names: Mapping[str, str] = field(default_factory=dict)
    """bos, eos, pad, ... -> token."""
    ids: Mapping[str, int] = field(default_factory=dict)
    """bos, eos, pad -> id, of the files that name ids."""
    add_bos: bool | None = None
    add_eos: bool | None = None
    add_prefix_space: bool | None = None
    legacy: bool = False
    """True if a space precedes the text after each added token, as in older Llama tokenizers."""
    is_hf: bool = False
    """True if there is a tokenizer_config.json."""
    nfc: bool = False
    """True if texts are brought to Unicode NFC before they are encoded."""


def read_metadata(directory: Path) -> TokenizerMetadata:
    """Read the settings of the tokenizer in a directory.

    Raises `InputError` for a file that is not JSON, or in which an entry has another type.
    """
    settings = read_object(directory / "tokenizer_config.json")
    mapped = read_object(directory / "special_tokens_map.json")
    configs = [
        read_object(directory / name) for name in (GENERATION_CONFIG, "config.json", HF_CONFIG)
    ]
    path = directory / "tokenizer_config.json"
    names: dict[str, str] = {}
    ids: dict[str, int] = {}
    for name in SPECIAL_TOKENS:
        for values in (settings, mapped, *configs):
            if (token := _content(values.get(f"{name}_token"))) is not None:
                names.setdefault(name, token)
            if (id := _first_id(values.get(f"{name}_token_id"))) is not None:
                ids.setdefault(name, id)
    added = _added_tokens(directory, settings, mapped, set(names.values()))
    extra = (settings or mapped).get("additional_special_tokens") or []
    if isinstance(later := settings.get("extra_special_tokens"), list):
        extra = [*extra, *later]
    placed = {token.content for token in added.values()}
    wanted = [*names.values(), *filter(None, map(_content, extra))]
    return TokenizerMetadata(
        directory,
        added,
        tuple(token for token in dict.fromkeys(wanted) if token not in placed),
        names,
        ids,
        _flag(path, settings, "add_bos_token"),
        _flag(path, settings, "add_eos_token"),
        _flag(path, settings, "add_prefix_space"),
        bool(_flag(path, settings, "legacy")),
        bool(settings),
        is_nfc(directory),
    )


def is_nfc(directory: Path) -> bool:
    """Return whether the text that a checkpoint was trained on was brought to Unicode NFC.

    A training state says so, text_normalization.json in a converted checkpoint, or in older runs
    only RUN/config.yaml.
    """
    state = directory / "trainer_state.json"
    values = read_object(state)
    if "normalize_nfc" in values:
        return values["normalize_nfc"] is True
    if read_object(directory / TEXT_NORMALIZATION).get("unicode") == "NFC":
        return True
    if not state.is_file():
        return False
    run = directory.absolute().parent.parent / "config.yaml"
    try:
        data = yaml.safe_load(run.read_text("utf-8")).get("data") or {}
    except (OSError, ValueError, AttributeError, yaml.YAMLError):
        return False
    return bool(data.get("normalize_nfc", True))


def _added_tokens(
    directory: Path, settings: Mapping[str, Any], mapped: Mapping[str, Any], special: set[str]
) -> dict[int, AddedToken]:
    """Return the added tokens by id, of tokenizer_config.json and of added_tokens.json."""
    path = directory / "tokenizer_config.json"
    found: dict[int, AddedToken] = {}
    flags = ("special", "lstrip", "rstrip", "single_word", "normalized")
    for id, token in _object(path, settings, "added_tokens_decoder").items():
        content = _content(token)
        if content is None or not str(id).isdecimal():
            raise InputError(f"{path}: added_tokens_decoder {id!r} is not a token: {token!r}")
        values = token if isinstance(token, dict) else {}
        found[int(id)] = AddedToken(content, **{flag: bool(values.get(flag)) for flag in flags})
    path = directory / "added_tokens.json"
    more = {token for values in (settings, mapped) for token in _additional(values)}
    for content, id in read_object(path).items():
        if not isinstance(id, int) or isinstance(id, bool) or id < 0:
            raise InputError(f"{path}: the id of {content!r} is {id!r}; it must be a number")
        found.setdefault(id, AddedToken(content, special=content in special | more))
    return dict(sorted(found.items()))


def _additional(values: Mapping[str, Any]) -> Iterable[str]:
    return filter(None, map(_content, values.get("additional_special_tokens") or ()))


def _content(token: Any) -> str | None:
    """Return the text of a token, which files write as a text or as an object."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) and token else None


def _first_id(ids: Any) -> int | None:
    id = next(iter(ids), None) if isinstance(ids, list) else ids
    return id if isinstance(id, int) and not isinstance(id, bool) and id >= 0 else None


def _flag(path: Path, values: Mapping[str, Any], key: str) -> bool | None:
    value = values.get(key)
    if value is not None and not isinstance(value, bool):
        raise InputError(f"{path}: {key} {value!r} is not true or false")
    return value


def _object(path: Path, values: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = values.get(key) or {}
    if not isinstance(value, dict):
        raise InputError(f"{path}: {key} {value!r} is not an object")
    return value


def named_end_ids(directory: Path) -> set[int]:
    """Return the ids of the end tokens that a directory names.

    Those of generation_config.json; if it names none, those of the model's configuration.
    """
    for name in (GENERATION_CONFIG, "config.json", HF_CONFIG):
        named = read_object(directory / name).get("eos_token_id")
        ids = map(_first_id, named if isinstance(named, list) else [named])
        if found := {id for id in ids if id is not None}:
            return found
    return set()


def split_at_added(text: str, tokens: Mapping[int, AddedToken]) -> list[str | int]:
    """Return the parts of a text between added tokens, and the ids of these, in order.

    The longest token at the first position wins, as in the library tokenizers.
    """
    by_length = sorted(tokens.items(), key=lambda item: -len(item[1].content))
    pattern = "|".join(_pattern(id, token) for id, token in by_length)
    result: list[str | int] = []
    at = 0
    for match in re.finditer(pattern, text) if pattern else ():
        if match.start() > at:
            result.append(text[at : match.start()])
        assert match.lastgroup is not None
        result.append(int(match.lastgroup[1:]))
        at = match.end()
    return [*result, text[at:]] if at < len(text) else result


def _pattern(id: int, token: AddedToken) -> str:
    r"""Return the regular expression of an added token, with the spaces that belong to it."""
    inside = f"(?P<t{id}>{re.escape(token.content)})"
    if token.single_word:
        inside = rf"(?<!\w){inside}(?!\w)"
    return (r"\s*" if token.lstrip else "") + inside + (r"\s*" if token.rstrip else "")
