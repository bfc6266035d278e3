"""Compare libraries of constrained decoding: time to compile a constraint, and for each token.

The tokens of a text that meets the constraint are given to each library that is installed; before
each one it computes which tokens may follow. docs/generation.md has the table.

python scripts/compare_constraints.py runs/demo/tokenizer.model
"""

import json
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import numpy as np
from rich.table import Table

from mooshak.command_line import command_parser
from mooshak.errors import command
from mooshak.tables import print_table
from mooshak.tokenizer.load import open_tokenizer
from mooshak.tokenizer.token_texts import TokenTexts

SCHEMA = {
    "type": "object",
    "properties": {
        "नाम": {"type": "string", "maxLength": 40},
        "age": {"type": "integer"},
        "tags": {"type": "array", "items": {"enum": ["शेर", "चूहा", "mouse"]}},
    },
    "required": ["नाम", "age", "tags"],
    "additionalProperties": False,
}
CASES = {
    "regex": (r"(कृष्ण|क्षमा|[अ-ह]{1,6}) \d{2,4}, [a-z ]{5,60}\.", "क्षमा 1234, the lion and a mouse."),
    "schema": (json.dumps(SCHEMA), '{"नाम":"एक चालाक चूहा","age":12,"tags":["शेर","mouse"]}'),
}
"""Name -> constraint, and a text that meets it."""

Step = tuple[Callable[[], np.ndarray], Callable[[int], object]]
"""Functions that return the bits of the tokens that may follow, and accept a token."""


def llguidance(tokens: list[bytes], end: int) -> Callable[[str, str], Step]:
    from types import SimpleNamespace

    from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

    source = SimpleNamespace(eos_token_id=end, bos_token_id=None, tokens=tokens)
    vocabulary = LLTokenizer(TokenizerWrapper(source))

    def compile(kind: str, value: str) -> Step:
        body = f"/{value}/" if kind == "regex" else f"%json {value}"
        matcher = LLMatcher(vocabulary, f'start: {body}\n%llguidance {{"no_forcing": true}}')
        assert not matcher.is_error(), matcher.get_error()
        return lambda: np.frombuffer(matcher.compute_bitmask(), np.uint8), matcher.consume_token

    return compile


def outlines_core(tokens: list[bytes], end: int) -> Callable[[str, str], Step]:
    from outlines_core import Guide, Index, Vocabulary
    from outlines_core.json_schema import build_regex_from_schema

    ids: dict[bytes, list[int]] = {}
    for id, data in enumerate(tokens):
        if data and id != end:
            ids.setdefault(data, []).append(id)
    vocabulary = Vocabulary(end, ids)

    def compile(kind: str, value: str) -> Step:
        pattern = value if kind == "regex" else build_regex_from_schema(value)
        guide = Guide(Index(pattern, vocabulary))
        mask = np.zeros(-(-len(tokens) // 32), np.int32)

        def bits() -> np.ndarray:
            guide.write_mask_into(mask.ctypes.data, mask.size, mask.itemsize)
            return mask.view(np.uint8)

        return bits, guide.advance

    return compile


def xgrammar(tokens: list[bytes], end: int) -> Callable[[str, str], Step]:
    from xgrammar import (
        GrammarCompiler,
        GrammarMatcher,
        TokenizerInfo,
        VocabType,
        allocate_token_bitmask,
    )

    info: Any = TokenizerInfo(tokens, VocabType.RAW, stop_token_ids=[end])
    compiler = GrammarCompiler(info, max_threads=1, cache_enabled=False)

    def compile(kind: str, value: str) -> Step:
        make = compiler.compile_regex if kind == "regex" else compiler.compile_json_schema
        matcher = GrammarMatcher(make(value))
        mask = allocate_token_bitmask(1, len(tokens))

        def bits() -> np.ndarray:
            matcher.fill_next_token_bitmask(mask)
            return mask.numpy().view(np.uint8)[0]

        return bits, matcher.accept_token

    return compile


LIBRARIES = {one.__name__: one for one in (llguidance, outlines_core, xgrammar)}


def measure(step: Step, ids: list[int]) -> tuple[float, float]:
    """Return the median and the longest time of a token, in seconds."""
    bits, accept = step
    times = []
    for place, id in enumerate(ids):
        start = time.perf_counter()
        found = bits()
        times.append(time.perf_counter() - start)
        assert found[id // 8] >> (id % 8) & 1, f"token {place} is not allowed"
        accept(id)
    return float(np.median(times)), max(times)


@command
def main() -> None:
    """Print the table."""
    parser = command_parser("scripts/compare_constraints.py", __doc__, "TOKENIZER")
    parser.add_argument("tokenizer", help="tokenizer.model or tokenizer.json")
    tokenizer = open_tokenizer(parser.parse_args().tokenizer)
    texts, n = TokenTexts(tokenizer), tokenizer.vocab_size
    tokens = [texts.bytes_of(id) or b"" for id in range(n)]
    table = Table("library", "vocabulary", "constraint", "compile", "token, median", "token, max")
    for name, make in LIBRARIES.items():
        try:
            label = f"{name} {version(name.replace('_', '-'))}"
            start = time.perf_counter()
            compile = make(tokens, tokenizer.eos_id)
        except ImportError as error:
            print(f"{name}: {error}")
            continue
        built = time.perf_counter() - start
        for kind, (value, text) in CASES.items():
            ids = tokenizer.encode(text)
            start = time.perf_counter()
            step = compile(kind, value)
            compiled = time.perf_counter() - start
            try:
                median, longest = measure(step, ids)
            except AssertionError as error:
                table.add_row(label, f"{built:.3f} s", kind, f"{compiled:.3f} s", str(error), "")
                continue
            table.add_row(
                label,
                f"{built:.3f} s",
                kind,
                f"{compiled * 1e3:,.1f} ms",
                f"{median * 1e6:,.0f} us",
                f"{longest * 1e6:,.0f} us",
            )
    print_table(table)


if __name__ == "__main__":
    main()
