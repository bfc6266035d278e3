"""Constrained decoding: the tokens that keep a text within a regular expression, schema or grammar.

The library llguidance matches the bytes of tokens; it compiles nothing in advance, so a constraint
costs milliseconds. What is constrained is `Completion.text`: the continuation, without the prompt.
Shapes: V rows of the model's vocabulary.
"""

import codecs
import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import numpy as np

from mooshak.config.generate import GenerateConfig
from mooshak.errors import InputError, require
from mooshak.generation.text import REPLACEMENT
from mooshak.tokenizer.base import Tokenizer
from mooshak.tokenizer.token_texts import TokenTexts

WHITESPACE = {"whitespace_pattern": "[ ]"}
"""JSON has at most one space between two symbols: a weak model would not end a longer pattern."""

NO_FORCING = '\n%llguidance {"no_forcing": true}\n'
"""Without it the library permits one tokenization only where the grammar leaves one text."""


@dataclass(frozen=True)
class Vocabulary:
    """The tokens as the library has them: those of the tokenizer, 256 single bytes, an end."""

    tokens: tuple[bytes, ...]
    """Bytes by token id; empty for a token that has no text, or another one than its bytes."""
    library: Any
    """`llguidance.LLTokenizer`."""

    @classmethod
    def of(cls, tokens: Sequence[bytes]) -> "Vocabulary":
        """Return the vocabulary of tokens with these bytes."""
        library, n = _library(), len(tokens)
        source = SimpleNamespace(eos_token_id=n + 256, bos_token_id=None)
        source.tokens = [*tokens, *(bytes([byte]) for byte in range(256)), b"\xff<end>"]
        source.special_token_ids = [n + 256]
        return cls(tuple(tokens), library.LLTokenizer(library.TokenizerWrapper(source)))

    def byte_ids(self, data: bytes) -> list[int]:
        """Return the ids of single bytes, which no model generates."""
        return [len(self.tokens) + byte for byte in data]


@dataclass(frozen=True)
class Constraint:
    """The tokens that may follow a row. It does not change: `after` returns another one."""

    name: str
    """Setting of the constraint."""
    vocabulary: Vocabulary
    ends: frozenset[int]
    """Tokens that end the text."""
    matcher: Any
    """`llguidance.LLMatcher` after the text so far."""
    first: tuple[Vocabulary, Any] | None = None
    """Vocabulary and matcher of the first token, if the tokenizer strips its space."""
    done: bool = False
    """True if the text has ended: an end token came, or nothing else can follow."""

    def allowed(self, vocab_size: int) -> np.ndarray:
        """Return the tokens that may follow, bool [V]: all of them after the end.

        Raises `InputError` if no token can continue the text, or the constraint is too complex.
        """
        if self.done:
            return np.ones(vocab_size, bool)
        vocabulary, matcher = self.first or (self.vocabulary, self.matcher)
        bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        if matcher.is_error():
            raise _error(self.name, matcher.get_error())
        allowed_V = np.zeros(vocab_size, bool)
        n = min(len(vocabulary.tokens), vocab_size)
        allowed_V[:n] = np.unpackbits(bits, count=n, bitorder="little")
        ends = [end for end in self.ends if end < vocab_size]
        allowed_V[ends] = self.matcher.is_accepting()
        return allowed_V

    def after(self, token: int) -> "Constraint":
        """Return the constraint after one more token.

        It permits none if the token was not allowed, or the constraint is too complex: `allowed`
        then raises `InputError`.
        """
        if self.done:
            return self
        if token in self.ends:
            return replace(self, done=True)
        ids = [token]
        if self.first is not None:
            ids = self.vocabulary.byte_ids(self.first[0].tokens[token])
        matcher = self.matcher.deep_copy()
        matcher.consume_tokens(ids)
        done = matcher.is_stopped() and matcher.is_accepting()
        return replace(self, matcher=matcher, first=None, done=done)


