"""Prompts to padded token ids, and generated ids back to text, also while they are generated."""

from collections.abc import Collection, Sequence

import numpy as np

from mooshak.config.model import ModelConfig
from mooshak.errors import InputError
from mooshak.files import read_object
from mooshak.tokenizer.base import Tokenizer

REPLACEMENT = "\ufffd"
"""What a tokenizer decodes an incomplete UTF-8 sequence to."""


class TextStream:
    """The text of a continuation, token by token: the difference of two decodes.

    `push` returns the text that is final, which joins to `text`. Text is held back while it may
    still change: an incomplete character, or the beginning of a stop text.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str] = ()):
        self.tokenizer, self.prompt, self.stop = tokenizer, list(prompt), stop
        self.ids: list[int] = []
        self.stopped = False
        """Whether a stop text was generated."""
        self._start = self._decode([])
        self._sent = 0

    def push(self, token: int) -> str:
        """Take in a token; return the text that has become final."""
        self.ids.append(token)
        text = self.text
        for stop in self.stop:
            if (at := text.find(stop)) >= 0:
                self.stopped, text = True, text[:at]
        held = 0 if self.stopped else self._held(text)
        new = text[self._sent : len(text) - held]
        self._sent += len(new)
        return new

    def finish(self) -> str:
        """Return the text that was held back, once no token follows."""
        new = self.text[self._sent :]
        self._sent += len(new)
        return new

    @property
    def text(self) -> str:
        """The continuation up to a stop text."""
        text = self._decode(self.ids)
        # The end of the prompt may be the first bytes of a character that ends here.
        text = text[len(_common_prefix(self._start, text)) :]
        ends = [at for stop in self.stop if (at := text.find(stop)) >= 0]
        return text[: min(ends, default=len(text))]

    def _decode(self, ids: Sequence[int]) -> str:
        # A model may have rows that stand for no token.
        known = (id for id in (*self.prompt, *ids) if id < self.tokenizer.vocab_size)
        return self.tokenizer.decode(list(known))

    def _held(self, text: str) -> int:
        """How many characters at the end may still change."""
        incomplete = len(text) - len(text.rstrip(REPLACEMENT))
        begun = (n for stop in self.stop for n in range(1, len(stop)) if text.endswith(stop[:n]))
        return max(incomplete, max(begun, default=0))


def _common_prefix(a: str, b: str) -> str:
    n = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return a[:n]


def end_ids(tokenizer: Tokenizer) -> set[int]:
    """Return the tokens that end a text: the tokenizer's, and those of generation_config.json."""
    named = read_object(tokenizer.path.parent / "generation_config.json").get("eos_token_id")
    named = named if isinstance(named, list) else [named]
    return {tokenizer.eos_id, *(id for id in named if isinstance(id, int))}


def pad_prompts(
    prompts: Sequence[Sequence[int]], new_tokens: int, model: ModelConfig
) -> tuple[np.ndarray, np.ndarray]:
    """Return prompts as int32 [B, T], padded at the end with 0, and their lengths, int64 [B].

    Raises `InputError` for an empty prompt, a token outside of the vocabulary, or a text that would
    outgrow the model's positions.
    """
    lengths_B = np.array([len(prompt) for prompt in prompts], np.int64)
    if not len(prompts) or lengths_B.min() == 0:
        raise InputError("a prompt is empty; it needs one token at least")
    if (longest := int(lengths_B.max()) + new_tokens) > model.max_seq_len:
        raise InputError(
            f"prompt and continuation are {longest} tokens, the model has {model.max_seq_len} "
            "positions; lower max_new_tokens or shorten the prompt"
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
            f"token {wrong[0]} is outside of the vocabulary, 0 .. {model.vocab_size - 1}; is the "
            "tokenizer the model's own?"
        )
