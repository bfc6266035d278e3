"""Lossless SentencePiece tokenizer: every Unicode text is decoded to itself.

A BPE model (arXiv:1808.06226) without normalisation, dummy prefix or whitespace clean-up, and with
byte fallback: characters that are not in the vocabulary become their UTF-8 bytes. So
`decode(encode(text)) == text`, which does not hold for published models of Hindi, whose NFKC
normalisation changes Devanagari. Special tokens and chat markers are control symbols: no text is
encoded to them.
"""

import hashlib
import unicodedata
from collections.abc import Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from mooshak.errors import InputError
from mooshak.tokenizer.base import check_unicode, padded

CHAT_MARKERS = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")

# SentencePiece represents a space by this character. Where it occurs in the text, it is encoded as
# bytes; otherwise it would be decoded to a space.
SPACE_MARK = "\u2581"
# Texts of a grammar, such as the tales, have fewer distinct words than this, and words are cached.
# Other texts have many words that occur once, for which the cache is slower.
_FEW_WORDS = 16_384


def parse_proto(model: bytes) -> Any:
    """Return the protobuf message in a SentencePiece model file."""
    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    proto.ParseFromString(model)
    return proto


def read_model(path: Path) -> bytes:
    """Read a SentencePiece model file. Raises `InputError` if it is missing."""
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(
            f"tokenizer {path} is missing; "
            "train it with `python -m mooshak.tokenizer train --config FILE`"
        ) from None
    except IsADirectoryError:
        raise InputError(f"tokenizer {path} is a directory; name the model file") from None


