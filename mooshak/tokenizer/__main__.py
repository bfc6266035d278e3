"""Train, extend, use and measure tokenizers from the command line.

python -m mooshak.tokenizer train  --config configs/demo.yaml
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
from mooshak.errors import InputError, command
from mooshak.tables import print_table
from mooshak.tokenizer.base import Tokenizer
from mooshak.tokenizer.load import open_tokenizer
from mooshak.tokenizer.train import train

_ACTIONS = ("train", "extend", "encode", "decode", "report")


def _report(config: Config, tokenizer: Tokenizer, most: int) -> None:
    """Print how many tokens each language costs, and the words that cost the most."""
    from itertools import islice

    from rich.table import Table

    from mooshak.corpus.readers import documents

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
    arguments = config_parser(
        f"{', '.join(_ACTIONS)}: train or extend a tokenizer, use it, or report how it fits."
    )
    arguments.add_argument(
        "input", nargs="*", help="encode: texts, decode: token ids (default: standard input)"
    )
    arguments.add_argument(
        "--documents", type=int, default=1000, help="report: documents read from each source"
    )
    draft, options = parse_config(arguments, words)
    config = resolve(draft)
    if action is None:
        raise InputError(f"the first argument says what to do; give one of {', '.join(_ACTIONS)}")
    if action == "train":
        train(config)
    elif action == "extend":
        from mooshak.tokenizer.extend import extend

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
