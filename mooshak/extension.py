"""A vocabulary that grows: new pieces in an old tokenizer, and rows for them in the embeddings.

So a model that reads Hindi byte by byte continues its pretraining with Hindi pieces. A new row is
the mean of the rows of the old pieces that its text was written with; computed here, once, it has
the same bits in both frameworks.

    python -m mooshak.tokenizer extend --init.from LLAMA --tokenizer.path hindi.model \
        --tokenizer.vocab_size 40000 --config CONFIG
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from mooshak import tokenizer as tokenizers
from mooshak.checkpoints import check_model
from mooshak.config import Config
from mooshak.errors import InputError
from mooshak.files import write_atomically
from mooshak.interchange import EVERY, Checkpoint, blocks
from mooshak.prompts import find_tokenizer
from mooshak.tokenizer import Tokenizer

VOCABULARY = ("embeddings.weight", "lm_head.weight")
"""The parameters that have a row for each piece."""


def extend(config: Config) -> None:
    """Add pieces of the sources' text to the tokenizer of `init.from`; write `tokenizer.path`.

    It gets `tokenizer.vocab_size` pieces in all. The old ones keep their ids, and the new ones are
    merged after them: those that a tokenizer of that size, trained on the sources, has besides.
    Raises `InputError` where `tokenizer.path` exists, or there are not as many pieces.
    """
    path, wanted = Path(config.tokenizer.path), config.tokenizer.vocab_size
    if not config.init.from_:
        raise InputError("there is no tokenizer to extend; name its directory with --init.from")
    if path.exists():
        raise InputError(f"{path} exists already; remove it or choose another tokenizer.path")
    old = _proto(find_tokenizer(Path(config.init.from_), None))
    if wanted <= len(old.pieces):
        raise InputError(
            f"tokenizer.vocab_size {wanted} must be more than the {len(old.pieces)} pieces that "
            f"{config.init.from_} has"
        )
    known = {piece.piece for piece in old.pieces}
    trained = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    trained.ParseFromString(tokenizers.trained(config))
    # Pieces come by rank: what a piece is merged from stands before it.
    found = [p.piece for p in trained.pieces if p.type == p.NORMAL and p.piece not in known]
    missing = wanted - len(old.pieces)
    if len(found) < missing:
        raise InputError(
            f"the sources have {len(found)} new pieces for {missing} places; lower "
            f"tokenizer.vocab_size to {len(old.pieces) + len(found)}, or add text"
        )
    lowest = min(piece.score for piece in old.pieces)
    for rank, piece in enumerate(found[:missing], 1):
        old.pieces.add(piece=piece, score=lowest - rank)
    old.trainer_spec.vocab_size = wanted
    write_atomically(path, old.SerializeToString())


def initial(config: Config, source: Checkpoint, tokenizer: Tokenizer) -> Checkpoint:
    """The weights of `init.from`, with rows for the pieces that the run's tokenizer has besides.

    Raises `InputError` where they are of another model.
    """
    rows, wanted = source.model.vocab_size, config.model.vocab_size
    grown = replace(source.model, vocab_size=max(rows, wanted))
    if grown != config.model:
        check_model(source.path, source.model, config)
    old = source.companions.get("tokenizer.model")
    if rows == wanted and (old is None or Tokenizer(old).vocab_size >= tokenizer.vocab_size):
        return source
    old = old or find_tokenizer(Path(config.init.from_), None)
    return with_new_rows(source, old, tokenizer, wanted)


def with_new_rows(source: Checkpoint, old: Path, new: Tokenizer, vocab_size: int) -> Checkpoint:
    """The checkpoint with `vocab_size` rows in its embedding and its output head.

    Row i of a new piece is the mean of the rows of the pieces that `old` writes its text with; rows
    that no piece has are the mean of all. Raises `InputError` where `new` does not begin as `old`.
    """
    proto = _proto(old)
    # The text of a piece stands within a text: no space is put before it.
    proto.normalizer_spec.add_dummy_prefix = False
    pieces = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    texts = new.texts()
    before = pieces.vocab_size()
    if [p.piece for p in proto.pieces] != [p.piece for p in _proto(new.path).pieces][:before]:
        raise InputError(f"{new.path} does not begin with the pieces of {old}; extend it from that")
    ids = pieces.encode(texts[before:])
    n_rows = source.model.vocab_size
    tensors = {
        key: (dtype, (vocab_size, *shape[1:]) if key in VOCABULARY else shape)
        for key, (dtype, shape) in source.tensors.items()
        if key in source.model.parameter_shapes()
    }

    def read(key: str, rows: slice = EVERY) -> np.ndarray:
        if key not in VOCABULARY:
            return source.read(key, rows)
        dtype, shape = tensors[key]
        result = np.empty(shape, dtype)
        result[:n_rows] = source.read(key)
        total = sum(
            result[part].astype(np.float64).sum(0) for part in blocks((dtype, (n_rows, *shape[1:])))
        )
        result[n_rows:] = (total / n_rows).astype(dtype)
        for row, parts in enumerate(ids, before):
            result[row] = result[parts].astype(np.float64).mean(0).astype(dtype)
        return result[rows]

    model = replace(source.model, vocab_size=vocab_size)
    return replace(
        source, model=model, tensors=tensors, read=read, trainer_state=None, checksums={}
    )


def _proto(path: Path) -> Any:
    """The message of a SentencePiece model. Raises `InputError` if the file is none."""
    if path.suffix == ".json":
        raise InputError(f"{path}: only a SentencePiece model (tokenizer.model) can be extended")
    tokenizer = Tokenizer(path)
    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    proto.ParseFromString(tokenizer.path.read_bytes())
    return proto
