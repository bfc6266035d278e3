"""Requests of the OpenAI API: fields, defaults, and one clear error for each wrong body."""

import json
from pathlib import Path
from typing import Any

import pytest

from mooshak.serving.fields import ApiError
from mooshak.serving.protocol import Parser, Request
from tests.serving.conftest import load

USER = {"role": "user", "content": "a lion"}


@pytest.fixture(scope="module")
def parser(checkpoints: dict[str, Path]) -> Parser:
    lm = load("torch", checkpoints["llama"])
    assert lm.tokenizer is not None
    return Parser(lm, lm.tokenizer, "tiny", 96, 64)


def completion(parser: Parser, **body: Any) -> Request:
    return parser.completion(json.dumps({"prompt": "a", **body}).encode())


def chat(parser: Parser, **body: Any) -> Request:
    return parser.chat(json.dumps({"messages": [USER], **body}).encode())


def test_defaults_are_those_of_openai(parser: Parser) -> None:
    (prompt,) = completion(parser).prompts
    settings = prompt.settings
    assert (settings.temperature, settings.max_new_tokens, settings.n) == (1.0, 16, 1)
    (turn,) = chat(parser).prompts
    assert len(turn.ids) + turn.settings.max_new_tokens == 96
    seeds = {completion(parser).prompts[0].settings.seed for _ in range(3)}
    assert len(seeds) == 3
    same = completion(parser, prompt=["a", "a"]).prompts
    assert same[0].settings.seed != same[1].settings.seed


def test_generation_config_replaces_openais_defaults(
    parser: Parser, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parser.lm, "defaults", {"temperature": 0.3, "top_k": 7})
    settings = completion(parser).prompts[0].settings
    assert (settings.temperature, settings.top_k) == (0.3, 7)
    assert completion(parser, temperature=0).prompts[0].settings.temperature == 0


def test_fields_become_settings(parser: Parser) -> None:
    request = completion(
        parser,
        model="tiny",
        max_tokens=9,
        min_tokens=2,
        top_k=-1,
        stop=["x", "y"],
        stop_token_ids=[5],
        allowed_tokens=[5, 6],
        logit_bias={"7": -3},
        ignore_eos=True,
        user="me",
        suffix=None,
        best_of=1,
        response_format={"type": "text"},
    )
    settings = request.prompts[0].settings
    assert (settings.max_new_tokens, settings.min_new_tokens, settings.top_k) == (9, 2, 0)
    assert settings.stop == ("x", "y") and settings.stop_token_ids == (5,)
    assert settings.allowed_tokens == (5, 6) and settings.logit_bias == {7: -3.0}
    assert completion(parser, stop="x").prompts[0].settings.stop == ("x",)
    assert completion(parser, stop=[]).prompts[0].settings.stop == ()


@pytest.mark.parametrize("prompt", [[5, 6], [[5, 6]], [[5, 6], "a"], ["a", "b"]])
def test_prompts_are_texts_or_token_ids(prompt: Any, parser: Parser) -> None:
    found = completion(parser, prompt=prompt).prompts
    given = [prompt] if isinstance(prompt[0], int) else prompt
    assert [one.text if one.text is not None else one.ids for one in found] == given


def test_messages_may_have_parts_and_a_developer(parser: Parser) -> None:
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "lion"}]
    first = {"role": "developer", "content": "be brief"}
    found = chat(parser, messages=[first, {"role": "user", "content": parts, "name": "x"}])
    plain = chat(parser, messages=[{"role": "system", "content": "be brief"}, USER])
    assert found.prompts[0].ids == plain.prompts[0].ids


