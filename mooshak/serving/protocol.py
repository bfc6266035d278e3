"""Requests of the OpenAI API and of vLLM's extensions: from JSON to prompts and settings."""

import json
import math
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mooshak.config.generate import MAX_TOP, GenerateConfig
from mooshak.errors import InputError
from mooshak.generation.lm import LM
from mooshak.generation.requests import logit_bias
from mooshak.generation.settings import make_settings
from mooshak.serving.fields import ABSENT, ApiError, Fields, is_a
from mooshak.tokenizer.base import Tokenizer
from mooshak.tokenizer.chat_template import encode_chat, end_of_turn

SAME_NAME = (
    *("temperature", "top_p", "n", "seed", "presence_penalty", "frequency_penalty"),
    *("top_k", "min_p", "typical_p", "repetition_penalty", "no_repeat_ngram_size"),
    *("min_new_tokens", "max_new_tokens", "ignore_eos"),
)
TEXT_LISTS = ("stop", "bad_words", "choice")
ID_LISTS = ("allowed_tokens", "stop_token_ids")
CONSTRAINTS = ("regex", "json_schema", "grammar")
"""Settings that are fields of a request; the first ones as they are."""
OTHER_NAMES = {
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
    "min_tokens": "min_new_tokens",
    "guided_json": "json_schema",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
}
"""Field of OpenAI or vLLM -> setting."""
STRUCTURED = {"json": "json_schema", "regex": "regex", "choice": "choice", "grammar": "grammar"}
"""Field of vLLM's `structured_outputs` -> setting."""
IGNORED = (
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"),
    "parallel_tool_calls",
)
"""Fields that change no text."""
UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "suffix": ("",),
    "best_of": (1,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "reasoning_effort": ("none",),
}
"""Field -> values that ask for nothing; others are refused."""
MAX_LOGPROBS = 5
"""OpenAI's bound for completions; chats may ask for `MAX_TOP`."""
MAX_TEXTS = {"stop": 64, "bad_words": 1024, "choice": 1024}
"""Stop texts and bad words are compared with the text after every token of every request."""
DEFAULT_TOKENS = 16
"""max_tokens of a completion, OpenAI's; a chat may fill the rest of the slot."""


@dataclass(frozen=True)
class Prompt:
    """A prompt, and the settings of its samples."""

    text: str | None
    """None if it was given as token ids."""
    ids: list[int]
    settings: GenerateConfig


@dataclass(frozen=True)
class Request:
    """A request for completions."""

    is_chat: bool
    prompts: list[Prompt]
    names: Mapping[str, str]
    """Setting -> field with which it was given."""
    more_ends: frozenset[int]
    """End tokens, in addition to those of the model."""
    stream: bool
    include_usage: bool
    echo: bool
    top_logprobs: int | None
    """Number of the most probable tokens to return; None for no log-probabilities."""
    return_token_ids: bool

    @property
    def n(self) -> int:
        """Samples per prompt."""
        return self.prompts[0].settings.n