def make_constraint(
    settings: GenerateConfig,
    tokenizer: Tokenizer | None,
    prompt: Sequence[int],
    ends: Collection[int],
) -> Constraint | None:
    """Return the constraint of the text after a prompt; None if the settings have none.

    `ends` are the end tokens of the row. Raises `InputError` if the constraint is invalid, nothing
    can meet it after this prompt, or the tokenizer or the library is missing.
    """
    given = settings.constraint
    if given is None:
        return None
    name, value = given
    if tokenizer is None:
        raise InputError(f"generate.{name} needs a tokenizer, which the checkpoint does not have")
    ends = settings.stop_token_ids if settings.ignore_eos else ends
    vocabulary = _vocabulary(tokenizer)
    matcher = _compile(tokenizer, name, value).deep_copy()
    if (data := _open_bytes(vocabulary, tokenizer, prompt, name)) and not matcher.consume_tokens(
        vocabulary.byte_ids(data)
    ):
        raise InputError(f"generate.{name} does not permit the character that the prompt begins")
    first = None
    if _strips_space(tokenizer, prompt):
        matcher_of_first = _compile(tokenizer, name, value, True).deep_copy()
        first = _first_vocabulary(tokenizer), matcher_of_first
    return Constraint(name, vocabulary, frozenset(ends), matcher, first)


@lru_cache(maxsize=64)
def _compile(
    tokenizer: Tokenizer, name: str, value: str | tuple[str, ...], first: bool = False
) -> Any:
    """Return the matcher of a constraint, at its beginning."""
    library = _library()
    vocabulary = _first_vocabulary(tokenizer) if first else _vocabulary(tokenizer)
    limits = library.LLParserLimits(verbose_errors=False)
    try:
        grammar = _lark(name, value)
        matcher = library.LLMatcher(vocabulary.library, grammar, log_level=0, limits=limits)
    except (ValueError, library.gbnf_to_lark.GbnfToLarkError) as error:
        raise _error(name, str(error)) from error
    if matcher.is_error():
        raise _error(name, matcher.get_error())
    return matcher


def _lark(name: str, value: str | tuple[str, ...]) -> str:
    """Return the constraint in the grammar language of the library. Raises `ValueError`."""
    library = _library()
    if name == "choice":
        texts = (json.dumps(text).replace("\x7f", "\\u007f") for text in value)
        return f"start: {' | '.join(texts)}{NO_FORCING}"
    assert isinstance(value, str)
    if name == "regex":
        # The library would drop the one, and continue the comments of the other.
        if (len(value) - len(value.rstrip("\\"))) % 2:
            raise ValueError("it ends with a backslash")
        if "\n" in value and re.search(r"\(\?\w*x", value):
            raise ValueError("the flag x is not supported on several lines")
        return f"start: /{library.regex_to_lark(value, '')}/{NO_FORCING}"
    if name == "json_schema":
        schema = json.loads(value)
        given = schema.get("x-guidance", {})
        if not isinstance(given, dict):
            raise ValueError("x-guidance must be an object")
        if not any(key.startswith("whitespace") for key in given):
            schema["x-guidance"] = WHITESPACE | given
        return f"start: %json {json.dumps(schema)}{NO_FORCING}"
    found: str = library.gbnf_to_lark.any_to_lark(value)
    return found + NO_FORCING


def _error(name: str, message: str) -> InputError:
    """Return an error with the essence of the library's message, on one line."""
    if message.startswith("NoExtension"):
        return InputError(f"generate.{name}: no token can continue the text")
    lines = [line.strip() for line in message.splitlines() if line.strip()] or [message]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    text = [*errors, lines[0]][0].replace("failed to compile JSON schema: ", "")
    place = r"line \1, column \2: " if name == "grammar" else ""
    return InputError(
        f"generate.{name}: " + re.sub(r"^(?:at )?(\d+)\((\d+)\): ", place, text)[:300]
    )


