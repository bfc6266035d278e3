"""Train a SentencePiece tokenizer on the sources of a configuration."""

import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sentencepiece

from mooshak.config.sections import Config
from mooshak.corpus.filters import in_validation
from mooshak.corpus.readers import documents
from mooshak.errors import InputError, require
from mooshak.files import locked, write_atomically
from mooshak.tokenizer.base import Tokenizer
from mooshak.tokenizer.load import open_tokenizer
from mooshak.tokenizer.sentencepiece import CHAT_MARKERS, SPACE_MARK, parse_proto

# SentencePiece splits only the digits 0-9. A separate line for each Devanagari digit has the same
# effect: no token with two of them occurs.
_LINE_ENDS = re.compile("\n|(?<=[०-९])|(?=[०-९])")
# Maximum line length of the training text, in characters of at most 4 bytes.
_LINE = 4096


def load_or_train_tokenizer(config: Config) -> Tokenizer:
    """Return the tokenizer of a configuration, after training it if its file is missing.

    Raises `InputError` if it does not fit the vocabulary of the model, or cannot be trained.
    """
    path = Path(config.tokenizer.path)
    if not path.exists():
        _check_trainable(config)
        with locked(path.with_name(f".{path.name}.lock")):
            if not path.exists():  # Another process may have trained it meanwhile.
                train(config)
    tokenizer = open_tokenizer(path)
    require(
        tokenizer.eos_id >= 0,
        f"tokenizer {path} has no end token, which separates documents; name its eos_token in a "
        "tokenizer_config.json next to it",
    )
    # A model from elsewhere may have more rows than tokens.
    spare = bool(config.init.from_) and tokenizer.vocab_size <= config.model.vocab_size
    if tokenizer.padded_vocab_size != config.model.vocab_size and not spare:
        raise InputError(
            f"tokenizer {path} has {tokenizer.vocab_size} tokens, model.vocab_size is "
            f"{config.model.vocab_size}; set model.vocab_size to {tokenizer.padded_vocab_size}, "
            "or delete the tokenizer and train it with another tokenizer.vocab_size"
        )
    return tokenizer


def train(config: Config) -> None:
    """Train a tokenizer on the text of the sources and write it to `tokenizer.path`."""
    _check_trainable(config)
    write_atomically(Path(config.tokenizer.path), trained_model(config))


def _check_trainable(config: Config) -> None:
    """Raise `InputError` if `tokenizer.path` can only be an existing file."""
    require(
        not config.init.from_ and Path(config.tokenizer.path).suffix != ".json",
        f"tokenizer.path {config.tokenizer.path}: only a SentencePiece model of a run without "
        "init.from is trained; name an existing file, or extend that of init.from",
    )


def trained_model(config: Config) -> bytes:
    """Train a tokenizer on the text of the sources; return its model file.

    The same text gives the same file, bit for bit. Raises `InputError` if the sources cannot be
    read, or `tokenizer.vocab_size` does not fit their text.
    """
    model = _trained(config)
    # Text without spaces, such as a list of words, would leave no token for them: they would be
    # encoded as the bytes of SentencePiece's mark, and decoded to it.
    if any(piece.piece == SPACE_MARK for piece in parse_proto(model).pieces):
        return model
    return _trained(config, required_chars=SPACE_MARK)


def _trained(config: Config, required_chars: str = "") -> bytes:
    """Train a tokenizer whose tokens include the characters `required_chars`."""
    settings, model = config.tokenizer, io.BytesIO()
    required: dict[str, Any] = {"required_chars": required_chars} if required_chars else {}
    lines = 0
    unreadable: list[InputError | OSError] = []

    def counted() -> Iterator[str]:
        nonlocal lines
        try:
            for line in training_lines(config):
                lines += 1
                yield line
        except (InputError, OSError) as error:  # The trainer would turn it into a RuntimeError.
            unreadable.append(error)

    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=counted(),
            model_writer=model,
            model_type="bpe",
            vocab_size=settings.vocab_size,
            character_coverage=settings.character_coverage,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            split_digits=True,
            max_sentence_length=4 * _LINE,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3,
            control_symbols=list(CHAT_MARKERS),
            minloglevel=2,
            **required,
        )
    except RuntimeError as error:
        if not lines and not unreadable:
            raise InputError("data.sources have no text to train on; check their paths") from None
        if unreadable:
            raise unreadable[0] from None
        wanted = f"tokenizer.vocab_size {settings.vocab_size}"
        if match := re.search(r"too high .* value <= (\d+)", str(error)):
            raise InputError(
                f"{wanted} is too large for the text of the sources, which has at most {match[1]} "
                "tokens: lower it, or add text"
            ) from error
        if match := re.search(r"required_chars\. \d+ vs (\d+)", str(error)):
            raise InputError(
                f"{wanted} is too small: bytes, specials and the characters of the text are "
                f"{match[1]} tokens; raise it, or lower tokenizer.character_coverage"
            ) from error
        raise
    if unreadable:
        raise unreadable[0]
    return model.getvalue()


def training_lines(config: Config) -> Iterator[str]:
    """Yield lines of the training documents: of each source, its share of the bytes by weight."""
    weights = sum(source.weight for source in config.data.sources)
    for source in config.data.sources:
        left = int(config.tokenizer.training_bytes * source.weight / weights)
        for text in documents(source, config):
            if in_validation(text, config.data.validation_fraction):
                continue
            content = text.encode()[:left]
            for line in _LINE_ENDS.split(content.decode(errors="ignore")):
                # The trainer would drop a line that is too long: split it instead.
                yield from (line[at : at + _LINE] for at in range(0, len(line), _LINE))
            left -= len(content)
            if left <= 0:
                break
