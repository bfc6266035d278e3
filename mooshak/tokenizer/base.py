"""The interface of every tokenizer, whatever library reads its file."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from mooshak.errors import InputError


class Tokenizer(Protocol):
    """A map between text and token ids."""

    path: Path
    fingerprint: str
    """SHA-256 of the file."""
    vocab_size: int
    """One more than the largest token id."""
    padded_vocab_size: int
    """`vocab_size`, rounded up to a multiple of 64: rows of the embedding."""
    bos_id: int
    """The token before a document; that of `eos_id` if there is no BOS token."""
    nfc: bool
    """True if a text is brought to Unicode NFC before it is encoded."""
    special_texts: dict[str, str]
    """Texts of the special tokens for chat templates: bos, eos, pad and others -> token."""
    eos_id: int
    pad_id: int

    def __hash__(self) -> int:
        """Return a hash of the object: what is derived from all tokens is cached."""
        ...

    def id_of(self, piece: str) -> int:
        """Return the id of a token, such as `<|user|>`. Raises `InputError` if there is none."""
        ...

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """Return the token ids of a text, with BOS before it and EOS after it if asked for."""
        ...

    def encode_batch(self, texts: list[str], threads: int = 1) -> list[list[int]]:
        """Return the token ids of many texts, encoded in parallel."""
        ...

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Return the text of token ids; special tokens have no text."""
        ...

    def pieces(self) -> list[str]:
        """Return the tokens by id, as the file spells them."""
        ...

    def texts(self) -> list[str]:
        """Return the text of each token; empty for special tokens and single bytes."""
        ...

    def token_bytes(self) -> np.ndarray:
        """Return the UTF-8 bytes that each id stands for, int32 [padded_vocab_size]."""
        ...


def padded(vocab_size: int) -> int:
    """Return the rows of the embedding: `vocab_size`, rounded up to a multiple of 64."""
    return -(-vocab_size // 64) * 64


def check_unicode(texts: Iterable[str]) -> None:
    """Raise `InputError` for a text with a lone surrogate, which is not Unicode text."""
    for text in texts:
        if surrogate := re.search("[\ud800-\udfff]", text):
            raise InputError(
                f"the text has a lone surrogate, U+{ord(surrogate[0]):04X}, at character "
                f"{surrogate.start()}; it is not Unicode text, read it as UTF-8"
            ) from None


def check_found(found: int, wanted: int, before: int) -> None:
    """Raise `InputError` if the text has fewer new tokens than an extension needs."""
    if found < wanted - before:
        raise InputError(
            f"the sources have only {found} new tokens of {wanted - before}; lower "
            f"tokenizer.vocab_size to {before + found}, or add text"
        )
