"""Extend the vocabulary of a tokenizer: new tokens, appended after the existing ones.

A model that encodes Hindi byte by byte can then continue its pretraining with Hindi tokens;
`mooshak.checkpoints.init_from` initialises the new rows of its embedding.
"""

from pathlib import Path

from mooshak.config.sections import Config
from mooshak.errors import InputError
from mooshak.files import write_atomically
from mooshak.tokenizer import train
from mooshak.tokenizer.base import Tokenizer, check_found
from mooshak.tokenizer.files import find_tokenizer, standard_name, tokenizer_files
from mooshak.tokenizer.hf_tokenizer import HFTokenizer
from mooshak.tokenizer.load import open_tokenizer
from mooshak.tokenizer.sentencepiece import parse_proto


def extend(config: Config) -> None:
    """Extend the tokenizer of `init.from` with tokens of the sources; write `tokenizer.path`.

    The result has `tokenizer.vocab_size` tokens; the old ones keep their ids. New tokens are those
    that a tokenizer of this size, trained on the sources, has and the old one lacks; their merges
    come last. The settings next to a `tokenizer.json` are copied. Raises `InputError` if
    `tokenizer.path` exists, or the sources have too few new tokens.
    """
    path, wanted = Path(config.tokenizer.path), config.tokenizer.vocab_size
    if not config.init.from_:
        raise InputError("there is no tokenizer to extend; name its directory with --init.from")
    if path.exists():
        raise InputError(f"{path} exists already; remove it or choose another tokenizer.path")
    own = Path(config.init.from_) / standard_name(path)  # Of a directory with both kinds.
    old = open_tokenizer(own if own.is_file() else find_tokenizer(Path(config.init.from_), None))
    if wanted <= old.vocab_size:
        raise InputError(
            f"tokenizer.vocab_size {wanted} must be more than the {old.vocab_size} tokens of "
            f"{config.init.from_}"
        )
    if not isinstance(old, HFTokenizer):
        write_atomically(path, _with_new_pieces(old, config))
        return
    if path.name != "tokenizer.json":
        raise InputError(f"{path}: {old.path} is extended to a DIRECTORY/tokenizer.json; name one")
    extended = old.with_new_pieces(train.training_lines(config), wanted)
    files = tokenizer_files(old.path.parent)
    for name in SETTINGS & files.keys():
        write_atomically(path.parent / name, files[name].read_bytes())
    write_atomically(path, extended)


SETTINGS = {
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
}
"""Settings of a `tokenizer.json`, in the same directory."""


def _with_new_pieces(old: Tokenizer, config: Config) -> bytes:
    """Return the SentencePiece model `old` with new tokens, up to `tokenizer.vocab_size`."""
    proto = parse_proto(old.path.read_bytes())
    # Tokens that only other files have keep their ids.
    for id in range(len(proto.pieces), old.vocab_size):
        piece, text = old.pieces()[id], old.texts()[id]
        kind = proto.SentencePiece.USER_DEFINED if text else proto.SentencePiece.CONTROL
        proto.pieces.add(piece=piece, score=0.0, type=kind)
    if "eos" in old.special_texts:
        proto.trainer_spec.eos_piece, proto.trainer_spec.eos_id = (
            old.special_texts["eos"],
            old.eos_id,
        )
    known = {piece.piece for piece in proto.pieces}
    trained = parse_proto(train.trained_model(config))
    # Tokens are in order of their merges: the parts of a token precede it.
    found = [p.piece for p in trained.pieces if p.type == p.NORMAL and p.piece not in known]
    wanted = config.tokenizer.vocab_size
    check_found(len(found), wanted, old.vocab_size)
    lowest = min(piece.score for piece in proto.pieces)
    for rank, piece in enumerate(_with_letters(found, known, wanted - old.vocab_size), 1):
        proto.pieces.add(piece=piece, score=lowest - rank)
    proto.trainer_spec.vocab_size = wanted
    return bytes(proto.SerializeToString())


def _with_letters(found: list[str], known: set[str], room: int) -> list[str]:
    """Return the first tokens that fit in `room`, each after its letters that are new.

    SentencePiece merges letters that are no tokens; the `tokenizers` library does not.
    """
    chosen: dict[str, None] = {}
    for piece in found:
        parts = dict.fromkeys([*piece, piece])
        new = [part for part in parts if part not in known and part not in chosen]
        if len(chosen) + len(new) <= room:
            chosen |= dict.fromkeys(new)
    return list(chosen)
