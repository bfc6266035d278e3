"""Constrained texts of both frameworks: equal, complete, in batches, streams and commands."""

import json
import re
import sys
from importlib import import_module
from pathlib import Path
from subprocess import run
from typing import Any

import pytest

from mooshak.errors import InputError
from mooshak.generation.command import generate_parser
from mooshak.generation.lm import LM
from mooshak.generation.requests import given_settings
from tests.generation.conftest import FRAMEWORKS

pytestmark = pytest.mark.usefixtures("compiled_in_haste")

SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 9}, "क": {"enum": ["अ", "b"]}},
    "required": ["a", "क"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}
"""At most 17 bytes, each of which may be a token."""
CONSTRAINTS: list[dict[str, Any]] = [
    {"regex": r"(चूहा|क्ष|ड़|🦣) ?mouse{1,2}\."},
    {"json_schema": SCHEMA},
    {"choice": ("शेर", "a lion", "a lioness")},
    {"grammar": 'start: word (" " word)*\nword: /[a-c]{1,3}/ | "\u0915\u094d\u200d\u0937"'},
]


@pytest.fixture(scope="module")
def float64(tiny_checkpoint: Path) -> dict[str, LM]:
    return {f: import_module(f"mooshak_{f}").load(tiny_checkpoint, "float64") for f in FRAMEWORKS}


def is_json(text: str) -> bool:
    value = json.loads(text)
    a, k = value.pop("a"), value.pop("क")
    return type(a) is int and 0 <= a <= 9 and k in ("अ", "b") and not value


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_fifty_json_texts_follow_the_schema(
    dtype: str, lms: dict[str, LM], float64: dict[str, LM]
) -> None:
    found, theirs = (
        lm.generate("एक", n=50, temperature=1.0, seed=3, json_schema=SCHEMA, max_new_tokens=40)
        for lm in (lms if dtype == "float32" else float64).values()
    )
    assert found == theirs
    assert all(one.finish_reason == "stop" and is_json(one.text) for one in found)
    assert len({one.text for one in found}) > 10


@pytest.mark.slow
@pytest.mark.parametrize("settings", CONSTRAINTS, ids=lambda one: next(iter(one)))
def test_constrained_texts_are_equal_in_both(settings: dict[str, Any], lms: dict[str, LM]) -> None:
    prompts = ["एक", "a mouse ", "", [1, 5, 300]]
    values = {"max_new_tokens": 20, "temperature": 1.0, "n": 3, **settings}
    found, theirs = (lm.generate(prompts, **values) for lm in lms.values())
    assert found == theirs
    # A row is the same alone and in a batch, whose rows end at different steps.
    assert [lms["torch"].generate(prompt, **values) for prompt in prompts] == found
    done = [one for samples in found for one in samples if one.finish_reason == "stop"]
    assert done
    for one in done:
        if "regex" in settings:
            assert re.fullmatch(settings["regex"], one.text)
        if "choice" in settings:
            assert one.text in settings["choice"]
        if "json_schema" in settings:
            assert is_json(one.text)


@pytest.mark.slow
def test_a_met_constraint_ends_the_text_without_an_end_token(lm: LM) -> None:
    done = lm.generate("एक", choice="mouse", max_new_tokens=20, ignore_eos=True, min_new_tokens=19)
    assert (done.text, done.finish_reason) == ("mouse", "stop")
    # The last token that may be generated completes it.
    exact = lm.generate("एक", choice="mouse", max_new_tokens=len(done.token_ids))
    assert exact.token_ids == done.token_ids and exact.finish_reason == "stop"
    short = lm.generate("एक", choice="mouse", max_new_tokens=len(done.token_ids) - 1)
    assert short.token_ids == done.token_ids[:-1] and short.finish_reason == "length"


@pytest.mark.slow
def test_constrained_streams_and_chats(lm: LM) -> None:
    values = {"regex": r"[अ-ह]\u094dष{1,2}ा? a", "temperature": 1.0, "seed": 4}
    for prompt in ("एक", "a "):
        text = lm.generate(prompt, max_new_tokens=30, **values).text
        assert text is not None and re.fullmatch(values["regex"], text)
        assert "".join(lm.stream(prompt, max_new_tokens=30, **values)) == text
    messages = [{"role": "user", "content": "a"}]
    done = lm.chat(messages, choice=("हाँ", "no"), max_new_tokens=12)
    assert done.text in ("हाँ", "no") and done.finish_reason == "stop"


