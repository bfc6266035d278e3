"""Padded prompts, and incremental decoding of generated tokens to text."""

from collections.abc import Collection, Sequence

import numpy as np

from mooshak.config.model import ModelConfig
from mooshak.errors import InputError
from mooshak.files import read_object
from mooshak.tokenizer.base import Tokenizer

REPLACEMENT = "\ufffd"
"""U+FFFD, which `decode` returns for an incomplete UTF-8 sequence."""


class TextStream:
    """Incremental text of a continuation: prompt and continuation decoded, minus the prompt.

    `push` returns the text that is final; the parts join to `text`. Text that may still change is
    held back: an incomplete character, or the start of a stop text.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str] = ()):
        self.tokenizer, self.prompt, self.stop = tokenizer, list(prompt), stop
        self.ids: list[int] = []
        self.stopped = False
        """True after a stop text was generated."""
        self._start = self._decode([])
        self._sent = 0

    def push(self, token: int) -> str:
        """Append a token; return the text that became final."""
        self.ids.append(token)
        full = self._continuation()
        text = self._until_stop(full)
        self.stopped = len(text) < len(full)
        held = 0 if self.stopped else self._held(text)
        new = text[self._sent : len(text) - held]
        self._sent += len(new)
        return new

    def finish(self) -> str:
        """Return the text that was held back, after the last token."""
        new = self.text[self._sent :]
        self._sent += len(new)
        return new

    @property
    def text(self) -> str:
        """The continuation up to a stop text."""
        return self._until_stop(self._continuation())

    def _continuation(self) -> str:
        text = self._decode(self.ids)
        # The prompt may end within a character, whose last bytes are in the continuation.
        return text[len(_common_prefix(self._start, text)) :]

    def _until_stop(self, text: str) -> str:
        ends = [at for stop in self.stop if (at := text.find(stop)) >= 0]
        return text[: min(ends, default=len(text))]

    def _decode(self, ids: Sequence[int]) -> str:
        # The model may have more rows than the tokenizer has tokens.
        known = (id for id in (*self.prompt, *ids) if id < self.tokenizer.vocab_size)
        return self.tokenizer.decode(list(known))

    def _held(self, text: str) -> int:
        """Return the number of characters at the end that may still change."""
        whole = text.rstrip(REPLACEMENT)
        # An incomplete character may be the next one of a stop text.
        begun = (
            len(text) - len(begins) + n
            for begins in (text, whole)
            for stop in self.stop
            for n in range(1, len(stop))
            if begins.endswith(stop[:n])
        )
        return max(len(text) - len(whole), max(begun, default=0))


def _common_prefix(a: str, b: str) -> str:
    n = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return a[:n]


def end_ids(tokenizer: Tokenizer) -> set[int]:
    """Return the ids of end tokens: of the tokenizer, and in generation_config.json."""
    named = read_object(tokenizer.path.parent / "generation_config.json").get("eos_token_id")
    named = named if isinstance(named, list) else [named]
    return {tokenizer.eos_id, *(id for id in named if isinstance(id, int))}


def pad_prompts(
    prompts: Sequence[Sequence[int]], new_tokens: int, model: ModelConfig
) -> tuple[np.ndarray, np.ndarray]:
    """Return prompts as int32 [B, T], padded at the end with 0, and their lengths, int64 [B].

    Raises `InputError` for an empty prompt, a token outside of the vocabulary, or more tokens than
    `max_seq_len`.
    """
    lengths_B = np.array([len(prompt) for prompt in prompts], np.int64)
    if not len(prompts) or lengths_B.min() == 0:
        raise InputError("a prompt is empty; it needs at least one token")
    if (longest := int(lengths_B.max()) + new_tokens) > model.max_seq_len:
        raise InputError(
            f"prompt and continuation are {longest} tokens, model.max_seq_len is "
            f"{model.max_seq_len}; lower max_new_tokens or shorten the prompt"
        )
    tokens_BT = np.zeros((len(prompts), int(lengths_B.max())), np.int32)
    for row, prompt in zip(tokens_BT, prompts, strict=True):
        check_tokens(prompt, model)
        row[: len(prompt)] = prompt
    return tokens_BT, lengths_B


def check_tokens(ids: Collection[int], model: ModelConfig) -> None:
    """Raise `InputError` unless these are token ids of the model."""
    if wrong := [id for id in ids if not 0 <= id < model.vocab_size]:
        raise InputError(
            f"token {wrong[0]} is outside of the vocabulary, 0 .. {model.vocab_size - 1}; is this "
            "the tokenizer of the model?"
        )
