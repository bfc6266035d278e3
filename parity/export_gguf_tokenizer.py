"""Tokenizer of a GGUF file: vocabulary, special tokens, template; check of llama.cpp's token ids.

llama.cpp tokenizes with the tokens, scores and types in the file: `llama_cpp_ids` is its rule.
"""

import unicodedata
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import gguf

from mooshak.checkpoints.base import Checkpoint
from mooshak.config.model import ModelConfig
from mooshak.errors import InputError
from mooshak.tokenizer.base import Tokenizer
from mooshak.tokenizer.chat_template import find_template
from mooshak.tokenizer.load import open_tokenizer
from mooshak.tokenizer.sentencepiece import SPACE_MARK, SentencePieceTokenizer
from mooshak.tokenizer.sentencepiece_hf import HFSentencePieceTokenizer
from parity.export_check import samples, tokenizer_differences
from parity.export_tokenizer import check_convertible, source_tokenizer

ADDED_SCORE, UNUSED_SCORE = -1000.0, -10000.0


@dataclass(frozen=True)
class GGUFTokenizer:
    """The tokenizer of a checkpoint, and the SentencePiece model that a file gets."""

    ours: Tokenizer
    """The tokenizer with which we generate: of a directory with both files, its tokenizer.json."""
    model: SentencePieceTokenizer
    proto: Any
    """Protobuf message of the model."""

    @property
    def prefix(self) -> bool:
        """True if a space precedes a text."""
        if isinstance(self.model, HFSentencePieceTokenizer):
            return self.model.prefix
        return bool(self.proto.normalizer_spec.add_dummy_prefix)


def open_gguf_tokenizer(source: Checkpoint) -> GGUFTokenizer:
    """Open the tokenizer of a checkpoint. Raises `InputError` if llama.cpp has no equal of it."""
    file = source.tokenizer_files.get("tokenizer.model")
    if file is None:
        raise InputError(f"{source.path} has no tokenizer.model; GGUF needs one")
    model, ours = open_tokenizer(file), source_tokenizer(source)
    assert ours is not None and isinstance(model, SentencePieceTokenizer)
    return GGUFTokenizer(ours, model, check_convertible(model))


def add_tokenizer(writer: gguf.GGUFWriter, tokenizer: GGUFTokenizer, model: ModelConfig) -> None:
    """Add the tokens; rows of the embedding beyond them are unused tokens."""
    ours, kinds = tokenizer.ours, gguf.TokenType
    # SentencePiece and GGUF use the same numbers for token types.
    rows = [(p.piece, p.score, int(p.type)) for p in tokenizer.proto.pieces]
    added = getattr(tokenizer.model, "added", {})
    for id, token in added.items():
        kind = kinds.CONTROL if token.special else kinds.USER_DEFINED
        rows += [("", 0.0, 0)] * (id + 1 - len(rows))
        is_unknown = rows[id][2] == kinds.UNKNOWN
        rows[id] = (token.content, ADDED_SCORE, int(kinds.UNKNOWN if is_unknown else kind))
    spare = range(len(rows), model.vocab_size)
    rows += [(f"[PAD{i}]", UNUSED_SCORE, int(kinds.UNUSED)) for i in spare]
    rows = rows[: model.vocab_size]
    writer.add_tokenizer_model("llama")
    writer.add_token_list([piece for piece, _, _ in rows])
    writer.add_token_scores([score for _, score, _ in rows])
    writer.add_token_types([kind for _, _, kind in rows])
    writer.add_add_space_prefix(tokenizer.prefix)
    around = ours.encode("", bos=True)
    has_bos = around[:1] == [ours.bos_id]
    writer.add_add_bos_token(has_bos)
    writer.add_add_eos_token(around[has_bos:] == [ours.eos_id])
    for add, name, id in (
        (writer.add_bos_token_id, "bos", ours.bos_id),
        (writer.add_eos_token_id, "eos", ours.eos_id),
        (writer.add_unk_token_id, "unk", tokenizer.proto.trainer_spec.unk_id),
        (writer.add_pad_token_id, "pad", ours.pad_id),
    ):
        if name in ours.special_texts and 0 <= id < model.vocab_size:
            add(id)
    with suppress(InputError):  # There is none.
        writer.add_chat_template(find_template(ours))


def gguf_tokenizer_differences(read: gguf.GGUFReader, tokenizer: GGUFTokenizer) -> list[str]:
    """Return how the ids of llama.cpp, from what a file says, differ from ours."""

    def field(name: str) -> Any:
        found = read.get_field(f"tokenizer.ggml.{name}")
        return None if found is None else found.contents()

    rows = list(zip(field("tokens"), field("scores"), field("token_type"), strict=True))
    bos = [field("bos_token_id")] if field("add_bos_token") else []
    eos = [field("eos_token_id")] if field("add_eos_token") else []
    prefix, nfc = field("add_space_prefix"), tokenizer.ours.nfc
    # Tokens that llama.cpp finds in a text before it merges; after one it writes the prefix again.
    found_first = [piece for piece, _, kind in rows if kind == gguf.TokenType.USER_DEFINED]
    texts = [
        # The mark is a space to llama.cpp; a space at the start of a text follows its prefix.
        text.lstrip(" ") if prefix else text
        for text in samples(tokenizer.ours)
        if not any(piece in text for piece in (SPACE_MARK, *found_first))
    ]
    if nfc:  # llama.cpp normalises nothing: the text of its caller must be in NFC.
        texts = [unicodedata.normalize("NFC", text) for text in texts]
    ids = {piece: id for id, (piece, _, kind) in enumerate(rows) if kind != gguf.TokenType.UNUSED}

    def encode(text: str) -> list[int]:
        text = " " + text if prefix and text else text
        return [*bos, *llama_cpp_ids(text, ids, rows), *eos]

    found = tokenizer_differences(tokenizer.ours, texts, encode)
    for id, token in getattr(tokenizer.model, "added", {}).items():
        if id < len(rows) and rows[id][0] != token.content:
            found.append(f"token {id} is {rows[id][0]!r}, not {token.content!r}")
    return found


def llama_cpp_ids(
    text: str, ids: dict[str, int], rows: Sequence[tuple[str, float, int]]
) -> list[int]:
    """Return the ids of a text by llama.cpp's rule: merge the adjacent pair of the highest score.

    `ids` is token -> id; `rows` has the text, score and type of each token.
    """
    parts = list(text.replace(" ", SPACE_MARK))
    while True:
        scored = [
            (rows[ids[a + b]][1], -i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in ids
        ]
        if not scored:
            break
        at = -max(scored)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    result: list[int] = []
    for part in parts:
        if part in ids:
            result.append(ids[part])
        else:
            unknown = next(i for i, row in enumerate(rows) if row[2] == gguf.TokenType.UNKNOWN)
            result += [ids.get(f"<0x{byte:02X}>", unknown) for byte in part.encode()]
    return result