@pytest.mark.slow
def test_other_settings_act_with_a_constraint(lm: LM) -> None:
    values = {"regex": "[ab]{6}", "max_new_tokens": 12, "temperature": 1.0}
    (a,) = lm.encode("a")[1:]
    done = lm.generate("एक", logit_bias={a: 100.0}, logprobs=True, **values)
    assert done.text == "aaaaaa" and len(done.logprobs or ()) == len(done.token_ids)
    assert "b" in (lm.generate("एक", bad_words=("a",), **values).text or "")
    assert lm.generate("एक", stop="aa", logit_bias={a: 100.0}, **values).text == ""
    with pytest.raises(InputError, match=r"relax generate.allowed_tokens or generate.bad_words"):
        lm.generate("एक", choice="a", bad_words=("a",), allowed_tokens=(a,), max_new_tokens=9)
    with pytest.raises(InputError, match=r"relax generate.allowed_tokens or generate.choice"):
        lm.stream("एक", choice="b", allowed_tokens=(a,), max_new_tokens=9)  # Before the first part.


def test_options_of_constraints(tmp_path: Path) -> None:
    path = tmp_path / "schema.json"
    path.write_text(json.dumps(SCHEMA), "utf-8")
    parser = generate_parser("mooshak_torch.generate", "Generate. text\n\nText.")

    def parse(*options: str) -> dict[str, Any]:
        return given_settings(parser.parse_args(["CHECKPOINT", "--prompt", "a", *options]))

    assert json.loads(parse("--json_schema", f"@{path}")["json_schema"]) == SCHEMA
    assert parse("--json-schema", "{}") == {"json_schema": "{}"}
    assert parse("--choice", "a", "--choice", "b") == {"choice": ["a", "b"]}
    assert parse("--regex", "@a") == {"regex": "@a"}
    with pytest.raises(SystemExit):
        parse("--grammar", f"@{tmp_path}/none")


@pytest.mark.slow
def test_constraints_of_the_command(tiny_checkpoint: Path, tmp_path: Path) -> None:
    lines = [{"prompt": "एक", "json_schema": SCHEMA}, {"prompt": "a", "choice": ["हाँ"], "n": 2}]
    source = tmp_path / "prompts.jsonl"
    source.write_text("\n".join(json.dumps(line) for line in lines))
    command = [sys.executable, "-m", "mooshak_torch.generate", str(tiny_checkpoint)]
    options = ["--jsonl", str(source), "--jsonl_out", "-", "--max_new_tokens", "40"]
    done = run([*command, *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert is_json(rows[0]["text"]) and [row["text"] for row in rows[1:]] == ["हाँ", "हाँ"]
    for options, message in (
        (["--prompt", "a", "--regex", "(a"], "generate.regex: unclosed group"),
        (["--prompt", "a", "--regex", "a", "--choice", "b"], "give generate.regex or generate"),
    ):
        done = run([*command, *options], capture_output=True, text=True)
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("settings", CONSTRAINTS, ids=lambda one: next(iter(one)))
def test_constraints_with_beams_and_drafts(settings: dict[str, Any], lms: dict[str, LM]) -> None:
    """A beam ends where its constraint is met; a draft changes no constrained text."""
    values = {"max_new_tokens": 20, "ignore_eos": True, **settings}
    found, theirs = (
        lm.generate("एक", num_beams=3, num_return_sequences=2, **values) for lm in lms.values()
    )
    assert isinstance(found, list) and isinstance(theirs, list)
    assert [one.token_ids for one in found] == [one.token_ids for one in theirs]
    for one in found:
        if one.finish_reason == "stop" and "choice" in settings:
            assert one.text in settings["choice"]
    for lm in lms.values():
        plain = lm.generate(["एक", "a "], temperature=1.0, seed=2, **values)
        drafted = lm.generate(["एक", "a "], temperature=1.0, seed=2, draft=lm, **values)
        assert [one.token_ids for one in plain] == [one.token_ids for one in drafted]
        assert [one.finish_reason for one in plain] == [one.finish_reason for one in drafted]
