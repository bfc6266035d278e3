"""Padded prompts, and incremental decoding of generated tokens to text."""

from collections.abc import Collection, Sequence
from functools import cached_property

import numpy as np
import regex

from mooshak.config.model import ModelConfig
from mooshak.errors import InputError
from mooshak.tokenizer.base import Tokenizer
from mooshak.tokenizer.metadata import named_end_ids

REPLACEMENT = "\ufffd"
"""U+FFFD, which `decode` returns for an incomplete UTF-8 sequence."""
CLUSTER = regex.compile(r"\X")
"""Grapheme cluster: a letter with its vowel signs, a conjunct, an emoji with its joiners."""


class TextStream:
    """Incremental text of a continuation: prompt and continuation decoded, minus the prompt.

    `push` returns the text that is final; the parts join to `text`. They end at borders of grapheme
    clusters (Unicode UAX #29). Held back is what may still change: an incomplete character, the
    last cluster, or the start of a stop text. Only the latest tokens are decoded for each token.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str] = ()):
        self.tokenizer, self.prompt, self.stop = tokenizer, list(prompt), stop
        self.ids: list[int] = []
        self.stopped = False
        """True after a stop text was generated."""
        self._n_sent = 0
        self._pending = ""
        # The latest tokens, which are decoded again; the text of the first `_n_known` is `_known`.
        self._window: list[int] = []
        self._n_known = 0
        self._known: str | None = None

    def push(self, token: int) -> str:
        """Append a token; return the text that became final."""
        self.ids.append(token)
        new, is_final = self._decode_latest(token)
        text = self._pending + new
        ends = [at for stop in self.stop if (at := text.find(stop)) >= 0]
        if ends:
            self._pending, self.stopped = text, True
            return self._send(min(ends))
        if not is_final:
            return ""
        self._pending = text
        return self._send(self._last_border(len(self._pending) - self._begun_stop()))

    def finish(self) -> str:
        """Return the text that was held back, after the last token."""
        new = self.text[self._n_sent :]
        self._n_sent += len(new)
        return new

    @property
    def text(self) -> str:
        """The continuation up to a stop text."""
        text = self._decode(self.prompt + self.ids)
        # The prompt may end within a character, whose last bytes are in the continuation.
        start = _common_prefix(self._decode(self.prompt), text)
        ends = [at for stop in self.stop if (at := text.find(stop, len(start))) >= 0]
        return text[len(start) : min(ends, default=len(text))]

    def _send(self, length: int) -> str:
        new, self._pending = self._pending[:length], self._pending[length:]
        self._n_sent += length
        return new

    def _decode_latest(self, token: int) -> tuple[str, bool]:
        """Return the text after the known one, and whether it is final: then it becomes known."""
        if self._known is None:
            self._window, self._known = self._end_of_prompt()
            self._n_known = len(self._window)
        self._window.append(token)
        text = self._decode(self._window)
        if text.endswith(REPLACEMENT):
            return "", False
        new = text[len(_common_prefix(self._known, text)) :]
        if self._is_open(self._window, text):
            return new, False
        if text == self._known and text.strip(" "):
            del self._window[self._n_known :]  # Special tokens.
            return "", True
        latest = self._window[self._n_known :]
        known = self._decode(latest)
        # Tokenizers may strip the spaces at the start, so a window has more than spaces.
        if known.strip(" "):
            self._window, self._known = latest, known
        else:
            self._known = text
        self._n_known = len(self._window)
        return new, True

    def _end_of_prompt(self) -> tuple[list[int], str]:
        """Return the latest tokens of the prompt on which later text depends, and their text."""
        text, n = self._decode(self.prompt), 16
        while n < len(self.prompt) and not text.endswith(REPLACEMENT):
            end = self.prompt[-n:]
            known = self._decode(end)
            if text.endswith(known) and known.strip(" ") and not self._is_open(end, known):
                return end, known
            n *= 2
        return list(self.prompt), text

    def _is_open(self, ids: list[int], text: str) -> bool:
        """Return whether an invalid next byte would change the text of tokens."""
        if self._invalid_byte is None:
            return False
        return not self._decode([*ids, self._invalid_byte]).startswith(text)

    @cached_property
    def _invalid_byte(self) -> int | None:
        """Token of the byte FF if it makes the bytes before it invalid; else None.

        `ByteFallback`, a decoder of Hugging Face, replaces all bytes of a run by U+FFFD.
        """
        try:
            letter, invalid = map(self.tokenizer.id_of, ("<0x41>", "<0xFF>"))
        except InputError:
            return None
        return None if self._decode([letter, invalid]).startswith("A") else invalid

    def _decode(self, ids: Sequence[int]) -> str:
        # The model may have more rows than the tokenizer has tokens.
        return self.tokenizer.decode([id for id in ids if id < self.tokenizer.vocab_size])

    def _begun_stop(self) -> int:
        """Return the number of characters at the end that may be the start of a stop text."""
        text = self._pending
        lengths = ((stop, n) for stop in self.stop for n in range(1, min(len(stop), len(text) + 1)))
        return max((n for stop, n in lengths if text.endswith(stop[:n])), default=0)

    def _last_border(self, length: int) -> int:
        """Return the end of the last grapheme cluster within `length`, but for the very last."""
        borders = [match.end() for match in CLUSTER.finditer(self._pending)][:-1]
        return max((end for end in borders if end <= length), default=0)


def _common_prefix(a: str, b: str) -> str:
    n = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return a[:n]


def end_ids(tokenizer: Tokenizer) -> set[int]:
    """Return the ids of end tokens: of the tokenizer, and those that files next to it name."""
    return {tokenizer.eos_id} | named_end_ids(tokenizer.path.parent)


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
