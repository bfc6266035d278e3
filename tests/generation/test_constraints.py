"""Constraints: the text of every allowed sequence of tokens meets them, whatever the tokenizer."""

import json
import re
import sys
from typing import Any

import numpy as np
import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from mooshak.config.generate import GenerateConfig
from mooshak.errors import InputError
from mooshak.generation.adjustments import RowAdjustments
from mooshak.generation.constraints import make_constraint
from mooshak.generation.text import TextStream
from mooshak.tokenizer.base import Tokenizer
from tests.hf_tokenizers import KINDS, PARTS, small_tokenizer

PATTERNS = (
    r"(क्ष|कि|ड़|ड\u093c|क्\u200dष|क्\u200cष| )+।",
    r"(👨‍👩‍👧|🇮🇳|é| ab c|  )+",
    r"\s?[अ-ह]{1,3}\d{2} (a|the) mouse",
    r" a|  b|c",
)
PROMPTS = ("", "a", "a ", " ", "  ", "एक चूहा ", "a\n")


@pytest.fixture(scope="module", params=("sentencepiece", *KINDS))
def tokenizer(
    request: pytest.FixtureRequest,
    tiny_tokenizer: Tokenizer,
    tmp_path_factory: pytest.TempPathFactory,
) -> Tokenizer:
    """Tokenizers of every kind; the metaspace one strips the space at the start of a text."""
    if request.param == "sentencepiece":
        return tiny_tokenizer
    return small_tokenizer(request.param, tmp_path_factory.mktemp("hf"))


def walk(
    tokenizer: Tokenizer,
    prompt: list[int],
    seed: int = 0,
    n: int = 40,
    ends: tuple[int, ...] | None = None,
    **values: Any,
) -> tuple[str, str]:
    """Draw tokens among those that are allowed; return the text, and how it ended."""
    ends = (tokenizer.eos_id,) if ends is None else ends
    constraint = make_constraint(GenerateConfig(**values), tokenizer, prompt, ends)
    assert constraint is not None
    random, stream = np.random.default_rng(seed), TextStream(tokenizer, prompt)
    for _ in range(n):
        allowed = np.flatnonzero(constraint.allowed(512))
        assert len(allowed)
        token = int(random.choice(allowed))
        constraint = constraint.after(token)
        if token in ends:
            return stream.text, "end"
        stream.push(token)
        if constraint.done:
            return stream.text, "done"
    return stream.text, "length"


@settings(deadline=None, max_examples=60)
@given(
    pattern=st.sampled_from(PATTERNS),
    prompt=st.sampled_from(PROMPTS) | st.lists(st.sampled_from(PARTS), max_size=3).map("".join),
    seed=st.integers(0, 1000),
    bos=st.booleans(),
)
def test_text_matches_the_pattern(
    tokenizer: Tokenizer, pattern: str, prompt: str, seed: int, bos: bool
) -> None:
    ids = [tokenizer.bos_id] * bos + tokenizer.encode(prompt)
    text, end = walk(tokenizer, ids, seed, regex=pattern)
    if end == "length":
        text = text.rstrip("\ufffd")
    assert regex.fullmatch(pattern, text, partial=end == "length"), (text, end)


@pytest.mark.slow
@settings(deadline=None, max_examples=60)
@given(
    texts=st.lists(st.text(min_size=1, max_size=6), min_size=1, max_size=3),
    prompt=st.sampled_from(PROMPTS),
)
def test_choices_and_escaped_texts_are_exact(
    tokenizer: Tokenizer, texts: list[str], prompt: str
) -> None:
    """Any text: quotes, slashes, line ends, spaces at its start, characters without a token."""
    ids = tokenizer.encode(prompt, bos=True)
    text, end = walk(tokenizer, ids, choice=tuple(texts))
    assert text in texts and end in ("done", "end")
    text, end = walk(tokenizer, ids, regex="|".join(map(re.escape, texts)))
    assert text in texts


@pytest.mark.parametrize("pattern", ("क्ष\u200d", "ड़ी", "🦣🫎", " चूहा", "चूहा  "))
def test_only_text_of_a_pattern_is_generated(tokenizer: Tokenizer, pattern: str) -> None:
    """Joiners, a nukta, characters that are bytes only, spaces at the start and the end."""
    for prompt in PROMPTS:
        for seed in range(3):
            ids = tokenizer.encode(prompt, bos=True)
            assert walk(tokenizer, ids, seed, regex=pattern) == (pattern, "done")


