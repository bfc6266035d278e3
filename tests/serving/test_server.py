"""The server's application: answers equal those of the engine, limits, keys, ids, figures."""

import asyncio
import json
import time
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from mooshak.config.generate import GenerateConfig
from mooshak.generation.completion import Completion
from mooshak.serving.service import Service
from tests.serving.conftest import make_scheduler
from tests.serving.servers import (
    NAME,
    SHAPE,
    application,
    client_of,
    stream_of,
)

SAMPLED = {"temperature": 0.9, "seed": 7, "max_tokens": 24}
HINDI = "एक चूहा"


@pytest.fixture(params=["torch", "jax"], scope="module")
def service(request: pytest.FixtureRequest, checkpoints: dict[str, Path]) -> Iterator[Service]:
    with application(request.param, checkpoints["llama"]) as found:
        yield found


def post(service: Service, path: str, body: Any, **options: Any) -> httpx2.Response:
    async def ask() -> httpx2.Response:
        async with client_of(service) as client:
            return await client.post(path, json=body, **options)

    return asyncio.run(ask())


def complete(service: Service, **body: Any) -> dict[str, Any]:
    response = post(service, "/v1/completions", {"prompt": HINDI, **SAMPLED, **body})
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


def expected(service: Service, prompts: list[str], **settings: Any) -> list[list[Completion]]:
    """Return the completions of an engine of the same shape, without the server."""
    lm = service.parser.lm
    scheduler = make_scheduler(service.framework, lm, **SHAPE)
    chosen = GenerateConfig(**{"temperature": 0.9, "seed": 7, "max_new_tokens": 24} | settings)
    return scheduler.generate([lm.encode(one) for one in prompts], [chosen] * len(prompts))


def test_completions_equal_those_of_the_engine(service: Service) -> None:
    prompts = [HINDI, "the lion"]
    found = complete(service, prompt=prompts, n=2, return_token_ids=True)
    wanted = [one for samples in expected(service, prompts, n=2) for one in samples]
    for i, (choice, one) in enumerate(zip(found["choices"], wanted, strict=True)):
        assert choice["index"] == i and choice["text"] == one.text
        assert choice["token_ids"] == one.token_ids
        assert choice["prompt_token_ids"] == one.prompt_token_ids
        assert choice["finish_reason"] == one.finish_reason and choice["logprobs"] is None
    n_prompt = sum(len(one.prompt_token_ids) for one in wanted[::2])
    n_new = sum(len(one.token_ids) for one in wanted)
    assert found["usage"] == {
        "prompt_tokens": n_prompt,
        "completion_tokens": n_new,
        "total_tokens": n_prompt + n_new,
    }
    assert found["object"] == "text_completion" and found["model"] == NAME


def test_a_stream_joins_to_the_answer(service: Service) -> None:
    options = {"n": 2, "logprobs": 0, "return_token_ids": True, "stop": "ो"}
    whole = complete(service, **options)
    body = {"prompt": HINDI, **SAMPLED, **options, "stream": True}
    body["stream_options"] = {"include_usage": True}
    response = post(service, "/v1/completions", body)
    assert response.headers["content-type"].startswith("text/event-stream")
    *events, last = stream_of(response.text)
    assert last["choices"] == [] and last["usage"] == whole["usage"]
    assert {event["id"] for event in events} == {last["id"]}
    for choice in whole["choices"]:
        mine = [e["choices"][0] for e in events if e["choices"][0]["index"] == choice["index"]]
        assert "".join(part["text"] for part in mine) == choice["text"]
        assert [id for part in mine for id in part["token_ids"]] == choice["token_ids"]
        for key in ("tokens", "token_logprobs", "text_offset"):
            parts = [one for part in mine for one in part["logprobs"][key]]
            assert parts == choice["logprobs"][key]
        reasons = [part["finish_reason"] for part in mine]
        assert reasons == [None] * (len(mine) - 1) + [choice["finish_reason"]]


