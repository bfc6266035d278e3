"""Adjustments of the logits before sampling: biases, penalties, and tokens that are not allowed.

They depend on the tokens of a row, which are on the host, and are the same in both frameworks. The
order is that of transformers, with vLLM's penalties between its last two steps:

    logit_bias is added
    repetition_penalty, for tokens in prompt or output: divides positive logits, multiplies others
    presence_penalty and frequency_penalty, for tokens in the output, are subtracted
    no_repeat_ngram_size, bad_words, min_new_tokens (end tokens), allowed_tokens (others) and the
        constraint (regex, json_schema, choice, grammar) ban tokens

Shapes: B rows, V vocabulary.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from copy import copy
from typing import NamedTuple

import numpy as np

from mooshak.config.generate import CONSTRAINTS, GenerateConfig
from mooshak.errors import InputError
from mooshak.generation.constraints import Constraint
from mooshak.tokenizer.base import Tokenizer


class Adjustments(NamedTuple):
    """Changes of the logits of a step: x -> penalise(x + bias) + offset."""

    bias_BV: np.ndarray
    """float64."""
    penalty_BV: np.ndarray
    """float64: divisor of positive numbers, factor of others; 1 changes nothing."""
    offset_BV: np.ndarray
    """float64; minus infinity for a banned token."""


class RowAdjustments:
    """The adjustments of one row, updated with each token."""

    def __init__(
        self,
        settings: GenerateConfig,
        prompt: Sequence[int],
        vocab_size: int,
        ends: Collection[int] = (),
        bad_words: Iterable[Sequence[int]] = (),
        constraint: Constraint | None = None,
    ):
        check_token_settings(settings, vocab_size)
        self.settings, self.ends = settings, sorted(end for end in ends if end < vocab_size)
        self.ids, self.n_prompt = list(prompt), len(prompt)
        self.bias_V, self.penalty_V = np.zeros(vocab_size), np.ones(vocab_size)
        self.offset_V, self._counts_V = np.zeros(vocab_size), np.zeros(vocab_size)
        for token, bias in settings.logit_bias.items():
            self.bias_V[token] = bias
        self.penalty_V[self.ids] = settings.repetition_penalty
        self._bad, self.constraint = [tuple(word) for word in bad_words], constraint
        self._forbidden_V = np.zeros(vocab_size, bool)
        if settings.allowed_tokens:
            self._forbidden_V[:] = True
            self._forbidden_V[list(settings.allowed_tokens)] = False
        self._followers: dict[tuple[int, ...], set[int]] = defaultdict(set)
        n = settings.no_repeat_ngram_size
        for end in range(n, len(self.ids) + 1) if n else ():
            self._followers[tuple(self.ids[end - n : end - 1])].add(self.ids[end - 1])

    def copy(self) -> "RowAdjustments":
        """Return a copy that other tokens may follow."""
        other = copy(self)
        other.ids, other.penalty_V = self.ids.copy(), self.penalty_V.copy()
        other.offset_V, other._counts_V = self.offset_V.copy(), self._counts_V.copy()
        other._followers = defaultdict(set, {k: v.copy() for k, v in self._followers.items()})
        return other

    def push(self, token: int) -> None:
        """Append a token of the output."""
        self.ids.append(token)
        self.penalty_V[token] = self.settings.repetition_penalty
        self._counts_V[token] += 1
        if self.constraint is not None:
            self.constraint = self.constraint.after(token)
        n = self.settings.no_repeat_ngram_size
        if n and len(self.ids) >= n:
            self._followers[tuple(self.ids[len(self.ids) - n : -1])].add(token)

    def offset(self, check: bool = True) -> np.ndarray:
        """Return the offsets of the next token, float64 [V]; valid until the next call.

        With `check`, raises `InputError` if no token is left.
        """
        settings, counts_V = self.settings, self._counts_V
        np.multiply(counts_V, -settings.frequency_penalty, out=self.offset_V)
        self.offset_V -= settings.presence_penalty * (counts_V > 0)
        self.offset_V[self._forbidden_V] = -np.inf
        self.offset_V[self.banned()] = -np.inf
        if self.constraint is not None:
            if self.constraint.done:  # Nobody reads what follows.
                return self.offset_V
            self.offset_V[~self.constraint.allowed(len(self.offset_V))] = -np.inf
        if check and np.isneginf(self.offset_V).all():
            bans = ("allowed_tokens", "bad_words", "no_repeat_ngram_size", "min_new_tokens")
            names = (*bans, *CONSTRAINTS)
            used = [f"generate.{name}" for name in names if getattr(settings, name)]
            raise InputError(
                f"no token may follow the {len(self.ids) - self.n_prompt} generated ones: relax "
                f"{' or '.join(used)}"
            )
        return self.offset_V

    def banned(self) -> list[int]:
        """Return the tokens that must not follow, but for those outside of `allowed_tokens`."""
        found = [word[-1] for word in self._bad if self._ends_with(word[:-1])]
        n = self.settings.no_repeat_ngram_size
        if n and len(self.ids) >= n - 1:
            found += self._followers.get(tuple(self.ids[len(self.ids) - n + 1 :]), ())
        if len(self.ids) - self.n_prompt < self.settings.min_new_tokens:
            found += self.ends
        return found

    def _ends_with(self, tokens: tuple[int, ...]) -> bool:
        return not tokens or tuple(self.ids[-len(tokens) :]) == tokens


def stack_adjustments(rows: Sequence[RowAdjustments], check: bool = True) -> Adjustments:
    """Return the adjustments of all rows for the next token.

    With `check`, raises `InputError` if no token is left in a row.
    """
    return Adjustments(
        np.stack([row.bias_V for row in rows]),
        np.stack([row.penalty_V for row in rows]),
        np.stack([row.offset(check) for row in rows]),
    )


def needs_adjustments(settings: GenerateConfig) -> bool:
    """Return whether any setting changes the logits before the temperature."""
    neutral = GenerateConfig()
    return any(
        getattr(settings, name) != getattr(neutral, name)
        for name in (
            "logit_bias",
            "repetition_penalty",
            "presence_penalty",
            "frequency_penalty",
            "no_repeat_ngram_size",
            "bad_words",
            "min_new_tokens",
            "allowed_tokens",
            *CONSTRAINTS,
        )
    )


def check_token_settings(settings: GenerateConfig, vocab_size: int) -> None:
    """Raise `InputError` for a token of a setting that is outside of the vocabulary."""
    for name in ("logit_bias", "allowed_tokens", "stop_token_ids"):
        for token in getattr(settings, name):
            if not 0 <= token < vocab_size:
                raise InputError(
                    f"generate.{name}: token {token} is outside of the vocabulary, 0 .. "
                    f"{vocab_size - 1}"
                )


def bad_word_ids(words: Iterable[str], tokenizer: Tokenizer | None) -> list[list[int]]:
    """Return the token ids of words at the start of a text and after a space.

    Raises `InputError` if there are words but no tokenizer.
    """
    words = list(words)
    if words and tokenizer is None:
        raise InputError("generate.bad_words needs a tokenizer, which the checkpoint does not have")
    assert tokenizer is not None or not words
    found: list[list[int]] = []
    for word in words:
        for text in (word, " " + word):
            ids = tokenizer.encode(text) if tokenizer is not None else []
            if ids and ids not in found:
                found.append(ids)
    return found