@lru_cache(maxsize=8)
def _vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    """Return the vocabulary of a tokenizer."""
    texts, pieces = TokenTexts(tokenizer), tokenizer.pieces()
    tokens = [texts.bytes_of(id) or b"" for id in range(len(pieces))]
    # A letter that is not a single byte: it has the same text before any token.
    letters = (id for id, data in enumerate(tokens) if data.isalpha() and pieces[id][:1] != "<")
    anchor = next(letters, None)
    if anchor is None:
        raise InputError(f"tokenizer {tokenizer.path} has no token of letters")
    before = tokenizer.decode([anchor])

    def is_exact(id: int, data: bytes) -> bool:
        text = before + data.decode(errors="replace")
        return _collapse(tokenizer.decode([anchor, id])) == _collapse(text)

    exact = [data if data and is_exact(id, data) else b"" for id, data in enumerate(tokens)]
    n_text, n_exact = (sum(map(bool, values)) for values in (tokens, exact))
    require(
        2 * n_exact >= n_text,
        f"tokenizer {tokenizer.path}: {n_text - n_exact} of {n_text} tokens have another text than "
        "their bytes; constraints need a byte-level BPE or a SentencePiece model",
    )
    return Vocabulary.of(exact)


@lru_cache(maxsize=8)
def _first_vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    """Return the vocabulary of the first token of a text, whose space may be stripped."""
    tokens = list(_vocabulary(tokenizer).tokens)
    for id, data in enumerate(tokens):
        text = tokenizer.decode([id])
        if data and REPLACEMENT not in text:
            tokens[id] = text.encode()
    return Vocabulary.of(tokens)


def _collapse(text: str) -> str:
    """Return a text with one U+FFFD for several: decoders differ in their number."""
    return re.sub(f"{REPLACEMENT}+", REPLACEMENT, text)


def _open_bytes(
    vocabulary: Vocabulary, tokenizer: Tokenizer, prompt: Sequence[int], name: str
) -> bytes:
    """Return the bytes of a character that the prompt begins: it is in the text that follows."""
    known = [id for id in prompt if id < tokenizer.vocab_size]
    if not tokenizer.decode(known).endswith(REPLACEMENT):
        return b""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    text = decoder.decode(b"".join(vocabulary.tokens[id] for id in known[-16:]))
    begun = decoder.getstate()[0]
    if text.endswith(REPLACEMENT) and not _ends_with_character(vocabulary, known, len(begun)):
        raise InputError(f"generate.{name}: the prompt ends with bytes that are not UTF-8 text")
    return begun


def _ends_with_character(vocabulary: Vocabulary, ids: Sequence[int], n_begun: int) -> bool:
    """Return whether a text ends with a true U+FFFD, before the bytes of a begun character."""
    data = b"".join(vocabulary.tokens[id] for id in ids[-16:])
    return data[: len(data) - n_begun].endswith(REPLACEMENT.encode())


def _strips_space(tokenizer: Tokenizer, prompt: Sequence[int]) -> bool:
    """Return whether a space at the start of the continuation is not in its text."""
    known = [id for id in prompt if id < tokenizer.vocab_size]
    stripped = None if tokenizer.decode(known) else _stripped_token(tokenizer)
    if stripped is None:
        return False
    return tokenizer.decode([*known, stripped]) == tokenizer.decode([stripped])


@lru_cache(maxsize=8)
def _stripped_token(tokenizer: Tokenizer) -> int | None:
    """Return a token whose text is shorter at the start of a text; None if there is none."""
    pairs = zip(_vocabulary(tokenizer).tokens, _first_vocabulary(tokenizer).tokens, strict=True)
    return next((id for id, (within, first) in enumerate(pairs) if first and first != within), None)


def _library() -> Any:
    """Return the module of the library. Raises `InputError` if it is not installed."""
    try:
        import llguidance
    except ImportError as error:
        raise InputError(
            "constraints need the library llguidance; pip install 'mooshak[constraints]'"
        ) from error
    return llguidance
