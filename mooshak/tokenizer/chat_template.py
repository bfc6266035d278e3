"""Chat templates: conversations as token ids, by a checkpoint's Jinja template or our own."""

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cache, lru_cache
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mooshak.errors import InputError
from mooshak.files import read_object
from mooshak.tokenizer.base import Tokenizer
from mooshak.tokenizer.hf_tokenizer import HFTokenizer
from mooshak.tokenizer.sentencepiece import CHAT_MARKERS
from mooshak.tokenizer.sentencepiece_hf import HFSentencePieceTokenizer

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""Template of the tokenizers that this package trains."""

Messages = Sequence[Mapping[str, str]]
"""Turns of a conversation: `role` (system, user, assistant) and `content`."""


def encode_chat(tokenizer: Tokenizer, messages: Messages) -> list[int]:
    """Return the token ids of a conversation, up to the start of the assistant's next turn.

    Our own template encodes contents as plain text: `<|end|>` inside a content is no control token.
    Raises `InputError` if the tokenizer has no chat template, a message is not a `role` and a
    `content`, or the template rejects the messages.
    """
    check_messages(messages)
    template = find_template(tokenizer)
    if has_own_template(tokenizer, template):
        return encode_own(tokenizer, messages)
    return encode_with_specials(tokenizer, render(tokenizer, template, messages, True))


def render(
    tokenizer: Tokenizer,
    template: str,
    messages: Messages,
    add_generation_prompt: bool,
    **variables: Any,
) -> str:
    """Return the text of a conversation. Raises `InputError` if the template rejects it."""
    specials = {f"{name}_token": text for name, text in tokenizer.special_texts.items()}
    values = {"bos_token": "", "eos_token": "", **specials, **variables}
    try:
        return _compiled(template).render(
            messages=[dict(message) for message in messages],
            add_generation_prompt=add_generation_prompt,
            **values,
        )
    # A template computes: it may also divide by zero, or add a text to a number.
    except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
        raise InputError(f"the chat template of {tokenizer.path} fails: {error}") from error


def check_messages(messages: Any) -> None:
    """Raise `InputError` unless every message has the texts `role` and `content`."""
    if isinstance(messages, str) or not isinstance(messages, Sequence):
        raise InputError(f"messages must be a list, not {messages!r}")
    for message in messages:
        found = message if isinstance(message, Mapping) else {}
        if not all(isinstance(found.get(key), str) for key in ("role", "content")):
            raise InputError(f"message {message!r} must have the texts role and content")


def has_own_template(tokenizer: Tokenizer, template: str) -> bool:
    """Return whether the template is ours and the tokenizer has its markers: see `encode_own`."""
    return template == CHAT_TEMPLATE and _is_own(tokenizer)


def encode_own(tokenizer: Tokenizer, messages: Messages) -> list[int]:
    """Return the token ids of `CHAT_TEMPLATE`."""
    ids = [tokenizer.bos_id]
    for message in messages:
        marker = f"<|{message['role']}|>"
        if marker not in CHAT_MARKERS[:-1]:
            raise InputError(f"role {message['role']!r} is unknown; use system, user or assistant")
        ids += [tokenizer.id_of(marker), *tokenizer.encode(message["content"])]
        ids.append(tokenizer.id_of("<|end|>"))
    return [*ids, tokenizer.id_of("<|assistant|>")]


def end_of_turn(tokenizer: Tokenizer) -> set[int]:
    """Return the token ids that end a turn, in addition to those that end a text."""
    return {tokenizer.id_of("<|end|>")} if _is_own(tokenizer) else set()


def find_template(tokenizer: Tokenizer) -> str:
    """Return the chat template that belongs to a tokenizer's file, as Jinja text."""
    directory = tokenizer.path.parent
    file = directory / "chat_template.jinja"
    if file.is_file():
        return file.read_text("utf-8")
    for name in ("chat_template.json", "tokenizer_config.json"):
        template = read_object(directory / name).get("chat_template")
        if isinstance(template, list):
            named = {entry.get("name"): entry.get("template") for entry in template}
            template = named.get("default")
        if isinstance(template, str):
            return template
    if _is_own(tokenizer):
        return CHAT_TEMPLATE
    raise InputError(
        f"tokenizer {tokenizer.path} has no chat template; put a chat_template.jinja next to it"
    )


def encode_with_specials(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the token ids of a text that contains special tokens as text."""
    if isinstance(tokenizer, (HFTokenizer, HFSentencePieceTokenizer)):
        # These find added tokens themselves, and know which parts of a text a space precedes.
        return tokenizer.encode(text)
    specials = special_tokens(tokenizer)
    longest_first = sorted(specials, key=len, reverse=True)
    parts = re.split("(" + "|".join(map(re.escape, longest_first)) + ")", text)
    ids: list[int] = []
    for part in filter(None, parts):
        ids += [specials[part]] if part in specials else tokenizer.encode(part)
    return ids


# Cached: a server asks for each chat, and a list of all tokens takes longer than a short prompt.
@lru_cache(maxsize=4)
def _pieces(tokenizer: Tokenizer) -> list[str]:
    return tokenizer.pieces()


@lru_cache(maxsize=4)
def special_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    """Return the id of each special token by its piece."""
    pieces = enumerate(zip(_pieces(tokenizer), tokenizer.texts(), strict=True))
    specials = {piece: id for id, (piece, own) in pieces if piece and not own}
    return {piece: id for piece, id in specials.items() if not re.fullmatch("<0x..>", piece)}


@lru_cache(maxsize=4)
def _is_own(tokenizer: Tokenizer) -> bool:
    return set(CHAT_MARKERS) <= set(_pieces(tokenizer))


@cache
def _compiled(template: str) -> jinja2.Template:
    # The template of a checkpoint is untrusted code: it runs in a sandbox.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    # Jinja's own writes Hindi, quotes and angle brackets as escapes.
    environment.filters["tojson"] = _to_json
    return environment.from_string(template)


def _to_json(value: Any, indent: int | None = None, ensure_ascii: bool = False) -> str:
    return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii)
