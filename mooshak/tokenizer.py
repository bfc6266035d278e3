"""The tokenizer: text to token ids and back, without loss, for every Unicode string.

A SentencePiece BPE model (arXiv:1808.06226) without normalisation, dummy prefix or whitespace
clean-up; characters without a piece become their UTF-8 bytes. So `decode(encode(text)) == text`,
which the models published for Hindi do not give: NFKC changes Devanagari. The specials and the
chat markers are control symbols: no text encodes to them.

    python -m mooshak.tokenizer train  --config configs/demo.yaml
    python -m mooshak.tokenizer extend --init.from LLAMA --config C --tokenizer.path new.model
    python -m mooshak.tokenizer encode --config configs/demo.yaml "नमस्ते दुनिया"
    python -m mooshak.tokenizer decode --tokenizer.path tokenizer.model 1 302 17
    python -m mooshak.tokenizer report --config configs/demo.yaml
"""

import hashlib
import io
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path

import numpy as np
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from mooshak.config import Config, parse, parser
from mooshak.errors import InputError, command
from mooshak.files import locked, write_atomically
from mooshak.tables import print_table

CHAT_MARKERS = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")

# SentencePiece writes a space as this character. Where the text itself holds it, it must be
# bytes, or decoding would give a space.
_SPACE_MARK = "\u2581"
# SentencePiece splits only numbers in 0-9 into digits. A line of its own for each Devanagari digit
# has the same effect: no piece with two of them is ever seen.
_LINE_ENDS = re.compile("\n|(?<=[०-९])|(?=[०-९])")
# Texts written by a grammar, such as tales, have fewer different words than this; for them words
# are looked up. Others have many that come once, for which that takes longer.
_FEW_WORDS = 16_384
_ACTIONS = ("train", "extend", "encode", "decode", "report")
# Longest line that is shown to the trainer, in characters (at most 4 bytes each).
_LINE = 4096


class Tokenizer:
    """A SentencePiece model file, as a lossless map between text and token ids."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            model = self.path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            raise InputError(
                f"tokenizer {path} is missing; "
                "train it with `python -m mooshak.tokenizer train --config FILE`"
            ) from None
        except IsADirectoryError:
            raise InputError(f"tokenizer {path} is a directory; name the model file") from None
        self.fingerprint = hashlib.sha256(model).hexdigest()
        """SHA-256 of the model file."""
        try:
            # An empty file is a valid message of no pieces.
            self._model = sentencepiece.SentencePieceProcessor(model_proto=model or b"-")
        except RuntimeError:
            raise InputError(
                f"tokenizer {path} is not a SentencePiece model, or is cut short; "
                "delete it and train or copy it again"
            ) from None
        self.vocab_size: int = self._model.vocab_size()
        """Number of pieces."""
        self.padded_vocab_size = -(-self.vocab_size // 64) * 64
        """Number of pieces, rounded up to a multiple of 64: rows of the embedding."""
        self.bos_id: int = self._model.bos_id()
        self.eos_id: int = self._model.eos_id()
        self.pad_id: int = self._model.pad_id() if self._model.pad_id() >= 0 else self.eos_id
        self._words: dict[str, list[int]] = {}
        self._space_mark = [self.id_of(f"<0x{byte:02X}>") for byte in _SPACE_MARK.encode()]

    def id_of(self, piece: str) -> int:
        """The id of a piece, such as `<|user|>`. Raises `InputError` when there is none."""
        id = self._model.piece_to_id(piece)
        if self._model.id_to_piece(id) != piece:
            raise InputError(f"tokenizer {self.path} has no piece {piece}; train one with it")
        return id

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """Token ids of a text, with <s> before it and </s> after it when asked for."""
        ids = self.encode_batch([text], threads=1)[0]
        return [self.bos_id] * bos + ids + [self.eos_id] * eos

    def encode_batch(self, texts: list[str], threads: int = 1) -> list[list[int]]:
        """Token ids of many texts, encoded in parallel."""
        parts = [part for text in texts for part in text.split(_SPACE_MARK)]
        try:
            encoded = self._encode(parts, threads)
        except (RuntimeError, TypeError):
            for text in texts:
                if surrogate := re.search("[\ud800-\udfff]", text):
                    raise InputError(
                        f"the text has a lone surrogate, U+{ord(surrogate[0]):04X}, at character "
                        f"{surrogate.start()}; it is not Unicode text, read it as UTF-8"
                    ) from None
            raise
        if len(parts) == len(texts):
            return encoded
        following = iter(encoded)
        result = []
        for text in texts:
            ids = next(following)
            for _ in range(text.count(_SPACE_MARK)):
                ids += self._space_mark + next(following)
            result.append(ids)
        return result

    def _encode(self, texts: list[str], threads: int) -> list[list[int]]:
        """Token ids of texts without space marks, whose words are looked up where that pays."""
        # SentencePiece works beside the interpreter, on every core; a look-up holds it.
        if len(texts) == 1 or threads > 2 or not self._of_words:
            return self._model.encode(texts, num_threads=threads)
        split, known = [text.split(" ") for text in texts], self._words
        new = list(set().union(*split) - known.keys())
        if len(known) + len(new) > _FEW_WORDS:
            self._of_words, self._words = False, {}
            return self._model.encode(texts, num_threads=threads)
        # A word has the space before it, the first of a text has none.
        within = self._model.encode([" " + word for word in new], num_threads=threads)
        known.update(zip(new, within, strict=True))
        result = self._model.encode([words[0] for words in split], num_threads=threads)
        for ids, words in zip(result, split, strict=True):
            ids.extend(chain.from_iterable(map(known.__getitem__, words[1:])))
        return result

    @cached_property
    def _of_words(self) -> bool:
        """Whether a text's pieces are those of its words: none is merged across a space."""
        proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
        proto.ParseFromString(self._model.serialized_model_proto())
        spec = proto.normalizer_spec
        changes = spec.add_dummy_prefix or spec.remove_extra_whitespaces
        return (
            proto.trainer_spec.model_type == proto.trainer_spec.BPE
            and spec.escape_whitespaces
            and not (changes or spec.precompiled_charsmap)
            and not any(_SPACE_MARK in piece.piece[1:] for piece in proto.pieces)
        )

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of token ids. Incomplete UTF-8 becomes U+FFFD; specials stand for no text."""
        pieces = [int(id) for id in ids]
        if pieces and not 0 <= min(pieces) <= max(pieces) < self.padded_vocab_size:
            raise InputError(
                f"token ids must be in 0 .. {self.padded_vocab_size - 1}, "
                f"got {min(pieces)} .. {max(pieces)}; is this the model's own tokenizer?"
            )
        return self._model.decode([id for id in pieces if id < self.vocab_size])

    def pieces(self) -> list[str]:
        """The pieces by id, as the file writes them."""
        return [self._model.id_to_piece(id) for id in range(self.vocab_size)]

    def texts(self) -> list[str]:
        """The text that each piece stands for; none of specials, and none of single bytes."""
        specials = (self._model.is_byte, self._model.is_control, self._model.is_unknown)
        return [
            ""
            if any(special(id) for special in specials)
            else self._model.id_to_piece(id).replace(_SPACE_MARK, " ")
            for id in range(self.vocab_size)
        ]

    def token_bytes(self) -> np.ndarray:
        """Bytes of text that each id stands for, int32 [padded_vocab_size]; specials have none."""
        result = np.zeros(self.padded_vocab_size, np.int32)
        result[: self.vocab_size] = [
            self._model.is_byte(id) or len(text.encode()) for id, text in enumerate(self.texts())
        ]
        return result


def open_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer in a file: a SentencePiece model, or a `tokenizer.json` of Hugging Face."""
    if Path(path).suffix == ".json":
        from mooshak.fast_tokenizer import FastTokenizer

        return FastTokenizer(path)
    return Tokenizer(path)