class SentencePieceTokenizer:
    """A lossless map between text and token ids, from a SentencePiece model file."""

    def __init__(self, path: str | Path, nfc: bool = False) -> None:
        self.path, self.nfc = Path(path), nfc
        model = read_model(self.path)
        self.fingerprint = hashlib.sha256(model).hexdigest()
        """SHA-256 of the model file."""
        try:
            # An empty file would be a valid message without tokens.
            self._model = sentencepiece.SentencePieceProcessor(model_proto=model or b"-")
        except RuntimeError:
            raise InputError(
                f"tokenizer {path} is not a SentencePiece model, or is truncated; "
                "delete it and train or copy it again"
            ) from None
        self.vocab_size: int = self._model.vocab_size()
        """Number of tokens."""
        self.padded_vocab_size = padded(self.vocab_size)
        """Number of tokens, rounded up to a multiple of 64: rows of the embedding."""
        self.eos_id: int = self._model.eos_id()
        self.has_bos = self._model.bos_id() >= 0
        # Without a BOS token, documents are separated by EOS.
        self.bos_id: int = self._model.bos_id() if self.has_bos else self.eos_id
        self.pad_id: int = self._model.pad_id() if self._model.pad_id() >= 0 else self.eos_id
        ids = {"bos": self._model.bos_id(), "eos": self.eos_id, "unk": self._model.unk_id()}
        ids["pad"] = self._model.pad_id()
        self.special_texts = {n: self._model.id_to_piece(id) for n, id in ids.items() if id >= 0}
        self._words: dict[str, list[int]] = {}
        bytes_ = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]
        # Without tokens for bytes, a model has one unknown token for all characters that it lacks.
        self._space_mark = (
            bytes_ if all(map(self._model.is_byte, bytes_)) else [self._model.unk_id()]
        )

    def id_of(self, piece: str) -> int:
        """Return the id of a token, such as `<|user|>`. Raises `InputError` if there is none."""
        id = self._model.piece_to_id(piece)
        if self._model.id_to_piece(id) != piece:
            raise InputError(f"tokenizer {self.path} has no token {piece}; train one with it")
        return id

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """Return the token ids of a text, with BOS before it and EOS after it if asked for."""
        ids = self.encode_batch([text], threads=1)[0]
        return [self.bos_id] * (bos and self.has_bos) + ids + [self.eos_id] * eos

    def encode_batch(self, texts: list[str], threads: int = 1) -> list[list[int]]:
        """Return the token ids of many texts, encoded in parallel."""
        if self.nfc:
            texts = [unicodedata.normalize("NFC", text) for text in texts]
        parts = [part for text in texts for part in text.split(SPACE_MARK)]
        try:
            encoded = self._encode(parts, threads)
        except (RuntimeError, TypeError):
            check_unicode(texts)
            raise
        if len(parts) == len(texts):
            return encoded
        following = iter(encoded)
        result = []
        for text in texts:
            ids = next(following)
            for _ in range(text.count(SPACE_MARK)):
                ids += self._space_mark + next(following)
            result.append(ids)
        return result

    def _encode(self, texts: list[str], threads: int) -> list[list[int]]:
        """Encode texts without space marks, with the cache of words where that is faster."""
        # SentencePiece releases the GIL and uses every core; the look-ups hold it.
        if len(texts) == 1 or threads > 2 or not self._of_words:
            return self._model.encode(texts, num_threads=threads)
        split, known = [text.split(" ") for text in texts], self._words
        new = list(set().union(*split) - known.keys())
        if len(known) + len(new) > _FEW_WORDS:
            self._of_words, self._words = False, {}
            return self._model.encode(texts, num_threads=threads)
        # A word includes the preceding space, except the first word of a text.
        within = self._model.encode([" " + word for word in new], num_threads=threads)
        known.update(zip(new, within, strict=True))
        result = self._model.encode([words[0] for words in split], num_threads=threads)
        for ids, words in zip(result, split, strict=True):
            ids.extend(chain.from_iterable(map(known.__getitem__, words[1:])))
        return result

    @cached_property
    def _of_words(self) -> bool:
        """True if no token spans two words: words can be encoded separately."""
        proto = parse_proto(self._model.serialized_model_proto())
        spec = proto.normalizer_spec
        changes = spec.add_dummy_prefix or spec.remove_extra_whitespaces
        return (
            proto.trainer_spec.model_type == proto.trainer_spec.BPE
            and spec.escape_whitespaces
            and not (changes or spec.precompiled_charsmap)
            and not any(SPACE_MARK in piece.piece[1:] for piece in proto.pieces)
        )

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Return the text of token ids: U+FFFD for incomplete UTF-8, nothing for special tokens."""
        return self._model.decode(self.check_ids(ids))

    def check_ids(self, ids: Sequence[int] | np.ndarray) -> list[int]:
        """Return the token ids, without those of unused rows of the embedding.

        Raises `InputError` for ids beyond these rows.
        """
        pieces = [int(id) for id in ids]
        if pieces and not 0 <= min(pieces) <= max(pieces) < self.padded_vocab_size:
            raise InputError(
                f"token ids must be in 0 .. {self.padded_vocab_size - 1}, "
                f"got {min(pieces)} .. {max(pieces)}; is this the tokenizer of the model?"
            )
        return [id for id in pieces if id < self.vocab_size]

    def pieces(self) -> list[str]:
        """Return the tokens by id, as the file spells them."""
        return [self._model.id_to_piece(id) for id in range(self._model.vocab_size())]

    def texts(self) -> list[str]:
        """Return the text of each token; empty for special tokens and single bytes."""
        specials = (self._model.is_byte, self._model.is_control, self._model.is_unknown)
        return [
            ""
            if any(special(id) for special in specials)
            else self._model.id_to_piece(id).replace(SPACE_MARK, " ")
            for id in range(self._model.vocab_size())
        ]

    def token_bytes(self) -> np.ndarray:
        """Return the UTF-8 bytes of each token, int32 [padded_vocab_size]; 0 for special tokens."""
        result, n_own = np.zeros(self.padded_vocab_size, np.int32), self._model.vocab_size()
        result[: self.vocab_size] = [
            (id < n_own and self._model.is_byte(id)) or len(text.encode())
            for id, text in enumerate(self.texts())
        ]
        return result