def test_a_character_that_the_prompt_begins_is_part_of_the_text(tokenizer: Tokenizer) -> None:
    word = "a" + "🦣"
    ids = tokenizer.encode(word)
    head = ids[:-2]
    assert tokenizer.decode(head).endswith("\ufffd")
    assert re.fullmatch("🦣+b", walk(tokenizer, head, regex="🦣+b", n=200)[0])
    with pytest.raises(InputError, match=r"regex does not permit the character"):
        walk(tokenizer, head, regex="b")
    # Two bytes that continue no character.
    broken = [*tokenizer.encode("a"), *ids[-1:] * 2]
    with pytest.raises(InputError, match=r"regex: the prompt ends with bytes that are not"):
        walk(tokenizer, broken, regex="b")


def test_every_token_with_a_text_is_allowed_somewhere(tokenizer: Tokenizer) -> None:
    """The free pattern allows each token that is not special; the end after none."""
    constraint = make_constraint(
        GenerateConfig(regex=r"(?s).*"), tokenizer, tokenizer.encode("a"), (tokenizer.eos_id,)
    )
    assert constraint is not None
    allowed = constraint.allowed(512)
    texts = tokenizer.texts()
    for id, text in enumerate(texts):
        assert allowed[id] or not text or "\ufffd" in text or id == tokenizer.eos_id
    assert allowed[tokenizer.eos_id]
    assert not allowed[tokenizer.vocab_size :].any() and not allowed[tokenizer.bos_id]


SCHEMA = {
    "type": "object",
    "properties": {
        "नाम": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"enum": ["शेर", "mouse"]}, "maxItems": 2},
    },
    "required": ["नाम", "age", "tags"],
    "additionalProperties": False,
}


def check_schema(text: str) -> None:
    """Assert that a text is JSON of `SCHEMA`."""
    value = json.loads(text)
    assert list(value) == ["नाम", "age", "tags"]
    assert isinstance(value["नाम"], str) and len(value["नाम"]) <= 8
    assert type(value["age"]) is int and 0 <= value["age"] <= 99
    assert len(value["tags"]) <= 2 and set(value["tags"]) <= {"शेर", "mouse"}


def test_json_follows_its_schema(tokenizer: Tokenizer) -> None:
    for seed in range(20):
        text, end = walk(tokenizer, tokenizer.encode("a"), seed, n=300, json_schema=SCHEMA)
        assert end == "done"
        check_schema(text)
        assert "  " not in re.sub(r'"([^"\\]|\\.)*"', "_", text)  # At most one space.


def test_whitespace_of_json_can_be_chosen(tiny_tokenizer: Tokenizer) -> None:
    schema = {"enum": [[1, 2, 3]], "x-guidance": {"whitespace_flexible": False}}
    for seed in range(5):
        assert walk(tiny_tokenizer, [5], seed, json_schema=schema)[0] == "[1,2,3]"


def test_grammars_of_both_notations(tokenizer: Tokenizer) -> None:
    for grammar in ('start: x+ "."\nx: "ab" | "अ"', 'root ::= x+ "."\nx ::= "ab" | "अ"'):
        text, end = walk(tokenizer, [5], n=200, grammar=grammar)
        assert end == "done" and re.fullmatch(r"(ab|अ)+\.", text)


def test_end_tokens_follow_complete_texts_only(tiny_tokenizer: Tokenizer) -> None:
    dot = [*tiny_tokenizer.encode("."), tiny_tokenizer.id_of("<0x2E>")]
    ends = (tiny_tokenizer.eos_id, *dot)
    for seed in range(10):
        text, end = walk(tiny_tokenizer, [5], seed, ends=ends, regex=r"a+\.?b|a+")
        # A token that ends the text is not a part of it.
        assert "." not in text and (end != "end" or re.fullmatch("a+b?", text))
    # With no end token at all, the text ends where nothing else can follow.
    assert walk(tiny_tokenizer, [5], ends=(), regex="ab?c") in (("abc", "done"), ("ac", "done"))
    assert walk(tiny_tokenizer, [5], ends=(), regex="a*")[1] == "length"


def test_one_constraint_is_shared_by_many_rows(tiny_tokenizer: Tokenizer) -> None:
    """`after` leaves the constraint as it was, so copies of adjustments may share it."""
    first = make_constraint(GenerateConfig(regex="ab|cd"), tiny_tokenizer, [5], ())
    assert first is not None
    before = first.allowed(512)
    (a,), (c,) = tiny_tokenizer.encode("a"), tiny_tokenizer.encode("c")
    after_a, after_c = first.after(a), first.after(c)
    assert (first.allowed(512) == before).all()
    assert (after_a.allowed(512) != after_c.allowed(512)).any()
    wrong = after_a.after(c)
    assert not wrong.done
    with pytest.raises(InputError, match=r"generate.regex: .* doesn't satisfy the grammar"):
        wrong.allowed(512)