WRONG: list[tuple[dict[str, Any], str | None, str]] = [
    ({"temprature": 1}, "temprature", "unknown field temprature; did you mean temperature?"),
    ({"prompt": None}, "prompt", "prompt must be a text, a list"),
    ({"prompt": []}, "prompt", "prompt must be a text, a list"),
    ({"prompt": [1, "a"]}, "prompt", "prompt must be a text, a list"),
    ({"prompt": [[]]}, "prompt", "a prompt has no tokens"),
    ({"prompt": [True]}, "prompt", "prompt must be a text, a list"),
    ({"prompt": {"a": 1}}, "prompt", "prompt must be a text, a list"),
    ({"prompt": [512]}, "prompt", "token 512 is outside of the vocabulary"),
    ({"prompt": [-1]}, "prompt", "token -1 is outside of the vocabulary"),
    ({"prompt": [5] * 96}, "prompt", "the prompt has 96 tokens and max_tokens is 16; both"),
    ({"max_tokens": 95, "prompt": [5, 6]}, "max_tokens", "the prompt has 2 tokens"),
    ({"max_tokens": 0}, "max_tokens", "max_tokens 0 must be at least 1"),
    ({"max_tokens": -1}, "max_tokens", "max_tokens -1 must be"),
    ({"max_tokens": "9"}, "max_tokens", "max_tokens '9' must be an integer"),
    ({"max_tokens": 9.5}, "max_tokens", "max_tokens 9.5 must be an integer"),
    ({"max_tokens": True}, "max_tokens", "max_tokens True must be an integer"),
    ({"max_tokens": 2**60}, "max_tokens", "both must not be more than 96"),
    ({"max_tokens": 4, "max_completion_tokens": 5}, "max_completion_tokens", "not both"),
    ({"min_tokens": 20}, "min_tokens", "min_tokens 20 is more than max_tokens 16"),
    ({"temperature": -0.5}, "temperature", "temperature -0.5 must be 0"),
    ({"temperature": "hot"}, "temperature", "temperature 'hot' must be a number"),
    ({"temperature": 1e999}, None, "Infinity is not a number of JSON"),
    ({"top_p": 0}, "top_p", r"top_p 0 must be in \(0, 1\]"),
    ({"top_p": 1.5}, "top_p", "top_p 1.5 must be in"),
    ({"top_k": -2}, "top_k", "top_k -2 must not be negative"),
    ({"n": 0}, "n", "n 0 must be at least 1"),
    ({"n": 65}, "n", "1 prompts x n 65 are more than 64 samples"),
    ({"presence_penalty": 3}, "presence_penalty", "presence_penalty 3 must be in"),
    ({"frequency_penalty": "1"}, "frequency_penalty", "must be a number"),
    ({"seed": 1.5}, "seed", "seed 1.5 must be an integer"),
    ({"stop": [""]}, "stop", "stop contains an empty text"),
    ({"stop": 5}, "stop", "stop 5 must be a text or a list of texts"),
    ({"stop": ["a", 5]}, "stop", "must be a text or a list of texts"),
    ({"stop_token_ids": ["a"]}, "stop_token_ids", "must be a list of token ids"),
    ({"logit_bias": [1]}, "logit_bias", "logit_bias must be an object"),
    ({"logit_bias": {"a": 1}}, "logit_bias", "logit_bias: {'a': 1} is not like"),
    ({"logit_bias": {"5": 1e9}}, "logit_bias", "of token 5 must be in"),
    ({"ignore_eos": 1}, "ignore_eos", "ignore_eos 1 must be true or false"),
    ({"echo": "yes"}, "echo", "echo must be true or false"),
    ({"stream": 1}, "stream", "stream must be true or false"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "needs stream true"),
    ({"stream": True, "stream_options": 5}, "stream_options", "must be an object"),
    (
        {"stream": True, "stream_options": {"include_usge": True}},
        "stream_options.include_usge",
        "unknown field stream_options.include_usge; did you mean include_usage?",
    ),
    ({"logprobs": True}, "logprobs", "logprobs must be an integer"),
    ({"logprobs": 6}, "logprobs", "logprobs 6 must be in 0 .. 5"),
    ({"logprobs": -1}, "logprobs", "logprobs -1 must be in 0 .. 5"),
    ({"best_of": 2}, "best_of", "best_of is not supported"),
    ({"suffix": "b"}, "suffix", "suffix is not supported"),
    ({"tools": [{"type": "function"}]}, "tools", "tools is not supported"),
    ({"response_format": "json"}, "response_format", "must be an object"),
    ({"response_format": {"type": "xml"}}, "response_format", "must have the type text, json"),
    ({"response_format": {"type": "json_schema"}}, "response_format", "with a schema"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
        "response_format",
        "json_schema.schema is missing",
    ),
    ({"stop": ["a"] * 65}, "stop", "stop has more than 64 texts"),
    ({"prompt": [""] * 65}, "prompt", "there are more than 64 prompts"),
    ({"temperature": 10**400}, None, "has more than 64 bits"),
    ({"model": 5}, "model", "model must be a text"),
    ({"num_beams": 4}, "num_beams", "unknown field num_beams"),
    ({"prompt": "\ud800"}, None, "a text has a lone surrogate"),
]


