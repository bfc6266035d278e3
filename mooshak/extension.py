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

from mooshak import interchange
from mooshak import tokenizer as tokenizers
from mooshak.checkpoints import check_model
from mooshak.config import Config
from mooshak.errors import InputError
from mooshak.fast_tokenizer import FastTokenizer
from mooshak.files import write_atomically
from mooshak.interchange import EVERY, Checkpoint, blocks
from mooshak.prompts import find_tokenizer
from mooshak.tokenizer import Tokenizer, check_found, open_tokenizer

VOCABULARY = ("embeddings.weight", "lm_head.weight")
"""The parameters that have a row for each piece."""


def extend(config: Config) -> None:
    """Add pieces of the sources' text to the tokenizer of `init.from`; write `tokenizer.path`.

    It gets `tokenizer.vocab_size` pieces in all. The old ones keep their ids, and the new ones are
    merged after them: those that a tokenizer of that size, trained on the sources, has besides. A
    `tokenizer.json` has its settings beside it: they come along. Raises `InputError` where
    `tokenizer.path` exists, or there are not as many pieces.
    """
    path, wanted = Path(config.tokenizer.path), config.tokenizer.vocab_size
    if not config.init.from_:
        raise InputError("there is no tokenizer to extend; name its directory with --init.from")
    if path.exists():
        raise InputError(f"{path} exists already; remove it or choose another tokenizer.path")
    old = open_tokenizer(find_tokenizer(Path(config.init.from_), None))
    if wanted <= old.vocab_size:
        raise InputError(
            f"tokenizer.vocab_size {wanted} must be more than the {old.vocab_size} pieces that "
            f"{config.init.from_} has"
        )
    if not isinstance(old, FastTokenizer):
        write_atomically(path, _with_new_pieces(old, config))
        return
    if path.name != "tokenizer.json":
        raise InputError(f"{path}: {old.path} grows into another DIRECTORY/tokenizer.json; name it")
    grown = old.with_new_pieces(tokenizers.training_lines(config), wanted)
    beside = interchange.companions(old.path.parent)
    for name in SETTINGS & beside.keys():
        write_atomically(path.parent / name, beside[name].read_bytes())
    write_atomically(path, grown)


SETTINGS = {
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
}
"""Files that say how a `tokenizer.json` beside them is used."""


def _with_new_pieces(old: Tokenizer, config: Config) -> bytes:
    """The SentencePiece model `old` with as many more pieces as the configuration wants."""
    proto = _proto(old.path)
    known = {piece.piece for piece in proto.pieces}
    trained = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    trained.ParseFromString(tokenizers.trained(config))
    # Pieces come by rank: what a piece is merged from stands before it.
    found = [p.piece for p in trained.pieces if p.type == p.NORMAL and p.piece not in known]
    wanted = config.tokenizer.vocab_size
    check_found(len(found), wanted, old.vocab_size)
    lowest = min(piece.score for piece in proto.pieces)
    for rank, piece in enumerate(found[: wanted - old.vocab_size], 1):
        proto.pieces.add(piece=piece, score=lowest - rank)
    proto.trainer_spec.vocab_size = wanted
    return bytes(proto.SerializeToString())


def initial(config: Config, source: Checkpoint, tokenizer: Tokenizer) -> Checkpoint:
    """The weights of `init.from`, with rows for the pieces that the run's tokenizer has besides.

    Raises `InputError` where they are of another model.
    """
    rows, wanted = source.model.vocab_size, config.model.vocab_size
    grown = replace(source.model, vocab_size=max(rows, wanted))
    if grown != config.model:
        check_model(source.path, source.model, config)
    along = source.companions
    old = along.get("tokenizer.model") or along.get("tokenizer.json")
    if rows == wanted and (old is None or open_tokenizer(old).vocab_size >= tokenizer.vocab_size):
        return source
    old = old or find_tokenizer(Path(config.init.from_), None)
    return with_new_rows(source, old, tokenizer, wanted)


def with_new_rows(source: Checkpoint, old: Path, new: Tokenizer, vocab_size: int) -> Checkpoint:
    """The checkpoint with `vocab_size` rows in its embedding and its output head.

    Row i of a new piece is the mean of the rows of the pieces that `old` writes its text with; rows
    that stand for no text are the mean of all. Raises `InputError` where `new` does not begin as
    `old`.
    """
    tokenizer = open_tokenizer(old)
    before, pieces = tokenizer.vocab_size, new.pieces()
    if type(tokenizer) is not type(new) or tokenizer.pieces() != pieces[:before]:
        raise InputError(f"{new.path} does not begin with the pieces of {old}; extend it from that")
    if isinstance(tokenizer, FastTokenizer):
        ids = [tokenizer.parts(piece) for piece in pieces[before:]]
    else:
        proto = _proto(old)
        # The text of a piece stands within a text: no space is put before it.
        proto.normalizer_spec.add_dummy_prefix = False
        inside = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
        ids = inside.encode(new.texts()[before:])
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
        for row, parts in ((row, parts) for row, parts in enumerate(ids, before) if parts):
            result[row] = result[parts].astype(np.float64).mean(0).astype(dtype)
        return result[rows]

    model = replace(source.model, vocab_size=vocab_size)
    return replace(
        source, model=model, tensors=tensors, read=read, trainer_state=None, checksums={}
    )


def _proto(path: Path) -> Any:
    """The message of a SentencePiece model."""
    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    proto.ParseFromString(path.read_bytes())
    return proto