class Parser:
    """Turns bodies of requests into `Request`s for a model. Methods may run in any thread."""

    def __init__(self, lm: LM, tokenizer: Tokenizer, name: str, max_len: int, max_samples: int):
        """`max_len` is the length of prompt and continuation in tokens."""
        self.lm, self.tokenizer, self.name = lm, tokenizer, name
        self.max_len, self.max_samples = max_len, max_samples

    def completion(self, body: bytes) -> Request:
        """Parse a body of /v1/completions. Raises `ApiError`."""
        found = self._open(body)
        prompts = self._prompts(found.any("prompt"))
        echo = found.take("echo", "true or false", False)
        top = found.take("logprobs", "an integer")
        if top is not ABSENT and not 0 <= top <= MAX_LOGPROBS:
            raise ApiError(f"logprobs {top} must be in 0 .. {MAX_LOGPROBS}", "logprobs")
        return self._finish(found, prompts, False, echo, top)

    def chat(self, body: bytes) -> Request:
        """Parse a body of /v1/chat/completions. Raises `ApiError`."""
        found = self._open(body)
        messages = _messages(found.take("messages", "a list"))
        wants = found.take("logprobs", "true or false", False)
        top = found.take("top_logprobs", "an integer", 0)
        if not 0 <= top <= MAX_TOP:
            raise ApiError(f"top_logprobs {top} must be in 0 .. {MAX_TOP}", "top_logprobs")
        if top and not wants:
            raise ApiError("top_logprobs needs logprobs true", "top_logprobs")
        try:
            ids = encode_chat(self.tokenizer, messages)
        except InputError as error:
            raise ApiError(str(error), "messages") from error
        return self._finish(found, [(None, ids)], True, False, top if wants else None)

    def _open(self, body: bytes) -> Fields:
        """Return the fields of a body, after the check of the model's name."""
        found = Fields(parse_json(body))
        model = found.take("model", "a text", self.name)
        if model != self.name:
            text = f"the model {model} does not exist; this server has {self.name}"
            raise ApiError(text, "model", status=404, code="model_not_found")
        return found

    def _prompts(self, given: Any) -> list[tuple[str | None, list[int]]]:
        """Return text and token ids of each prompt."""
        if isinstance(given, str) or (isinstance(given, list) and given and _is_ids(given)):
            given = [given]
        wanted = "a text, a list of token ids, or a list of these"
        if not isinstance(given, list) or not given:
            raise ApiError(f"prompt must be {wanted}", "prompt")
        if len(given) > self.max_samples:
            raise ApiError(f"there are more than {self.max_samples} prompts", "prompt")
        found = []
        for one in given:
            if not isinstance(one, str) and not (isinstance(one, list) and _is_ids(one)):
                raise ApiError(f"prompt must be {wanted}", "prompt")
            try:
                found.append((one if isinstance(one, str) else None, self.lm.encode(one)))
            except InputError as error:
                raise ApiError(str(error), "prompt") from error
            if not found[-1][1]:
                raise ApiError("a prompt has no tokens", "prompt")
        return found

    def ids(self, given: Any, field: str) -> list[int]:
        """Return token ids of the model. Raises `ApiError`."""
        if not isinstance(given, list) or not _is_ids(given):
            raise ApiError(f"{field} must be a list of token ids", field)
        try:
            return self.lm.encode(given)
        except InputError as error:
            raise ApiError(str(error), field) from error

    def _finish(
        self,
        found: Fields,
        prompts: list[tuple[str | None, list[int]]],
        is_chat: bool,
        echo: bool,
        top_logprobs: int | None,
    ) -> Request:
        """Return the request after the fields that both APIs have."""
        stream = found.take("stream", "true or false", False)
        options = found.take("stream_options", "an object")
        if options is not ABSENT and not stream:
            raise ApiError("stream_options needs stream true", "stream_options")
        inner = Fields(options or {}, "stream_options")
        include_usage = inner.take("include_usage", "true or false", False)
        inner.take("include_obfuscation", "true or false")
        inner.end()
        return_token_ids = found.take("return_token_ids", "true or false", False)
        given, names = _settings(found)
        for name in IGNORED:
            found.any(name)
        found.end((*SAME_NAME, *TEXT_LISTS, *ID_LISTS, *OTHER_NAMES))
        if top_logprobs is not None:
            given |= {"logprobs": True, "prompt_logprobs": echo, "top_logprobs": top_logprobs}
        elif echo and given.get("max_new_tokens") == 0:
            given["prompt_logprobs"] = True  # Nothing is generated: the prompt is only scored.
        parts = [
            Prompt(text, ids, self._prompt_settings(ids, given, names, is_chat))
            for text, ids in prompts
        ]
        request = Request(
            is_chat,
            parts,
            names,
            frozenset(end_of_turn(self.tokenizer)) if is_chat else frozenset(),
            stream,
            include_usage,
            echo,
            top_logprobs,
            return_token_ids,
        )
        if len(parts) * request.n > self.max_samples:
            text = f"{len(parts)} prompts x n {request.n} are more than {self.max_samples} samples"
            raise ApiError(text, "n")
        return request

    def _prompt_settings(
        self, ids: list[int], given: dict[str, Any], names: Mapping[str, str], is_chat: bool
    ) -> GenerateConfig:
        """Return the settings of a prompt. Raises `ApiError` for a text that is too long."""
        room, prompt = self.max_len - len(ids), "messages" if is_chat else "prompt"
        defaults = {"temperature": 1.0, **self.lm.defaults}
        chosen = {"max_new_tokens": max(room, 1) if is_chat else DEFAULT_TOKENS, **given}
        chosen.setdefault("seed", random.getrandbits(63))
        try:
            settings = make_settings(chosen, defaults)
        except InputError as error:
            raise named_error(error, names) from error
        if settings.max_new_tokens > room:
            raise ApiError(
                f"the prompt has {len(ids)} tokens and max_tokens is {settings.max_new_tokens}; "
                f"both must not be more than {self.max_len} tokens",
                names["max_new_tokens"] if "max_new_tokens" in given else prompt,
                code="context_length_exceeded",
            )
        return settings


def parse_json(body: bytes) -> Any:
    """Return a JSON value. Raises `ApiError` for what is not JSON, or not Unicode text."""
    try:
        value = json.loads(
            body, parse_constant=_refuse_constant, parse_int=_integer, parse_float=_number
        )
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ApiError("a text has a lone surrogate; it is not Unicode text") from error
    except (ValueError, RecursionError) as error:
        raise ApiError(f"the body is not JSON: {error}") from error
    return value


def named_error(error: InputError, names: Mapping[str, str]) -> ApiError:
    """Return an error of the settings, with the names of a request's fields."""
    pattern = r"generate\.(\w+)"
    found = re.search(pattern, str(error))
    text = re.sub(pattern, lambda match: names.get(match[1], match[1]), str(error))
    return ApiError(text, names.get(found[1], found[1]) if found else None)


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number of JSON")


