"""A turn of the assistant as prompt and answer, whose token ids are trained on.

The text of the answer is found by rendering a conversation with other contents in its place, not by
searching for it: templates trim contents, insert text, and repeat them. Prompt and answer are
encoded separately, so the ids of the prompt are those that a model is given, also where a token
would span the border.
"""

from collections.abc import Sequence
from datetime import datetime
from functools import lru_cache
from typing import NamedTuple

from mooshak.errors import InputError
from mooshak.tokenizer.base import Tokenizer
from mooshak.tokenizer.chat_template import (
    Messages,
    check_messages,
    encode_own,
    encode_with_specials,
    find_template,
    has_own_template,
    render,
    special_tokens,
)


class Turn(NamedTuple):
    """Token ids of a turn."""

    prompt: list[int]
    """Everything before the answer: earlier turns, the header of this one, inserted text."""
    answer: list[int]
    """The answer and its end token."""


def encode_turn(tokenizer: Tokenizer, messages: Messages) -> Turn:
    """Return prompt and answer of the last message, which is the assistant's.

    Text that a template inserts between the header and the answer (the empty block of thoughts of
    Qwen 3) belongs to the prompt; if it is only spaces, which the model itself has to write after
    the header, to the answer. The end is the first special token after the answer, or EOS where the
    template has none. Raises `InputError` if the last message is not the assistant's, its content
    is empty, or the template fails or does not show it.
    """
    check_messages(messages)
    if not messages or messages[-1]["role"] != "assistant":
        raise InputError("the last message is not the assistant's: it has no answer to train on")
    if not messages[-1]["content"].strip():
        raise InputError("the answer is empty")
    template = _template(tokenizer)
    if has_own_template(tokenizer, template):
        ids = [*tokenizer.encode(messages[-1]["content"]), tokenizer.id_of("<|end|>")]
        return Turn(encode_own(tokenizer, messages[:-1]), ids)
    before, answer, after = _split(tokenizer, template, messages)
    end = _end(tokenizer, after)
    return Turn(encode_with_specials(tokenizer, before), encode_inside(tokenizer, answer) + end)


def encode_completion(tokenizer: Tokenizer, prompt: str, answer: str) -> Turn:
    """Return a text and its continuation, which ends in EOS, without a chat template.

    Raises `InputError` if the answer is empty.
    """
    if not answer.strip():
        raise InputError("the answer is empty")
    ids = tokenizer.encode(prompt, bos=True)
    return Turn(ids, [*encode_inside(tokenizer, answer), tokenizer.eos_id])


def encode_inside(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the token ids of a text that follows another: without a space before it.

    Many SentencePiece models begin every text with a space.
    """
    if not _begins_with_space(tokenizer):
        return encode_with_specials(tokenizer, text)
    # A line break is a token by itself in these models, unless another one follows.
    before = "a" if text.startswith("\n") else "\n"
    known = encode_with_specials(tokenizer, before)
    ids = encode_with_specials(tokenizer, before + text)
    return (
        ids[len(known) :] if ids[: len(known)] == known else encode_with_specials(tokenizer, text)
    )


MARKS = ("\ue000", "\uf8ff")
"""Two contents that no template changes: characters for private use."""

DATE = datetime(2024, 7, 26)
"""The date of templates that show today's (Llama 3): tokens must be the same after a resume."""


def _split(tokenizer: Tokenizer, template: str, messages: Messages) -> tuple[str, str, str]:
    """Return the text before the last message's content, that of the content, and the rest."""

    def text(messages: Messages, header: bool = False) -> str:
        return render(tokenizer, template, messages, header, strftime_now=DATE.strftime)

    full, header = text(messages), text(messages[:-1], header=True)
    marked = [text([*messages[:-1], {**messages[-1], "content": mark}]) for mark in MARKS]
    before = marked[0].partition(MARKS[0])[0]
    after = marked[0].rpartition(MARKS[0])[2]
    if any(one != before + mark + after for one, mark in zip(marked, MARKS, strict=True)):
        raise InputError(f"the chat template of {tokenizer.path} does not show the answer once")
    if not (full.startswith(before) and len(full) >= len(before + after)):
        before = header  # Templates that parse contents: written thoughts for the empty block.
    if not (full.startswith(before) and full.endswith(after)):
        raise InputError(
            f"the chat template of {tokenizer.path} writes the answer in another place than others"
        )
    inserted = before.removeprefix(header)
    if before.startswith(header) and not inserted.strip():
        before = header
    answer = full[len(before) : len(full) - len(after)]
    if not answer.strip():
        raise InputError(f"the chat template of {tokenizer.path} leaves nothing of the answer")
    return before, answer, after


def _end(tokenizer: Tokenizer, after: str) -> list[int]:
    """Return the token ids of the text after an answer, up to its first special token, or EOS."""
    specials = set(special_tokens(tokenizer).values())
    ids: Sequence[int] = encode_inside(tokenizer, after)
    for i, id in enumerate(ids):
        if id in specials:
            return list(ids[: i + 1])
    return [*encode_inside(tokenizer, after.rstrip()), tokenizer.eos_id]


# Cached: a file is read once for all conversations of a data set.
@lru_cache(maxsize=4)
def _template(tokenizer: Tokenizer) -> str:
    return find_template(tokenizer)


@lru_cache(maxsize=4)
def _begins_with_space(tokenizer: Tokenizer) -> bool:
    ids = tokenizer.encode("a")
    return tokenizer.decode([*ids, *ids]) != "aa"