@pytest.mark.slow
def test_a_chat_streams_a_role_and_its_answer(service: Service) -> None:
    body = {"messages": [{"role": "user", "content": HINDI}], **SAMPLED, "logprobs": True}
    whole = post(service, "/v1/chat/completions", body).json()
    (choice,) = whole["choices"]
    wanted = service.parser.lm.chat(body["messages"], temperature=0.9, seed=7, max_new_tokens=24)
    assert choice["message"]["role"] == "assistant" and whole["object"] == "chat.completion"
    assert len(choice["logprobs"]["content"]) == whole["usage"]["completion_tokens"]
    assert whole["usage"]["prompt_tokens"] == len(wanted.prompt_token_ids)
    data = b"".join(bytes(one["bytes"] or []) for one in choice["logprobs"]["content"])
    assert choice["message"]["content"].replace("\ufffd", "") in data.decode(errors="ignore")
    stream = post(service, "/v1/chat/completions", body | {"stream": True}).text
    events = [event["choices"][0] for event in stream_of(stream)]
    assert events[0]["delta"] == {"role": "assistant", "content": ""}
    text = "".join(event["delta"].get("content", "") for event in events)
    assert text == choice["message"]["content"]
    assert events[-1]["finish_reason"] == choice["finish_reason"]


def test_a_prompt_is_echoed(service: Service) -> None:
    plain = complete(service)["choices"][0]["text"]
    assert complete(service, echo=True)["choices"][0]["text"] == HINDI + plain
    ids = service.parser.lm.encode(HINDI)
    found = complete(service, prompt=ids, echo=True, max_tokens=0)
    assert found["choices"][0]["text"] == HINDI and found["usage"]["completion_tokens"] == 0
    assert found["choices"][0]["finish_reason"] == "length"
    stream = {"prompt": ids, **SAMPLED, "echo": True, "stream": True}
    events = stream_of(post(service, "/v1/completions", stream).text)
    assert "".join(event["choices"][0]["text"] for event in events) == HINDI + plain


@pytest.mark.slow
def test_log_probabilities_of_the_prompt_are_those_of_score(service: Service) -> None:
    text = "एक चूहा the lion"
    lm = service.parser.lm
    ids, scores = lm.encode(text), lm.score(text)
    choice = complete(service, prompt=text, echo=True, logprobs=3, max_tokens=0)["choices"][0]
    found = choice["logprobs"]
    assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
    assert found["token_logprobs"][1:] == pytest.approx(scores, abs=1e-4)
    assert len(found["tokens"]) == len(ids)
    for offset, token, log_prob, top in list(zip(*map(found.get, KEYS), strict=True))[1:]:
        shown = token.lstrip(" ") if offset == 0 else token
        assert text[offset : offset + len(shown)] == shown
        assert top[token] == log_prob and len(top) in (3, 4) and max(top.values()) >= log_prob
    more = complete(service, prompt=text, echo=True, logprobs=1, max_tokens=2)["choices"][0]
    assert more["logprobs"]["token_logprobs"][: len(ids)] == found["token_logprobs"]
    assert len(more["logprobs"]["tokens"]) == len(ids) + 2


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_as_long_as_a_slot_is_echoed(stream: bool, service: Service) -> None:
    limit, before = service.parser.max_len, service.scheduler.counters.generated_tokens
    ids = [5 + i % 90 for i in range(limit)]
    body = {"prompt": ids, "echo": True, "max_tokens": 0, "return_token_ids": True}
    if stream:
        options = {"stream": True, "stream_options": {"include_usage": True}}
        *events, last = stream_of(post(service, "/v1/completions", body | options).text)
        choices, usage = [event["choices"][0] for event in events], last["usage"]
    else:
        found = complete(service, **body)
        choices, usage = found["choices"], found["usage"]
    assert "".join(choice["text"] for choice in choices) == service.texts.tokenizer.decode(ids)
    assert [id for choice in choices for id in choice["token_ids"]] == []
    assert choices[-1]["finish_reason"] == "length" and choices[0]["logprobs"] is None
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (limit, 0)
    assert service.scheduler.counters.generated_tokens == before


KEYS = ("text_offset", "tokens", "token_logprobs", "top_logprobs")


def test_a_chat_has_the_most_probable_tokens(service: Service) -> None:
    body = {"messages": [{"role": "user", "content": HINDI}], "logprobs": True, "max_tokens": 5}
    body |= {"temperature": 0, "top_logprobs": 2}
    (choice,) = post(service, "/v1/chat/completions", body).json()["choices"]
    for one in choice["logprobs"]["content"]:
        first, second = one["top_logprobs"]
        assert first["logprob"] >= second["logprob"]
        assert {key: one[key] for key in first} == first  # Greedy.