def _integer(text: str) -> int:
    value = int(text)
    if abs(value) >= 2**63:
        raise ValueError(f"{text[:24]} has more than 64 bits")
    return value


def _number(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text[:24]} is too large")
    return value


def _is_ids(values: list[Any]) -> bool:
    return all(is_a(value, "an integer") for value in values)


def _settings(found: Fields) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the settings of a request, and the fields with which they were given."""
    given: dict[str, Any] = {}
    names = {"max_new_tokens": "max_tokens"}
    for name in (*SAME_NAME, *OTHER_NAMES, *TEXT_LISTS, *ID_LISTS, *CONSTRAINTS):
        value = found.any(name)
        if value is ABSENT:
            continue
        _give(OTHER_NAMES.get(name, name), value, name, given, names)
    if given.get("top_k") == -1:  # vLLM's value for all tokens.
        given["top_k"] = 0
    if given.get("stop") == ():
        del given["stop"]
    if (bias := found.take("logit_bias", "an object")) is not ABSENT:
        try:
            given["logit_bias"] = logit_bias(bias)
        except InputError as error:
            raise ApiError(f"logit_bias: {error}", "logit_bias") from error
    _structured_outputs(found.take("structured_outputs", "an object"), given, names)
    _response_format(found.take("response_format", "an object"), given, names)
    for name, neutral in UNSUPPORTED.items():
        value = found.any(name)
        if value is not ABSENT and value not in neutral:
            raise ApiError(f"{name} is not supported", name)
    return given, names


def _give(
    setting: str, value: Any, name: str, given: dict[str, Any], names: dict[str, str]
) -> None:
    """Add a setting that was given by a field. Raises `ApiError` if it is there already."""
    if setting in given:
        raise ApiError(f"give {names[setting]} or {name}, not both", name)
    if isinstance(value, list) and setting in (*TEXT_LISTS, *ID_LISTS):
        value = tuple(value)
        if len(value) > MAX_TEXTS.get(setting, len(value)):
            raise ApiError(f"{name} has more than {MAX_TEXTS[setting]} texts", name)
    given[setting], names[setting] = value, name


def _structured_outputs(value: Any, given: dict[str, Any], names: dict[str, str]) -> None:
    """Add the setting that vLLM's `structured_outputs` asks for."""
    found = Fields(value or {}, "structured_outputs")
    for key, setting in STRUCTURED.items():
        if (one := found.any(key)) is not ABSENT:
            _give(setting, one, f"structured_outputs.{key}", given, names)
    found.end()


def _response_format(value: Any, given: dict[str, Any], names: dict[str, str]) -> None:
    """Add the setting that a `response_format` asks for."""
    if value is ABSENT:
        return
    field = "response_format"
    found = Fields(value, field)
    kind, schema = found.take("type", "a text"), found.take("json_schema", "an object")
    found.end()
    if kind == "text" and schema is ABSENT:
        return
    if kind == "json_object" and schema is ABSENT:
        _give("json_schema", {"type": "object"}, field, given, names)
        return
    if kind != "json_schema" or schema is ABSENT:
        text = "response_format must have the type text, json_object, or json_schema with a schema"
        raise ApiError(text, field)
    inner = Fields(schema, "response_format.json_schema")
    for name, wanted in (
        ("name", "a text"),
        ("description", "a text"),
        ("strict", "true or false"),
    ):
        inner.take(name, wanted)
    rules = inner.take("schema", "an object")
    inner.end()
    if rules is ABSENT:
        raise ApiError("response_format.json_schema.schema is missing", field)
    _give("json_schema", rules, field, given, names)


def _messages(given: Any) -> list[dict[str, str]]:
    """Return the messages of a chat, with texts as contents."""
    if not given:
        raise ApiError("messages must be a list of at least one message", "messages")
    found = []
    for i, message in enumerate(given):
        place = f"messages[{i}]"
        one = Fields(message, place)
        role, content = one.take("role", "a text"), one.take("content", "a text or a list")
        one.take("name", "a text")
        if (key := next(iter(one.left), None)) is not None:
            raise ApiError(f"{place}.{key} is not supported", f"{place}.{key}")
        if role is ABSENT or content is ABSENT:
            raise ApiError(f"{place} must have a role and a content", place)
        if isinstance(content, list):
            content = "".join(_part(part, f"{place}.content") for part in content)
        # OpenAI's newer name; templates know the older one.
        found.append({"role": "system" if role == "developer" else role, "content": content})
    return found


def _part(part: Any, place: str) -> str:
    """Return the text of a part of a message's content."""
    found = Fields(part, place)
    kind, text = found.take("type", "a text"), found.any("text")
    if kind != "text" or not isinstance(text, str):
        raise ApiError(f"{place} may have parts of the type text only", place)
    return text
