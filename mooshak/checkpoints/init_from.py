"""Initial weights from another checkpoint (`init.from`), with rows for added tokens."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import sentencepiece

from mooshak.checkpoints.base import FULL_SLICE, Checkpoint, row_chunks
from mooshak.checkpoints.resume import check_model
from mooshak.config.sections import Config
from mooshak.errors import InputError
from mooshak.tokenizer.base import Tokenizer
from mooshak.tokenizer.extend import read_proto
from mooshak.tokenizer.files import find_tokenizer
from mooshak.tokenizer.hf_tokenizer import HFTokenizer
from mooshak.tokenizer.load import open_tokenizer

VOCABULARY = ("embeddings.weight", "lm_head.weight")
"""The parameters that have a row for each piece."""


def init_checkpoint(config: Config, source: Checkpoint, tokenizer: Tokenizer) -> Checkpoint:
    """The weights of `init.from`, with rows for the pieces that the run's tokenizer has besides.

    Raises `InputError` where they are of another model.
    """
    rows, wanted = source.model.vocab_size, config.model.vocab_size
    grown = replace(source.model, vocab_size=max(rows, wanted))
    if grown != config.model:
        check_model(source.path, source.model, config)
    along = source.tokenizer_files
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
    if isinstance(tokenizer, HFTokenizer):
        ids = [tokenizer.parts(piece) for piece in pieces[before:]]
    else:
        proto = read_proto(old)
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

    def read(key: str, rows: slice = FULL_SLICE) -> np.ndarray:
        if key not in VOCABULARY:
            return source.read(key, rows)
        dtype, shape = tensors[key]
        result = np.empty(shape, dtype)
        result[:n_rows] = source.read(key)
        total = sum(
            result[part].astype(np.float64).sum(0)
            for part in row_chunks((dtype, (n_rows, *shape[1:])))
        )
        result[n_rows:] = (total / n_rows).astype(dtype)
        for row, parts in ((row, parts) for row, parts in enumerate(ids, before) if parts):
            result[row] = result[parts].astype(np.float64).mean(0).astype(dtype)
        return result[rows]

    model = replace(source.model, vocab_size=vocab_size)
    return replace(
        source, model=model, tensors=tensors, read=read, trainer_state=None, checksums={}
    )