@pytest.mark.parametrize(("body", "param", "message"), WRONG)
def test_a_wrong_field_is_named(
    body: dict[str, Any], param: str | None, message: str, parser: Parser
) -> None:
    with pytest.raises(ApiError, match=message) as found:
        completion(parser, **body)
    assert (found.value.status, found.value.param) == (400, param)
    assert "\n" not in found.value.body()["error"]["message"]


WRONG_CHATS: list[tuple[dict[str, Any], str, str]] = [
    ({"messages": None}, "messages", "messages must be a list of at least one message"),
    ({"messages": []}, "messages", "messages must be a list of at least one message"),
    ({"messages": "hello"}, "messages", "messages must be a list"),
    ({"messages": ["hello"]}, "messages[0]", "must be a JSON object"),
    ({"messages": [USER, {"role": "user"}]}, "messages[1]", "must have a role and a content"),
    ({"messages": [USER | {"content": 5}]}, "messages[0].content", "must be a text or a list"),
    ({"messages": [USER | {"role": "tool"}]}, "messages", "role 'tool' is unknown"),
    ({"messages": [USER | {"tool_calls": []}]}, "messages[0].tool_calls", "is not supported"),
    (
        {"messages": [USER | {"content": [{"type": "image_url"}]}]},
        "messages[0].content",
        "may have parts of the type text only",
    ),
    ({"messages": [USER | {"content": "a lion " * 90}]}, "messages", "the prompt has"),
    ({"logprobs": 5}, "logprobs", "logprobs must be true or false"),
    ({"top_logprobs": 3}, "top_logprobs", "top_logprobs needs logprobs true"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "must be in 0 .. 20"),
    ({"prompt": "a"}, "prompt", "unknown field prompt"),
    ({"echo": True}, "echo", "unknown field echo"),
]


@pytest.mark.parametrize(("body", "param", "message"), WRONG_CHATS)
def test_a_wrong_field_of_a_chat_is_named(
    body: dict[str, Any], param: str, message: str, parser: Parser
) -> None:
    with pytest.raises(ApiError, match=message) as found:
        chat(parser, **body)
    assert (found.value.status, found.value.param) == (400, param)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[1]", "the body must be a JSON object"),
        (b'"a"', "the body must be a JSON object"),
        (b"\xff\xfe{}", "not JSON"),
        (b'{"prompt": "\xff"}', "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"prompt": "a", "temperature": 1e999}', "1e999 is too large"),
        (b'{"prompt": "a", "temperature": NaN}', "NaN is not a number"),
        (b'{"prompt": "a", "seed": ' + b"1" * 5000 + b"}", "not JSON"),
    ],
)
def test_what_is_not_json_is_refused(body: bytes, message: str, parser: Parser) -> None:
    with pytest.raises(ApiError, match=message) as found:
        parser.completion(body)
    assert found.value.status == 400


def test_another_model_is_not_found(parser: Parser) -> None:
    with pytest.raises(ApiError, match="the model gpt does not exist; this server has tiny") as no:
        completion(parser, model="gpt")
    assert (no.value.status, no.value.body()["error"]["code"]) == (404, "model_not_found")