INVALID = (
    ({"regex": "(a"}, "generate.regex: unclosed group"),
    ({"regex": "(?=a)b"}, "generate.regex: look-around, including"),
    ({"regex": "a\\"}, "generate.regex: it ends with a backslash"),
    ({"regex": "(?x)a # b\nc"}, "generate.regex: the flag x is not supported on several"),
    ({"regex": "\ud800"}, "generate.regex: 'utf-8' codec can't encode"),
    ({"json_schema": {"type": "foo"}}, "generate.json_schema: Invalid type: foo"),
    ({"json_schema": {"not": {}}}, 'generate.json_schema: Unimplemented keys: ["not"]'),
    ({"json_schema": {"x-guidance": 1}}, "generate.json_schema: x-guidance must be an object"),
    ({"grammar": "start: ["}, "generate.grammar: line 1, column 9: Expected token ']'"),
    ({"grammar": "start: x"}, 'generate.grammar: line 1, column 8: unknown name: "x"'),
    ({"grammar": "root ::= ("}, "generate.grammar: Expected ')'"),
)


@pytest.mark.parametrize(("values", "message"), INVALID, ids=lambda one: str(one)[:30])
def test_invalid_constraints_are_one_line(
    tiny_tokenizer: Tokenizer, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError) as error:
        make_constraint(GenerateConfig(**values), tiny_tokenizer, [5], ())
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_settings_that_exclude_each_other() -> None:
    for values, message in (
        ({"regex": "a", "choice": ("a",)}, "give generate.regex or generate.choice, not both"),
        ({"regex": ""}, "generate.regex is an empty text"),
        ({"choice": ("a", "")}, "generate.choice contains an empty text"),
        ({"json_schema": "{"}, "generate.json_schema is not JSON"),
        ({"json_schema": "[1]"}, "generate.json_schema must be a JSON object"),
        ({"json_schema": {"a": {1}}}, "generate.json_schema is not JSON"),
        ({"json_schema": {"a": float("nan")}}, "generate.json_schema is not JSON"),
    ):
        with pytest.raises(InputError, match=message):
            GenerateConfig(**values)
    # The order of properties is that of the text.
    ordered = [GenerateConfig(json_schema={"a": 1, "b": 2}), GenerateConfig(json_schema='{"a":1}')]
    assert ordered[0] == GenerateConfig(json_schema='{"a": 1, "b": 2}')
    assert ordered[0] != GenerateConfig(json_schema={"b": 2, "a": 1})


def test_a_constraint_that_cannot_be_met_says_so(tiny_tokenizer: Tokenizer) -> None:
    (a,) = tiny_tokenizer.encode("a")
    for values, message in (
        ({"regex": "[^\\s\\S]"}, "generate.regex: no token can continue the text"),
        (
            {"choice": ("b",), "allowed_tokens": (a,)},
            "no token may follow the 0 generated ones: relax generate.allowed_tokens or "
            "generate.choice",
        ),
    ):
        chosen = GenerateConfig(**values)
        constraint = make_constraint(chosen, tiny_tokenizer, [5], (2,))
        with pytest.raises(InputError) as error:
            RowAdjustments(chosen, [5], 512, (2,), constraint=constraint).offset()
        assert str(error.value) == message


def test_tokenizers_that_change_texts_are_refused(tiny_tokenizer: Tokenizer) -> None:
    class Spaced:
        """A tokenizer that writes a space between tokens, as WordPiece does."""

        def __getattr__(self, name: str) -> Any:
            return getattr(tiny_tokenizer, name)

        def decode(self, ids: list[int]) -> str:
            return " ".join(filter(None, (tiny_tokenizer.decode([id]) for id in ids)))

    spaced: Any = Spaced()
    with pytest.raises(InputError, match="have another text than their bytes"):
        make_constraint(GenerateConfig(regex="a"), spaced, [5], ())
    with pytest.raises(InputError, match=r"generate.regex needs a tokenizer"):
        make_constraint(GenerateConfig(regex="a"), None, [5], ())


def test_a_constraint_that_is_too_complex_says_so(tiny_tokenizer: Tokenizer) -> None:
    """After tokens, too: a server goes on with its other requests."""
    objects = [
        {
            "type": "object",
            "properties": {f"k{i}{j}": {"type": "string", "maxLength": j} for j in range(30)},
        }
        for i in range(90)
    ]
    with pytest.raises(InputError, match=r"generate.json_schema: .*max is") as error:
        walk(tiny_tokenizer, [5], json_schema={"anyOf": objects})
    assert "\n" not in str(error.value)


def test_missing_library_is_named(
    tiny_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(InputError, match=r"pip install 'mooshak\[constraints\]'"):
        make_constraint(GenerateConfig(regex="not compiled yet"), tiny_tokenizer, [5], ())
