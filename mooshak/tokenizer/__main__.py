"""Train a tokenizer, extend one, encode and decode text, or report tokens per word.

python -m mooshak.tokenizer train --config configs/demo.yaml
python -m mooshak.tokenizer extend --init.from LLAMA --config C --tokenizer.path new.model
python -m mooshak.tokenizer encode --config configs/demo.yaml "नमस्ते दुनिया"
python -m mooshak.tokenizer decode --tokenizer.path tokenizer.model 1 302 17
python -m mooshak.tokenizer report --config configs/demo.yaml
"""

import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Sequence

from mooshak.checkpoints.init_from import resolve
from mooshak.config.parse import config_parser, parse_config
from mooshak.config.sections import Config
from mooshak.corpus.readers import documents
from mooshak.errors import InputError, command
from mooshak.tables import print_table
from mooshak.tokenizer.base import Tokenizer
from mooshak.tokenizer.extend import extend
from mooshak.tokenizer.load import open_tokenizer
from mooshak.tokenizer.train import train

_ACTIONS = ("train", "extend", "encode", "decode", "report")


def _report(config: Config, tokenizer: Tokenizer, most: int) -> None:
    """Print bytes per token and tokens per word by language, and the words with the most tokens."""
    from itertools import islice

    from rich.table import Table

    table = Table(title=f"{tokenizer.path}: {tokenizer.vocab_size} tokens")
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
        # With the preceding space, as in running text.
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
    """Return whether a word has only letters, vowel signs and joiners: no number, no address."""
    return all(
        unicodedata.category(character)[0] in "LM" or character in "\u200c\u200d"
        for character in word
    )


@command
def main(argv: Sequence[str] | None = None) -> None:
    """`python -m mooshak.tokenizer train|extend|encode|decode|report`."""
    words = list(sys.argv[1:] if argv is None else argv)
    # The action is taken from the front, not parsed: then texts may follow the options.
    action = words.pop(0) if words and words[0] in _ACTIONS else None
    usage = f"{'|'.join(_ACTIONS)} --config FILE [--section.key VALUE ...] [INPUT ...]"
    arguments = config_parser("mooshak.tokenizer", __doc__, usage)
    text = "encode: texts; decode: token ids (empty: standard input)"
    arguments.add_argument("input", nargs="*", metavar="INPUT", help=text)
    text = "report: maximum number of documents per source"
    arguments.add_argument("--documents", type=int, default=1000, metavar="N", help=text)
    draft, options = parse_config(arguments, words)
    config = resolve(draft)
    if action is None:
        raise InputError(f"the first argument is the action; give one of {', '.join(_ACTIONS)}")
    if action == "train":
        train(config)
    elif action == "extend":
        extend(config)
    tokenizer = open_tokenizer(config.tokenizer.path)
    if action in ("train", "extend"):
        print(f"{tokenizer.path}: {tokenizer.vocab_size} tokens")
    elif action == "report":
        _report(config, tokenizer, options.documents)
    elif action == "encode":
        for text in options.input or [_standard_input()]:
            print(*tokenizer.encode(text))
    else:
        ids = options.input or _standard_input().split()
        if wrong := [id for id in ids if not re.fullmatch(r"\d+", id)]:
            raise InputError(f"{wrong[0]!r} is not a token id; give numbers, as encode prints them")
        # Text from a pipe is written exactly; for ids on the command line, a newline is added.
        print(tokenizer.decode([int(id) for id in ids]), end="\n" if options.input else "")


def _standard_input() -> str:
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise InputError(f"standard input is not UTF-8: {error}") from None


if __name__ == "__main__":
    main()
