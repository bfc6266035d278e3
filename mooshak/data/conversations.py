"""Conversations of a source: the usual shapes of records, as prompts with answers.

| shape             | fields of a record                                                       |
|-------------------|--------------------------------------------------------------------------|
| messages          | `messages` (role, content), or `conversations` (from, value) of ShareGPT   |
| alpaca            | `instruction`, `input` (may be absent), `output`                           |
| prompt_completion | `prompt`, `completion`                                                   |
| preference        | `prompt` (may be absent for messages), `chosen`, `rejected`                |
| unpaired          | `prompt`, `completion`, `label` (true or false), for KTO                   |

`prompt` and answers are texts, which no chat template changes, or messages.
"""

import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mooshak.config.sections import Config, SourceConfig
from mooshak.corpus.records import records
from mooshak.data.samples import Text
from mooshak.errors import InputError

SHAPES: dict[str, tuple[str, ...]] = {
    "unpaired": ("prompt", "completion", "label"),
    "preference": ("chosen", "rejected"),
    "prompt_completion": ("prompt", "completion"),
    "messages": ("messages",),
    "alpaca": ("instruction", "output"),
}
"""Shape -> the fields that it needs; the first that fits is the shape of a record."""

ROLES = ("system", "user", "assistant", "tool", "developer")
"""Roles of messages; a chat template may know fewer."""

SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant"}


@dataclass(frozen=True)
class Conversation:
    """A prompt and its answers."""

    where: str
    """File and line, for messages."""
    shape: str
    prompt: Text
    answers: tuple[Text, ...]
    """One; or of a preference, the chosen and the rejected one."""
    label: bool | None = None
    """True if an unpaired answer is desirable; None for other shapes."""
    language: str = ""

    def text(self) -> str:
        """Return the contents as one text, without roles."""
        return "\n".join(map(contents, (self.prompt, *self.answers)))


def conversations(source: SourceConfig, config: Config) -> Iterator[Conversation]:
    """Yield the conversations of a source, in Unicode NFC where `data.normalize_nfc` says so.

    Raises `InputError` for a record of no known shape, or of another than the first one.
    """
    first = None
    for where, record in records(source, config):
        shape = _shape(where, record)
        first = first or shape
        if shape != first:
            raise InputError(
                f"{where}: the record has the shape {shape}, those before it {first}; make a "
                "source of each shape"
            )
        if config.data.normalize_nfc:
            record = normalize(record)
        yield _parse(where, shape, record, str(record.get("language") or source.language))


def _shape(where: str, record: Mapping[str, Any]) -> str:
    """Return the shape of a record. Raises `InputError` if it has none."""
    present = {key for key, value in record.items() if value is not None}
    if "conversations" in present:
        present |= {"messages"}
    for shape, needed in SHAPES.items():
        if present.issuperset(needed):
            return shape
    known = "; ".join(f"{shape}: {', '.join(needed)}" for shape, needed in SHAPES.items())
    raise InputError(
        f"{where}: the fields {', '.join(map(str, record)) or '(none)'} are no known shape of "
        f"conversations ({known})"
    )


def _parse(where: str, shape: str, record: Mapping[str, Any], language: str) -> Conversation:
    if shape == "messages":
        messages = record.get("messages")
        turns = _messages(where, record["conversations"] if messages is None else messages)
        return Conversation(where, shape, [], (turns,), language=language)
    if shape == "alpaca":
        values = [_text(where, key, record.get(key)) for key in ("instruction", "input", "output")]
        question = "\n\n".join(filter(None, values[:2]))
        asked = [{"role": "user", "content": question}]
        answer = [{"role": "assistant", "content": values[2]}]
        return Conversation(where, shape, asked, (answer,), language=language)
    keys = ("chosen", "rejected") if shape == "preference" else ("completion",)
    answers = tuple(parse_text(where, key, record[key]) for key in keys)
    if record.get("prompt") is None:
        prompt, answers = _common(where, answers)
    else:
        prompt = parse_text(where, "prompt", record["prompt"])
    if len({isinstance(one, str) for one in (prompt, *answers)}) > 1:
        raise InputError(
            f"{where}: prompt, {' and '.join(keys)} must be all texts, or all messages"
        )
    if shape == "preference" and answers[0] == answers[1]:
        raise InputError(f"{where}: chosen equals rejected: the pair prefers nothing")
    label = record.get("label")
    if shape == "unpaired" and not isinstance(label, bool):
        raise InputError(f"{where}: label must be true or false, not {label!r}")
    return Conversation(where, shape, prompt, answers, label, language)


def _common(where: str, answers: tuple[Text, ...]) -> tuple[Text, tuple[Text, ...]]:
    """Return the messages that chosen and rejected begin with, and the rest of each."""
    if any(isinstance(one, str) for one in answers):
        raise InputError(f"{where}: no field prompt; chosen and rejected as texts need one")
    n = 0
    while n < min(map(len, answers)) and answers[0][n] == answers[1][n]:
        n += 1
    return answers[0][:n], tuple(one[n:] for one in answers)


def parse_text(where: str, key: str, value: Any) -> Text:
    """Return a prompt or an answer: a text, or messages. Raises `InputError` if it is neither."""
    return value if isinstance(value, str) else _messages(where, value, key)


def _text(where: str, key: str, value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise InputError(f"{where}: {key} must be a text, not {value!r:.60}")
    return value


def _messages(where: str, value: Any, key: str = "messages") -> list[dict[str, str]]:
    """Return messages with role and content; contents of text parts are joined."""
    if not isinstance(value, list):
        raise InputError(f"{where}: {key} must be a list of messages, not {value!r:.60}")
    result = []
    for number, message in enumerate(value, 1):
        at = f"{where}, message {number} of {key}"
        if not isinstance(message, Mapping):
            raise InputError(f"{at} is not an object with role and content: {message!r:.60}")
        role = message.get("role", message.get("from"))
        role = SHAREGPT_ROLES.get(role, role) if isinstance(role, str) else role
        if role not in ROLES:
            raise InputError(f"{at}: the role {role!r} is unknown; use {', '.join(ROLES)}")
        content = message.get("content", message.get("value"))
        if isinstance(content, list):
            parts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
            texts = [part for part in parts if isinstance(part, str)]
            content = "".join(texts) if len(texts) == len(parts) else None
        if not isinstance(content, str):
            raise InputError(
                f"{at}: the content must be a text, not {message.get('content')!r:.60}"
            )
        result.append({"role": role, "content": content})
    return result


def normalize(value: Any) -> Any:
    """Return a record with all texts in Unicode NFC."""
    if isinstance(value, str):
        return unicodedata.normalize("NFC", value)
    if isinstance(value, Mapping):
        return {key: normalize(one) for key, one in value.items()}
    return [normalize(one) for one in value] if isinstance(value, list) else value


def contents(text: Text) -> str:
    """Return a prompt or an answer as one text, without roles."""
    return text if isinstance(text, str) else "\n".join(one["content"] for one in text)
