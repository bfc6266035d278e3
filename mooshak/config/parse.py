"""Parse YAML files and command-line overrides into a `Config`, and write it back as YAML."""

import argparse
import functools
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, get_type_hints

import jsonargparse
import yaml

from mooshak.config.model import ModelConfig, model_description
from mooshak.config.sections import Config, InitConfig, SourceConfig, TokenizerConfig
from mooshak.errors import InputError, did_you_mean

SECTIONS = tuple(f.name for f in fields(Config))


def config_parser(description: str) -> jsonargparse.ArgumentParser:
    """A parser of `--config FILE` and every `--section.key`; a command adds its own options."""
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    result = jsonargparse.ArgumentParser(description=description, exit_on_error=False)
    result.add_argument("--config", action="config", help="a YAML file with the sections below")
    # Section by section: defaults come from the signatures, where a derived value is still null.
    for section in fields(Config):
        if section.type is InitConfig:
            text = "a checkpoint of any kind to begin with; the model and the tokenizer are its own"
            result.add_argument("--init.from", default="", help=f"{text} (empty: drawn weights)")
        else:
            result.add_class_arguments(section.type, section.name)
    return result


def parse_config(
    arguments: jsonargparse.ArgumentParser,
    argv: Sequence[str] | None = None,
    find_config: Callable[[jsonargparse.Namespace], Path] | None = None,
) -> tuple[Config, jsonargparse.Namespace]:
    """The resolved configuration and the command's own options.

    `find_config` gives the file to read where there is no `--config`. Raises `InputError` for a
    file that is not there, an unknown key or a value of another type.
    """
    words = [_long(word) for word in (sys.argv[1:] if argv is None else argv)]
    try:
        namespace = arguments.parse_args(words)
        if find_config is not None and namespace.config is None:
            words = ["--config", str(find_config(namespace)), *words]
            namespace = arguments.parse_args(words)
        values = arguments.instantiate(namespace)
    except (jsonargparse.ArgumentError, ValueError, TypeError) as error:
        message = _explain(str(error))
        if isinstance(error, UnicodeDecodeError) or message.startswith("Problems parsing config"):
            message = f"{_config_file(words)} is not YAML: {message}"
        raise InputError(message) from error
    sections = {name: values[name] for name in SECTIONS}
    sections["init"] = InitConfig(values["init.from"])
    if sections["init"].from_:
        sections |= _begun(**sections)
    return Config(**sections), values


def _begun(
    init: InitConfig, model: ModelConfig, tokenizer: TokenizerConfig, **_: Any
) -> dict[str, Any]:
    """The sections `model` and `tokenizer` of a run that begins with a checkpoint."""
    from mooshak.checkpoints.formats import model_of
    from mooshak.tokenizer.files import find_tokenizer

    path, unset = Path(init.from_), ModelConfig()
    there = model_description(model_of(path))
    given = {
        key: value for key, value in model_description(model).items() if value != there.get(key)
    }
    given = {key: value for key, value in given.items() if value != getattr(unset, key)}
    if tokenizer.path == TokenizerConfig().path:
        tokenizer = replace(tokenizer, path=str(find_tokenizer(path, None)))
    return {"model": replace(model, **there | given), "tokenizer": tokenizer}


def _long(word: str) -> str:
    """`--mesh` is short for `--parallel.mesh`."""
    return re.sub(r"^--mesh(?==|$)", "--parallel.mesh", word)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration in a YAML file, with `--section.key value` overrides on top."""
    return parse_config(config_parser(""), ["--config", str(path), *overrides])[0]


def dump_config(config: Config) -> str:
    """The configuration as YAML; `load` reads it back as the same configuration."""
    values = asdict(config) | {"init": {"from": config.init.from_}}
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def _config_file(words: Sequence[str]) -> str | None:
    """What stands behind `--config`, which jsonargparse's messages leave out."""
    option = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    option.add_argument("--config")
    file: str | None = option.parse_known_args(words)[0].config
    return file


def _explain(message: str) -> str:
    """jsonargparse's message, with the nearest known key where a key is unknown."""
    for pattern, prefix in (
        (r"unrecognized arguments: --([\w.\-]+)", "option --"),
        (r"Group '([\w.]+)' does not accept option '([\w.]+)'", "key "),
        (r"Option '([\w.]+)' is not accepted", "key "),
    ):
        if match := re.search(pattern, message):
            key = ".".join(match.groups())
            return f"unknown {prefix}{key}{did_you_mean(key, _known_keys())}"
    return message


@functools.cache
def _known_keys() -> tuple[str, ...]:
    sections = get_type_hints(Config).items()
    keys = [
        f"{name}.{key.name.rstrip('_')}" for name, section in sections for key in fields(section)
    ]
    return (*SECTIONS, *keys, *(f.name for f in fields(SourceConfig)), "config", "mesh", "resume")
