"""Tokenizer in a `tokenizer.json` of Hugging Face.

Llama 3, Qwen and SmolLM have such a file and no SentencePiece model. The library `tokenizers` reads
it, so its post-processing, such as a first token, applies here, too.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from unicodedata import normalize

import numpy as np

from mooshak.errors import InputError
from mooshak.tokenizer.base import check_found, check_unicode, padded
from mooshak.tokenizer.metadata import AddedToken, read_metadata


class HFTokenizer:
    """A map between text and token ids, from a `tokenizer.json` and the settings next to it."""

    def __init__(self, path: str | Path) -> None:
        try:
            import tokenizers
        except ImportError:
            raise InputError(
                "a tokenizer.json needs the library tokenizers; pip install 'mooshak[hf]'"
            ) from None
        self.path = Path(path)
        try:
            text = self.path.read_bytes()
        except OSError as error:
            raise InputError(f"tokenizer {path} cannot be read: {error.strerror}") from error
        try:
            self._fast = tokenizers.Tokenizer.from_str(text.decode())
        except Exception as error:  # The library raises no other class.
            raise InputError(f"tokenizer {path} is not a tokenizer.json: {error}") from error
        self._decoder = str(json.loads(text).get("decoder"))
        # Settings of some earlier call that the file keeps: they would cut texts off, or pad them.
        self._fast.no_truncation()
        self._fast.no_padding()
        self.metadata = read_metadata(self.path.parent)
        self.nfc = self.metadata.nfc
        added = self._add_tokens()
        self.fingerprint = hashlib.sha256(text + repr(added).encode() * bool(added)).hexdigest()
        """SHA-256 of the file, with the added tokens that only other files have."""
        self.special_texts = dict(self.metadata.names)
        # Ids may have gaps.
        self.vocab_size = 1 + max(self._fast.get_vocab().values(), default=-1)
        self.padded_vocab_size = padded(self.vocab_size)
        end = self._special("eos")
        if end is None:
            raise InputError(f"no file next to tokenizer {path} names its eos_token")
        begin, pad = self._special("bos"), self._special("pad")
        self.eos_id = end
        # Without a BOS token, documents are separated by EOS.
        self.bos_id = end if begin is None else begin
        self.pad_id = end if pad is None else pad

    def _special(self, name: str) -> int | None:
        """Return the id of a special token that a file of the directory names, or None."""
        token = self.metadata.names.get(name)
        id = None if token is None else self._fast.token_to_id(token)
        return self.metadata.ids.get(name) if id is None else int(id)

    def _add_tokens(self) -> list[AddedToken]:
        """Add the tokens that other files have and `tokenizer.json` lacks; return them.

        Raises `InputError` if their ids do not follow those of the file.
        """
        import tokenizers

        known = {token.content for token in self._fast.get_added_tokens_decoder().values()}
        placed = list(self.metadata.added.items())
        tokens = [(id, token) for id, token in placed if token.content not in known]
        wanted = [AddedToken(text, special=True) for text in self.metadata.unplaced]
        tokens += [(-1, token) for token in wanted if token.content not in known]
        for id, token in tokens:
            new = tokenizers.AddedToken(**asdict(token))
            (self._fast.add_special_tokens if token.special else self._fast.add_tokens)([new])
            given = self._fast.token_to_id(token.content)
            if id not in (-1, given):
                raise InputError(
                    f"{self.path.parent}: the added token {token.content!r} has id {id}, but "
                    f"{given} follows the other tokens, which transformers would give it"
                )
        return [token for _, token in tokens]

    def id_of(self, piece: str) -> int:
        """Return the id of a token. Raises `InputError` if there is none."""
        id = self._fast.token_to_id(piece)
        if id is None:
            raise InputError(f"tokenizer {self.path} has no token {piece}")
        return int(id)

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """Return the token ids of a text; with `bos`, also special tokens that the file adds."""
        (text,) = self._normal([text])
        ids = list(self._fast.encode(text, add_special_tokens=bos).ids)
        return ids + [self.eos_id] * eos

    def encode_batch(self, texts: list[str], threads: int = 1) -> list[list[int]]:
        """Return the token ids of many texts, encoded in parallel."""
        encoded = self._fast.encode_batch(self._normal(texts), add_special_tokens=False)
        return [list(one.ids) for one in encoded]

    def _normal(self, texts: list[str]) -> list[str]:
        """Return the texts in the form that the library accepts, and the model was trained on."""
        check_unicode(texts)
        return [normalize("NFC", text) for text in texts] if self.nfc else texts

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Return the text of token ids, without special tokens."""
        known = [int(id) for id in ids if int(id) < self.vocab_size]
        return str(self._fast.decode(known, skip_special_tokens=True))

    def pieces(self) -> list[str]:
        """Return the tokens by id, as the file spells them; empty for an unused id."""
        by_id = {id: piece for piece, id in self._fast.get_vocab().items()}
        return [by_id.get(id, "") for id in range(self.vocab_size)]

    def parts(self, piece: str) -> list[int]:
        """Return the token ids of a token of another tokenizer, as within a text."""
        return [int(token.id) for token in self._fast.model.tokenize(piece)]

    def with_new_pieces(self, lines: Iterator[str], wanted: int) -> str:
        """Return the file with `wanted` tokens: its own, then those that it learns from `lines`.

        Raises `InputError` if it is not a byte-level BPE, or the text has too few tokens.
        """
        from tokenizers import Tokenizer, models, pre_tokenizers, trainers

        values = json.loads(self._fast.to_str())
        model = values["model"]
        if model["type"] != "BPE" or "ByteLevel" not in self._decoder:
            raise InputError(
                f"{self.path} is not a byte-level BPE; only those and SentencePiece models "
                "(tokenizer.model) can be extended"
            )
        learner = Tokenizer(models.BPE())
        learner.normalizer = self._fast.normalizer
        learner.pre_tokenizer = self._fast.pre_tokenizer
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        learner.train_from_iterator(
            lines,
            trainers.BpeTrainer(vocab_size=wanted, initial_alphabet=alphabet, show_progress=False),
        )
        vocabulary, taken = model["vocab"], self._fast.get_vocab()
        found: list[list[str]] = []
        for a, b in json.loads(learner.to_str())["model"]["merges"]:
            # Merges are in order of rank: the parts of a token precede it.
            if a + b not in taken and a in vocabulary and b in vocabulary:
                vocabulary[a + b] = taken[a + b] = self.vocab_size + len(found)
                found.append([a, b])
                if len(found) == wanted - self.vocab_size:
                    break
        check_found(len(found), wanted, self.vocab_size)
        model["merges"] += found
        return json.dumps(values, ensure_ascii=False)

    def texts(self) -> list[str]:
        """Return the text of each token; empty for special tokens."""
        specials = {id for id, t in self._fast.get_added_tokens_decoder().items() if t.special}
        return ["" if id in specials else self._fast.decode([id]) for id in range(self.vocab_size)]

    def token_bytes(self) -> np.ndarray:
        """Return the UTF-8 bytes of each token, int32 [padded_vocab_size]; 0 for special tokens."""
        added = self._fast.get_added_tokens_decoder()
        result = np.zeros(self.padded_vocab_size, np.int32)
        for piece, id in self._fast.get_vocab().items():
            if id in added:  # Spelt as in a text.
                result[id] = 0 if added[id].special else len(piece.encode())
            elif "ByteLevel" in self._decoder:
                result[id] = len(piece)  # Each character represents a byte.
            elif len(piece) == 6 and piece.startswith("<0x"):
                result[id] = 1
            else:
                result[id] = len(piece.replace("\u2581", " ").encode())
        return result