def ensure(config: Config) -> Tokenizer:
    """The tokenizer of a configuration, trained first when its file is missing.

    Raises `InputError` when it does not fit the model's vocabulary.
    """
    path = Path(config.tokenizer.path)
    if not path.exists():
        with locked(path.with_name(f".{path.name}.lock")):
            if not path.exists():  # Another process may have trained it while this one waited.
                train(config)
    tokenizer = open_tokenizer(path)
    # A model that was not made here may have rows to spare.
    spare = bool(config.init.from_) and tokenizer.vocab_size <= config.model.vocab_size
    if tokenizer.padded_vocab_size != config.model.vocab_size and not spare:
        raise InputError(
            f"tokenizer {path} has {tokenizer.vocab_size} pieces, the model's vocab_size is "
            f"{config.model.vocab_size}; set model.vocab_size to {tokenizer.padded_vocab_size}, "
            "or delete the tokenizer and train it with another tokenizer.vocab_size"
        )
    return tokenizer


def train(config: Config) -> None:
    """Train a tokenizer on text of the sources and write it to `tokenizer.path`."""
    write_atomically(Path(config.tokenizer.path), trained(config))


def trained(config: Config) -> bytes:
    """The model file of a tokenizer that is trained on text of the sources.

    The same text gives the same file, bit for bit.
    """
    settings, model = config.tokenizer, io.BytesIO()
    lines = 0
    unreadable: list[InputError] = []

    def counted() -> Iterator[str]:
        nonlocal lines
        try:
            for line in training_lines(config):
                lines += 1
                yield line
        except InputError as error:  # The trainer would make a RuntimeError of it.
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
        )
    except RuntimeError as error:
        if not lines and not unreadable:
            raise InputError("data.sources have no text to train on; check their paths") from None
        if unreadable:
            raise unreadable[0] from None
        wanted = f"tokenizer.vocab_size {settings.vocab_size}"
        if match := re.search(r"too high .* value <= (\d+)", str(error)):
            raise InputError(
                f"{wanted} is too large for the text of the sources; at most {match[1]} "
                "pieces can be made of it: lower it, or add text"
            ) from error
        if match := re.search(r"required_chars\. \d+ vs (\d+)", str(error)):
            raise InputError(
                f"{wanted} is too small: bytes, specials and the characters of the text are "
                f"{match[1]} pieces; raise it, or lower tokenizer.character_coverage"
            ) from error
        raise
    if unreadable:
        raise unreadable[0]
    return model.getvalue()


