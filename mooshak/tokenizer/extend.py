"""A vocabulary that grows: new pieces in an old tokenizer, and rows for them in the embeddings.

So a model that reads Hindi byte by byte continues its pretraining with Hindi pieces. A new row is
the mean of the rows of the old pieces that its text was written with; computed here, once, it has
the same bits in both frameworks.

    python -m mooshak.tokenizer extend --init.from LLAMA --tokenizer.path hindi.model \
        --tokenizer.vocab_size 40000 --config CONFIG
"""

from pathlib import Path
from typing import Any

from sentencepiece import sentencepiece_model_pb2

from mooshak.config.sections import Config
from mooshak.errors import InputError
from mooshak.files import write_atomically
from mooshak.tokenizer import train
from mooshak.tokenizer.base import Tokenizer, check_found
from mooshak.tokenizer.files import find_tokenizer, tokenizer_files
from mooshak.tokenizer.hf_tokenizer import HFTokenizer
from mooshak.tokenizer.load import open_tokenizer


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
    if not isinstance(old, HFTokenizer):
        write_atomically(path, _with_new_pieces(old, config))
        return
    if path.name != "tokenizer.json":
        raise InputError(f"{path}: {old.path} grows into another DIRECTORY/tokenizer.json; name it")
    grown = old.with_new_pieces(train.training_lines(config), wanted)
    beside = tokenizer_files(old.path.parent)
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
    proto = read_proto(old.path)
    known = {piece.piece for piece in proto.pieces}
    trained = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    trained.ParseFromString(train.trained_model(config))
    # Pieces come by rank: what a piece is merged from stands before it.
    found = [p.piece for p in trained.pieces if p.type == p.NORMAL and p.piece not in known]
    wanted = config.tokenizer.vocab_size
    check_found(len(found), wanted, old.vocab_size)
    lowest = min(piece.score for piece in proto.pieces)
    for rank, piece in enumerate(found[: wanted - old.vocab_size], 1):
        proto.pieces.add(piece=piece, score=lowest - rank)
    proto.trainer_spec.vocab_size = wanted
    return bytes(proto.SerializeToString())


def read_proto(path: Path) -> Any:
    """The message of a SentencePiece model."""
    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    proto.ParseFromString(path.read_bytes())
    return proto
