"""Constraints in the slots of an engine and through the server: the same bits, real clients."""

import json
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import openai
import pytest

from mooshak.config.generate import GenerateConfig
from mooshak.generation.lm import LM
from mooshak.serving.fields import ApiError
from mooshak.serving.protocol import Parser
from tests.serving.conftest import load, make_scheduler
from tests.serving.servers import NAME, serve

pytestmark = pytest.mark.usefixtures("compiled_in_haste")

FRAMEWORKS = ("torch", "jax")
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 9}, "क": {"enum": ["अ", "b"]}},
    "required": ["a", "क"],
    "additionalProperties": False,
}
CONSTRAINTS: list[dict[str, Any]] = [
    {"regex": r"(चूहा|क्ष|ड़|🦣) ?mouse{1,2}\."},
    {"json_schema": SCHEMA},
    {"choice": ("शेर", "a lion", "a lioness")},
    {"grammar": 'start: word (" " word)*\nword: /[a-c]{1,3}/'},
]


@pytest.mark.slow
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_constrained_neighbours_change_no_bit(framework: str, checkpoints: dict[str, Path]) -> None:
    lm = load(framework, checkpoints["llama"])
    scheduler = make_scheduler(framework, lm)
    base = {"max_new_tokens": 20, "temperature": 1.0, "logprobs": True, "seed": 5}
    values: list[dict[str, Any]] = [{}, *CONSTRAINTS, {"top_k": 20}, {"choice": "ab"}]
    chosen = [GenerateConfig(**base, **one) for one in values]
    prompts = [lm.encode(text) for text in ("एक", "a ", "the", "", "शेर", "a", "ab")]
    together = scheduler.generate(prompts, chosen)
    alone = [scheduler.generate([ids], [one])[0] for ids, one in zip(prompts, chosen, strict=True)]
    assert together == alone
    assert (together[-1][0].text, together[-1][0].finish_reason) == ("ab", "stop")
    texts = [lm.generate(ids, **base, **one).text for ids, one in zip(prompts, values, strict=True)]
    assert texts == [samples[0].text for samples in together]


@pytest.fixture(scope="module")
def parser(checkpoints: dict[str, Path]) -> Parser:
    lm: LM = import_module("mooshak_torch").load(checkpoints["mooshak"])
    assert lm.tokenizer is not None
    return Parser(lm, lm.tokenizer, NAME, max_len=96, max_samples=64)


def parse(parser: Parser, **fields: Any) -> GenerateConfig:
    body = json.dumps({"prompt": "a", **fields}).encode()
    return parser.completion(body).prompts[0].settings


def test_every_field_of_a_constraint(parser: Parser) -> None:
    text = json.dumps(SCHEMA)
    for fields in (
        {"json_schema": SCHEMA},
        {"guided_json": SCHEMA},
        {"guided_json": text},
        {"structured_outputs": {"json": SCHEMA}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}},
    ):
        assert parse(parser, **fields).json_schema == text
    found = parse(parser, response_format={"type": "json_object"})
    assert found.json_schema == '{"type": "object"}'
    for name in ("regex", "grammar"):
        for fields in ({name: "x"}, {f"guided_{name}": "x"}, {"structured_outputs": {name: "x"}}):
            assert getattr(parse(parser, **fields), name) == "x"
    for name in ("choice", "guided_choice"):
        assert parse(parser, **{name: ["a", "b"]}).choice == ("a", "b")


WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"regex": "a", "choice": ["a"]}, "regex", "give regex or choice, not both"),
    ({"regex": "a", "guided_regex": "a"}, "regex", "give guided_regex or regex, not both"),
    ({"guided_regex": 5}, "guided_regex", "guided_regex 5 must be a text"),
    ({"guided_json": "{"}, "guided_json", "guided_json is not JSON"),
    ({"guided_choice": ["a", ""]}, "guided_choice", "guided_choice contains an empty text"),
    ({"choice": ["a"] * 1025}, "choice", "choice has more than 1024 texts"),
    (
        {"structured_outputs": {"json": {}, "disable_any_whitespace": True}},
        "structured_outputs.disable_any_whitespace",
        "unknown field structured_outputs.disable_any_whitespace",
    ),
    (
        {"json_schema": {}, "response_format": {"type": "json_object"}},
        "response_format",
        "give json_schema or response_format, not both",
    ),
]


@pytest.mark.parametrize(("fields", "param", "message"), WRONG)
def test_a_wrong_constraint_is_named(
    fields: dict[str, Any], param: str, message: str, parser: Parser
) -> None:
    with pytest.raises(ApiError, match=re.escape(message)) as found:
        parse(parser, **fields)
    assert found.value.param == param


@pytest.mark.slow
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_openai_client_gets_constrained_texts(framework: str, checkpoints: dict[str, Path]) -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "s", "strict": True, "schema": SCHEMA}}
    messages: Any = [{"role": "user", "content": "a"}]
    with serve(framework, checkpoints["llama"]) as server:
        client = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
        options: Any = {"model": NAME, "messages": messages, "response_format": schema, "seed": 1}
        found = client.chat.completions.create(**options, n=4, max_tokens=60)
        for choice in found.choices:
            assert choice.finish_reason == "stop"
            assert json.loads(choice.message.content or "").keys() == {"a", "क"}
        stream = client.chat.completions.create(**options, max_tokens=60, stream=True)
        text = "".join(part.choices[0].delta.content or "" for part in stream)
        assert text == found.choices[0].message.content
        extra = {"structured_outputs": {"choice": ["शेर", "mouse"]}}
        done = client.completions.create(model=NAME, prompt="a", max_tokens=20, extra_body=extra)
        assert done.choices[0].text in ("शेर", "mouse")
        with pytest.raises(openai.BadRequestError, match="guided_regex: unclosed") as error:
            client.completions.create(model=NAME, prompt="a", extra_body={"guided_regex": "(a"})
        assert error.value.param == "guided_regex"
        options["response_format"]["json_schema"]["schema"] = {"type": "foo"}
        with pytest.raises(openai.BadRequestError, match="response_format: Invalid type: foo"):
            client.chat.completions.create(**options, max_tokens=60)