def test_a_sample_without_a_token_left_is_an_error(service: Service) -> None:
    body = {"prompt": [5, 6, 9], "allowed_tokens": [5, 6, 7], "no_repeat_ngram_size": 1}
    response = post(service, "/v1/completions", body)
    assert response.status_code == 400
    message = response.json()["error"]["message"]
    assert "no token may follow the 1 generated ones: relax allowed_tokens or" in message
    text = post(service, "/v1/completions", body | {"stream": True}).text
    assert "no token may follow" in stream_of(text)[-1]["error"]["message"]


def test_requests_have_ids(service: Service) -> None:
    response = post(service, "/v1/completions", {"prompt": "a", "max_tokens": 1})
    assert response.json()["id"] == "cmpl-" + response.headers["x-request-id"]
    named = {"X-Request-Id": "mine-1"}
    response = post(service, "/v1/completions", {"prompt": 5}, headers=named)
    assert response.status_code == 400 and response.headers["x-request-id"] == "mine-1"
    bad = {"X-Request-Id": "a b"}
    assert post(service, "/v1/completions", {}, headers=bad).headers["x-request-id"] != "a b"


@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "status", "message"),
    [
        ("POST", "/v1/completions", b"{}", {"Content-Type": "text/plain"}, 415, "Content-Type"),
        ("POST", "/v1/completions", b" " * 10_001, {}, 413, "more than 10000 bytes"),
        ("POST", "/v1/completions", b"{", {}, 400, "not JSON"),
        ("POST", "/v1/completions", b'{"model": "b", "prompt": ""}', {}, 404, "does not exist"),
        ("GET", "/v1/completions", b"", {}, 405, "method not allowed"),
        ("GET", "/v1/models/b", b"", {}, 404, "the model b does not exist"),
        ("GET", "/v2", b"", {}, 404, "GET /v2: not found"),
        ("POST", "/tokenize", b"{}", {}, 400, "prompt must be a text"),
        ("POST", "/detokenize", b'{"tokens": [1, 512]}', {}, 400, "token 512 is outside"),
        ("POST", "/detokenize", b'{"tokens": "a"}', {}, 400, "tokens must be a list"),
    ],
)
def test_errors_have_openais_form(
    method: str,
    path: str,
    body: bytes,
    headers: dict[str, str],
    status: int,
    message: str,
    service: Service,
) -> None:
    async def ask() -> httpx2.Response:
        async with client_of(service) as client:
            given = {"Content-Type": "application/json"} | headers
            return await client.request(method, path, content=body, headers=given)

    response = asyncio.run(ask())
    assert response.status_code == status
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"} and message in error["message"]


def test_models_tokens_and_figures(service: Service) -> None:
    async def ask() -> None:
        async with client_of(service) as client:
            (card,) = (await client.get("/v1/models")).json()["data"]
            assert card["id"] == NAME and card["max_model_len"] == 96
            assert (await client.get(f"/v1/models/{NAME}")).json() == card
            assert (await client.get("/health")).json() == {"status": "ok"}
            body: dict[str, Any] = {"prompt": "</s>एक", "add_special_tokens": False}
            tokens = (await client.post("/tokenize", json=body)).json()["tokens"]
            assert tokens[0] == service.parser.tokenizer.eos_id
            with_bos = (await client.post("/tokenize", json={"prompt": "एक"})).json()["tokens"]
            assert with_bos == service.parser.lm.encode("एक")
            text = await client.post("/detokenize", json={"tokens": with_bos})
            assert text.json() == {"prompt": "एक"}
            assert (await client.get("/tokenizer_info")).json()["eos_token"] == "</s>"

    asyncio.run(ask())


def test_metrics_are_prometheus_text(service: Service) -> None:
    parser = pytest.importorskip("prometheus_client.parser")
    complete(service)

    async def ask() -> str:
        async with client_of(service) as client:
            return (await client.get("/metrics")).text

    families = {one.name: one for one in parser.text_string_to_metric_families(asyncio.run(ask()))}
    assert families["mooshak_slots"].samples[0].value == 4
    assert families["mooshak_running"].samples[0].value == 0
    assert families["mooshak_generated_tokens"].samples[0].value > 0
    reasons = {one.labels["reason"]: one.value for one in families["mooshak_samples"].samples}
    assert reasons["length"] > 0
    times = {one.name: one.value for one in families["mooshak_first_token_seconds"].samples}
    assert times["mooshak_first_token_seconds_count"] > 0
    routes = [one.labels for one in families["mooshak_responses"].samples]
    assert {"route": "/v1/completions", "status": "200"} in routes


