"""SentencePiece model with Hugging Face settings next to it: added tokens, their ids and text.

Token ids and texts are those of transformers' `LlamaTokenizer` (version 5), in whose directories
such files are: an added token is found in the text first, a space precedes the text only at its
start. The merges are those of SentencePiece, also where tokens have equal scores.
"""

import hashlib
import unicodedata
from collections.abc import Iterator, Sequence
from itertools import chain, groupby

import numpy as np
import sentencepiece

from mooshak.errors import InputError
from mooshak.tokenizer.base import check_unicode, padded
from mooshak.tokenizer.metadata import AddedToken, TokenizerMetadata, split_at_added
from mooshak.tokenizer.sentencepiece import SPACE_MARK, SentencePieceTokenizer, parse_proto


class HFSentencePieceTokenizer(SentencePieceTokenizer):
    """A map between text and token ids, from a `tokenizer.model` and the settings next to it."""

    def __init__(self, metadata: TokenizerMetadata) -> None:
        super().__init__(metadata.directory / "tokenizer.model", metadata.nfc)
        self.metadata = metadata
        proto = parse_proto(self._model.serialized_model_proto())
        normalizer = proto.normalizer_spec
        self.prefix = normalizer.add_dummy_prefix and metadata.add_prefix_space is not False
        """True if a space precedes a text."""
        normalizer.add_dummy_prefix = False
        model = proto.SerializeToString()
        self._model_inside = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.added = self._place()
        """Added tokens by id."""
        self._ids = {token.content: id for id, token in self.added.items()}
        known = super().pieces()
        if others := {i: t for i, t in self.added.items() if t.content not in known[i : i + 1]}:
            own = repr(sorted(others.items())).encode()
            self.fingerprint = hashlib.sha256(self.fingerprint.encode() + own).hexdigest()
        self.vocab_size = max(self.vocab_size, 1 + max(self.added, default=-1))
        self.padded_vocab_size = padded(self.vocab_size)
        bos_id = self._special("bos", self._model.bos_id())
        eos_id = self._special("eos", self._model.eos_id())
        self.eos_id = eos_id if eos_id >= 0 else metadata.ids.get("eos", -1)
        self.has_bos = bos_id >= 0
        self.bos_id = bos_id if self.has_bos else self.eos_id
        pad_id = self._special("pad", self._model.pad_id())
        self.pad_id = pad_id if pad_id >= 0 else self.eos_id
        self.adds_bos = self.has_bos and metadata.add_bos is not False
        """True if a prompt begins with BOS."""
        self.special_texts = self.special_texts | dict(metadata.names)

    def _place(self) -> dict[int, AddedToken]:
        """Return the added tokens by id. Raises `InputError` for ids that leave a gap."""
        found, end = dict(self.metadata.added), self._model.vocab_size()
        for id in sorted(id for id in found if id >= end):
            if id != end:
                raise InputError(
                    f"{self.path.parent}: the added token {found[id].content!r} has id {id}, but "
                    f"{end} follows the other tokens, which transformers would give it"
                )
            end += 1
        for token in self.metadata.unplaced:
            id = self._model.piece_to_id(token)
            is_known = self._model.id_to_piece(id) == token
            found.setdefault(id if is_known else end, AddedToken(token, special=True))
            end += not is_known
        # As in transformers, special tokens of the model are recognised in a text, too.
        for id, piece in enumerate(super().pieces()):
            if self._model.is_control(id) or self._model.is_unknown(id):
                found.setdefault(id, AddedToken(piece, special=True))
        return dict(sorted(found.items()))

    def _special(self, name: str, own: int) -> int:
        """Return the id of a special token: what the settings name, or that of the model file."""
        token = self.metadata.names.get(name)
        return own if token is None else self.id_of(token)

    def id_of(self, piece: str) -> int:
        return self._ids[piece] if piece in self._ids else super().id_of(piece)

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """Return the token ids of a text; with `bos`, also the special tokens of the settings."""
        (ids,) = self.encode_batch([text])
        ends = eos or (bos and self.metadata.add_eos)
        return [self.bos_id] * (bos and self.adds_bos) + ids + [self.eos_id] * bool(ends)

    def encode_batch(self, texts: list[str], threads: int = 1) -> list[list[int]]:
        if self.nfc:
            texts = [unicodedata.normalize("NFC", text) for text in texts]
        split = [split_at_added(text, self.added) for text in texts]
        parts = [
            self._part(i, part)
            for one in split
            for i, part in enumerate(one)
            if isinstance(part, str)
        ]
        try:
            encoded = iter(self._model_inside.encode(parts, num_threads=threads))
        except (RuntimeError, TypeError):
            check_unicode(texts)
            raise

        def ids_of(parts: Sequence[str | int]) -> Iterator[list[int]]:
            return ([part] if isinstance(part, int) else next(encoded) for part in parts)

        return [list(chain.from_iterable(ids_of(parts))) for parts in split]

    def _part(self, index: int, text: str) -> str:
        """Return a part of a text with the space before it."""
        has_prefix = self.prefix and (not index or self.metadata.legacy)
        return f" {text}" if has_prefix and not text.startswith((" ", SPACE_MARK)) else text

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Return the text of token ids, without special tokens."""
        pieces = self.check_ids(ids)
        shown = (id for id in pieces if not (id in self.added and self.added[id].special))
        text = ""
        for is_added, group in groupby(shown, self.added.__contains__):
            if is_added:
                text += "".join(self.added[id].content for id in group)
            else:
                text += self._model_inside.decode(list(group))
        return text.removeprefix(" ") if self.prefix else text

    def pieces(self) -> list[str]:
        own = super().pieces()
        own += [""] * (self.vocab_size - len(own))
        for id, token in self.added.items():
            own[id] = token.content
        return own

    def texts(self) -> list[str]:
        own = super().texts()
        own += [""] * (self.vocab_size - len(own))
        for id, token in self.added.items():
            own[id] = "" if token.special else token.content
        return own
