"""Settings of a generation: from keyword arguments, and a checkpoint's generation_config.json."""

import os
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np

from mooshak.config.generate import EarlyStopping, GenerateConfig
from mooshak.errors import InputError, did_you_mean, require
from mooshak.files import read_object
from mooshak.tokenizer.metadata import GENERATION_CONFIG


def make_settings(
    settings: Mapping[str, Any], defaults: Mapping[str, Any] | None = None
) -> GenerateConfig:
    """Return settings from keyword arguments. Raises `InputError` for unknown or invalid ones.

    `defaults` are used for those that are not given, as far as they do not contradict them.
    """
    types = get_type_hints(GenerateConfig)
    if unknown := sorted(settings.keys() - types.keys()):
        raise InputError(f"unknown setting {unknown[0]}{did_you_mean(unknown[0], types)}")
    for name, value in settings.items():
        wanted = _wanted_type(value, types[name])
        require(not wanted, f"generate.{name} {value!r} must be {wanted}")
    chosen = dict(defaults or {}) | dict(settings)
    if "max_new_tokens" in settings and "min_new_tokens" not in settings:
        chosen["min_new_tokens"] = min(
            chosen.get("min_new_tokens", 0), max(0, settings["max_new_tokens"])
        )
    if chosen.get("num_beams", 1) > 1 and "temperature" not in settings:
        chosen["temperature"] = 0.0
    return GenerateConfig(**chosen)


def generation_defaults(directory: Path) -> dict[str, Any]:
    """Return the settings of a checkpoint's generation_config.json, as transformers reads them.

    Without `do_sample` decoding is greedy; with it, the temperature is 1 where none is named.
    Raises `InputError` if a value is invalid.
    """
    path = directory / GENERATION_CONFIG
    values = {key: value for key, value in read_object(path).items() if value is not None}
    found = {name: values[name] for name in FROM_GENERATION_CONFIG if name in values}
    if values.get("do_sample"):
        found |= {name: values[name] for name in FROM_SAMPLING_CONFIG if name in values}
        found.setdefault("temperature", 1.0)
    try:
        make_settings(found)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    return found


FROM_GENERATION_CONFIG = (
    "repetition_penalty",
    "no_repeat_ngram_size",
    "min_new_tokens",
    "length_penalty",
    "early_stopping",
)
FROM_SAMPLING_CONFIG = ("temperature", "top_k", "top_p", "min_p", "typical_p")
"""Keys of generation_config.json; the second ones only with `do_sample`."""


def check_stream(settings: GenerateConfig) -> None:
    """Raise `InputError` unless the settings have one text, which grows by its end."""
    if settings.n != 1:
        raise InputError(f"generate.n {settings.n}: a stream has one sample; set n to 1")
    if settings.num_beams != 1:
        raise InputError(
            f"generate.num_beams {settings.num_beams}: beams have no stream; set num_beams to 1"
        )


def _wanted_type(value: Any, annotation: Any) -> str:
    """Return the type that a setting must have, or an empty text if `value` has it."""
    if annotation == tuple[int, ...]:
        return "" if _are(value, Integral) else "a list of token ids"
    if annotation == Mapping[int, float]:
        is_map = isinstance(value, Mapping) and _are(list(value), Integral)
        return "" if is_map and _are(list(value.values()), Real) else "token ids with numbers"
    is_bool = isinstance(value, (bool, np.bool_))
    if annotation is bool:
        return "" if is_bool else "true or false"
    if annotation == EarlyStopping:
        return "" if is_bool or value == "never" else "true, false or never"
    if annotation is Any:
        is_path = isinstance(value, (str, os.PathLike)) and bool(str(value))
        is_model = hasattr(value, "generate")
        return "" if value is None or is_path or is_model else "a checkpoint or a loaded model"
    if annotation is int:
        return "" if isinstance(value, Integral) and not is_bool else "an integer"
    if annotation is float:
        return "" if isinstance(value, Real) and not is_bool else "a number"
    if annotation == str | None:
        return "" if value is None or isinstance(value, str) else "a text"
    if annotation == Mapping[str, Any] | str | None:
        is_one = value is None or isinstance(value, str | Mapping)
        return "" if is_one else "a JSON object, or its JSON"
    is_list = isinstance(value, Sequence) and all(isinstance(one, str) for one in value)
    return "" if is_list else "a text or a list of texts"


def _are(values: Any, kind: type) -> bool:
    is_list = isinstance(values, Sequence) and not isinstance(values, str)
    return is_list and all(isinstance(v, kind) and not isinstance(v, bool) for v in values)