def run(service: Service, ask: Any) -> Any:
    async def start() -> Any:
        async with client_of(service) as client:
            return await ask(client)

    coroutine: Coroutine[Any, Any, Any] = start()
    return asyncio.run(coroutine)


def test_a_key_is_checked(checkpoints: dict[str, Path]) -> None:
    with application("torch", checkpoints["llama"], api_key="secret") as service:

        async def ask(client: httpx2.AsyncClient) -> None:
            for given in ({}, {"Authorization": "Bearer secre"}, {"Authorization": "secret"}):
                response = await client.get("/v1/models", headers=given)
                assert response.status_code == 401
                assert response.json()["error"]["code"] == "invalid_api_key"
            right = {"Authorization": "Bearer secret"}
            assert (await client.get("/v1/models", headers=right)).status_code == 200
            for path in ("/", "/health", "/metrics"):
                assert (await client.get(path)).status_code == 200
            # A page of this machine may ask; its question has no key.
            asks = {"Origin": "http://127.0.0.1:8001", "Access-Control-Request-Method": "POST"}
            allowed = await client.options("/v1/completions", headers=asks)
            assert allowed.headers["access-control-allow-origin"] == asks["Origin"]
            other = await client.get("/health", headers={"Origin": "http://evil.example"})
            assert "access-control-allow-origin" not in other.headers

        run(service, ask)


def test_a_full_queue_and_a_drain_answer_503(checkpoints: dict[str, Path]) -> None:
    with application("torch", checkpoints["llama"]) as service:
        scheduler = service.scheduler
        scheduler.max_waiting = 0
        response = post(service, "/v1/completions", {"prompt": "a"})
        assert response.status_code == 503 and response.headers["retry-after"] == "1"
        assert "0 requests are waiting" in response.json()["error"]["message"]
        scheduler.max_waiting = 64
        service.draining = True
        scheduler.close()
        response = post(service, "/v1/completions", {"prompt": "a"})
        assert response.status_code == 503 and "shutting down" in response.text
        health = run(service, lambda client: client.get("/health"))
        assert (health.status_code, health.json()) == (503, {"status": "draining"})


def test_a_request_ends_after_its_time(checkpoints: dict[str, Path]) -> None:
    with application("torch", checkpoints["llama"], timeout=0.03) as service:
        body: dict[str, Any] = {"prompt": "a", "max_tokens": 90, "ignore_eos": True, "n": 8}
        response = post(service, "/v1/completions", body)
        assert response.status_code == 504
        assert response.json()["error"]["message"] == "the request took more than 0.03 seconds"
        events = stream_of(post(service, "/v1/completions", body | {"stream": True}).text)
        assert events[-1]["error"]["code"] == "timeout"
        while service.scheduler.n_running or service.scheduler.n_waiting:
            time.sleep(0.01)
        assert service.scheduler.counters.finished["cancelled"] > 0


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_failing_engine_is_an_error_of_the_server(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with application("torch", checkpoints["llama"]) as service:

        def fail(*_: Any) -> None:
            raise RuntimeError("out of memory")

        monkeypatch.setattr(service.scheduler.engine, "step", fail)
        response = post(service, "/v1/completions", {"prompt": "a"})
        assert response.status_code == 500
        assert response.json()["error"]["code"] == "engine_failed"
        health = run(service, lambda client: client.get("/health"))
        assert (health.status_code, health.json()) == (503, {"status": "failed"})


def test_the_page_has_its_facts(checkpoints: dict[str, Path]) -> None:
    with application("torch", checkpoints["llama"], peer="http://127.0.0.1:1/</script>") as service:
        text = run(service, lambda client: client.get("/")).text
    facts = text.split('id="facts">')[1].split("</script>")[0]
    assert json.loads(facts) == {"peer": "http://127.0.0.1:1/</script>", "needs_key": False}
    assert "--paper" in text and "/* STYLE */" not in text