def training_lines(config: Config) -> Iterator[str]:
    """Lines of the training documents: from each source its share by weight of the bytes."""
    from mooshak.data.sources import documents, in_validation

    weights = sum(source.weight for source in config.data.sources)
    for source in config.data.sources:
        left = int(config.tokenizer.training_bytes * source.weight / weights)
        for text in documents(source, config):
            if in_validation(text, config.data.validation_fraction):
                continue
            content = text.encode()[:left]
            for line in _LINE_ENDS.split(content.decode(errors="ignore")):
                # A line that is too long would be dropped by the trainer: cut it instead.
                yield from (line[at : at + _LINE] for at in range(0, len(line), _LINE))
            left -= len(content)
            if left <= 0:
                break


def check_found(found: int, wanted: int, before: int) -> None:
    """Raises `InputError` where the text gives fewer new pieces than an extension wants."""
    if found < wanted - before:
        raise InputError(
            f"the sources have {found} new pieces for {wanted - before} places; lower "
            f"tokenizer.vocab_size to {before + found}, or add text"
        )


def _report(config: Config, tokenizer: Tokenizer, most: int) -> None:
    """Print how many tokens each language costs, and the words that cost the most."""
    from itertools import islice

    from rich.table import Table

    from mooshak.data.sources import documents

    table = Table(title=f"{tokenizer.path}: {tokenizer.vocab_size} pieces")
    for title in ("language", "documents", "bytes per token", "tokens per word", "worst words"):
        table.add_column(title, justify="left" if title in ("language", "worst words") else "right")
    for language in dict.fromkeys(source.language for source in config.data.sources):
        texts = [
            text
            for source in config.data.sources
            if source.language == language
            for text in islice(documents(source, config), most)
        ]
        tokens = sum(map(len, tokenizer.encode_batch(texts)))
        # With the space before it, as a word mostly stands in the text.
        words = Counter(" " + word for text in texts for word in text.split())
        if not tokens or not words:
            raise InputError(f"the sources have no text in language {language}; check their paths")
        lengths = dict(zip(words, map(len, tokenizer.encode_batch(list(words))), strict=True))
        per_word = sum(lengths[word] * count for word, count in words.items()) / words.total()
        written = [word for word in words if _is_of_letters(word[1:])]
        worst = sorted(written, key=lambda word: (-lengths[word], word))[:5]
        table.add_row(
            language,
            f"{len(texts):,}",
            f"{sum(len(text.encode()) for text in texts) / tokens:.2f}",
            f"{per_word:.2f}",
            ", ".join(f"{word[1:][:24]} ({lengths[word]})" for word in worst),
        )
    print_table(table, width=160)


def _is_of_letters(word: str) -> bool:
    """Whether a word is of letters, vowel signs and joiners: no number, no address."""
    return all(
        unicodedata.category(character)[0] in "LM" or character in "\u200c\u200d"
        for character in word
    )


@command
def main(argv: Sequence[str] | None = None) -> None:
    """`python -m mooshak.tokenizer train|extend|encode|decode|report`."""
    words = list(sys.argv[1:] if argv is None else argv)
    # The action comes first, and not as an argument: then texts may stand behind the options.
    action = words.pop(0) if words and words[0] in _ACTIONS else None
    arguments = parser(
        f"{', '.join(_ACTIONS)}: train or extend a tokenizer, use it, or report how it fits."
    )
    arguments.add_argument(
        "input", nargs="*", help="encode: texts, decode: token ids (default: standard input)"
    )
    arguments.add_argument(
        "--documents", type=int, default=1000, help="report: documents read from each source"
    )
    config, options = parse(arguments, words)
    if action is None:
        raise InputError(f"the first argument says what to do; give one of {', '.join(_ACTIONS)}")
    if action == "train":
        train(config)
    elif action == "extend":
        from mooshak.extension import extend

        extend(config)
    tokenizer = open_tokenizer(config.tokenizer.path)
    if action in ("train", "extend"):
        print(f"{tokenizer.path}: {tokenizer.vocab_size} pieces")
    elif action == "report":
        _report(config, tokenizer, options.documents)
    elif action == "encode":
        for text in options.input or [_standard_input()]:
            print(*tokenizer.encode(text))
    else:
        ids = options.input or _standard_input().split()
        if wrong := [id for id in ids if not re.fullmatch(r"\d+", id)]:
            raise InputError(f"{wrong[0]!r} is not a token id; give numbers, as encode prints them")
        # What came from a pipe goes on exactly; an answer on the command line is a line.
        print(tokenizer.decode([int(id) for id in ids]), end="\n" if options.input else "")


def _standard_input() -> str:
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise InputError(f"standard input is not UTF-8: {error}") from None


if __name__ == "__main__":
    main()
