"""The serve commands as processes: real clients, cancelled requests, drains, wrong options."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.serving.servers import NAME, Server, serve

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("compiled_in_haste")]

HINDI = "एक चूहा"
MESSAGES: Any = [{"role": "user", "content": HINDI}]
LONG: dict[str, Any] = {"prompt": "a", "max_tokens": 94, "extra_body": {"ignore_eos": True}}


@pytest.fixture(params=["torch", "jax"], scope="module")
def server(request: pytest.FixtureRequest, checkpoints: dict[str, Path]) -> Iterator[Server]:
    with serve(request.param, checkpoints["llama"]) as found:
        yield found


def client_of(server: Server, key: str = "none", **options: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url + "/v1", api_key=key, max_retries=0, **options)


def wait(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_openai_client_completes_and_streams(server: Server) -> None:
    client = client_of(server)
    assert [model.id for model in client.models.list()] == [NAME]
    options: dict[str, Any] = {"model": NAME, "prompt": [HINDI, "the lion"], "seed": 3, "n": 2}
    found = client.completions.create(**options, max_tokens=12, logprobs=0, stop=["zz"])
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    assert len({choice.text for choice in found.choices}) == 4
    for choice in found.choices:
        assert choice.logprobs is not None and choice.logprobs.token_logprobs is not None
        assert all(log_prob <= 0 for log_prob in choice.logprobs.token_logprobs)
    texts = ["", "", "", ""]
    usage = None
    extra = {"stream_options": {"include_usage": True}}
    for chunk in client.completions.create(**options, max_tokens=12, stream=True, extra_body=extra):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [choice.text for choice in found.choices]
    assert usage == found.usage


def test_openai_client_chats(server: Server) -> None:
    client = client_of(server)
    options: dict[str, Any] = {"model": NAME, "messages": MESSAGES, "seed": 3}
    options["max_completion_tokens"] = 12
    found = client.chat.completions.create(**options, logprobs=True)
    (choice,) = found.choices
    assert choice.message.role == "assistant" and choice.finish_reason in ("stop", "length")
    assert choice.logprobs is not None and choice.logprobs.content is not None
    assert found.usage is not None
    assert len(choice.logprobs.content) == found.usage.completion_tokens
    parts = [
        part.choices[0].delta.content or ""
        for part in client.chat.completions.create(**options, stream=True)
    ]
    assert "".join(parts) == choice.message.content


def test_openai_client_reads_top_logprobs(server: Server) -> None:
    client = client_of(server)
    found = client.completions.create(
        model=NAME, prompt=HINDI, logprobs=2, echo=True, max_tokens=2, temperature=0
    )
    logprobs = found.choices[0].logprobs
    assert logprobs is not None and logprobs.token_logprobs is not None
    assert logprobs.token_logprobs[0] is None
    assert logprobs.top_logprobs is not None and len(logprobs.top_logprobs[-1]) == 2
    chat = client.chat.completions.create(
        model=NAME, messages=MESSAGES, logprobs=True, top_logprobs=4, max_tokens=2
    )
    content = chat.choices[0].logprobs
    assert content is not None and content.content is not None
    assert [len(token.top_logprobs) for token in content.content] == [4, 4]


def test_openai_client_raises_its_errors(server: Server) -> None:
    client = client_of(server)
    with pytest.raises(openai.NotFoundError, match="the model gpt does not exist"):
        client.completions.create(model="gpt", prompt="a")
    with pytest.raises(openai.BadRequestError, match=r"top_p 2.0 must be in") as error:
        client.completions.create(model=NAME, prompt="a", top_p=2.0)
    assert error.value.param == "top_p" and error.value.type == "invalid_request_error"
    nothing_left = {"allowed_tokens": [5, 6], "no_repeat_ngram_size": 1}
    stream = client.completions.create(model=NAME, prompt=[5], stream=True, extra_body=nothing_left)
    with pytest.raises(openai.APIError, match="no token may follow"):
        list(stream)


def test_curl_gets_the_same_text(server: Server) -> None:
    body = {"prompt": HINDI, "seed": 3, "max_tokens": 12}
    found = client_of(server).completions.create(model=NAME, **body)  # type: ignore[call-overload]
    url = server.url + "/v1/completions"
    curl = ["curl", "-sS", "--fail-with-body", url, "-H", "Content-Type: application/json", "-d"]
    plain = subprocess.run([*curl, json.dumps(body)], capture_output=True, check=True).stdout
    assert json.loads(plain)["choices"][0]["text"] == found.choices[0].text
    command = [*curl, json.dumps(body | {"stream": True}), "-N"]
    lines = subprocess.run(command, capture_output=True, check=True).stdout.decode().split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    parts = [json.loads(line[6:])["choices"][0]["text"] for line in lines[:-2]]
    assert "".join(parts) == found.choices[0].text
    refused = subprocess.run([*curl, '{"prompt": 5}'], capture_output=True)
    assert refused.returncode == 22 and b'"param":"prompt"' in refused.stdout


def test_a_body_that_is_too_long_is_refused_early(server: Server, tmp_path: Path) -> None:
    (tmp_path / "long.json").write_bytes(b" " * 2**24)
    curl = ["curl", "-sS", server.url + "/v1/completions", "-H", "Content-Type: application/json"]
    curl += ["--data-binary", f"@{tmp_path / 'long.json'}", "-w", " %{http_code}"]
    found = subprocess.run(curl, capture_output=True, text=True)
    assert "the body has more than 4194304 bytes" in found.stdout and found.stdout.endswith("413")


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_slots(stream: bool, server: Server) -> None:
    before = server.metric("generated_tokens_total")
    body = {"prompt": "a", "max_tokens": 94, "n": 40, "ignore_eos": True, "stream": stream}
    text = json.dumps(body).encode()
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: {len(text)}\r\n"
        head += "Content-Type: application/json\r\n\r\n"
        connection.sendall(head.encode() + text)
        wait(lambda: server.metric("running") > 0)
    wait(lambda: server.metric("running") + server.metric("waiting") == 0)
    assert server.metric("generated_tokens_total") - before < 40 * 94


def test_a_slow_reader_does_not_stop_the_others(server: Server) -> None:
    body = {"prompt": "a", "max_tokens": 94, "n": 40, "ignore_eos": True, "stream": True}
    text = json.dumps(body | {"logprobs": 0}).encode()
    host, port = server.url.removeprefix("http://").split(":")
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect((host, int(port)))
        head = f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: {len(text)}\r\n"
        head += "Content-Type: application/json\r\n\r\n"
        connection.sendall(head.encode() + text)
        wait(lambda: server.metric("running") > 0)
        found = client_of(server).completions.create(model=NAME, **LONG)
        assert found.choices[0].finish_reason == "length"
        wait(lambda: server.metric("running") == 0)


def test_a_drain_finishes_requests_and_refuses_others(checkpoints: dict[str, Path]) -> None:
    with serve("torch", checkpoints["llama"]) as server:
        client = client_of(server)
        extra = {"ignore_eos": True}
        stream = client.completions.create(
            model=NAME, prompt="a", max_tokens=90, n=30, stream=True, extra_body=extra
        )
        next(stream)
        server.process.send_signal(signal.SIGTERM)
        health = subprocess.run(
            ["curl", "-s", "-w", " %{http_code}", server.url + "/health"], capture_output=True
        )
        assert health.stdout == b'{"status":"draining"} 503'
        with pytest.raises(openai.InternalServerError, match="shutting down"):
            client.completions.create(model=NAME, prompt="a")
        ended = {c.index for chunk in stream for c in chunk.choices if c.finish_reason}
        assert ended == set(range(30))
        client.close()
        assert server.process.wait(30) == 0
        assert server.process.stderr is not None
        assert "a second signal ends them" in server.process.stderr.read()


def test_a_second_signal_ends_at_once(checkpoints: dict[str, Path]) -> None:
    with serve("torch", checkpoints["llama"]) as server:
        stream = client_of(server).completions.create(
            model=NAME, prompt="a", max_tokens=90, n=60, stream=True
        )
        next(stream)
        server.process.send_signal(signal.SIGINT)
        assert server.process.stderr is not None
        assert "finishing" in server.process.stderr.readline()
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(10) == -signal.SIGTERM


def test_a_key_comes_from_the_environment(checkpoints: dict[str, Path]) -> None:
    env = {**os.environ, "MOOSHAK_API_KEY": "secret"}
    with serve("torch", checkpoints["llama"], env=env) as server:
        assert len(client_of(server, "secret").models.list().data) == 1
        with pytest.raises(openai.AuthenticationError, match="the API key is missing or wrong"):
            client_of(server, "other").models.list()


def test_jax_serves_on_a_mesh(checkpoints: dict[str, Path]) -> None:
    body: dict[str, Any] = {"model": NAME, "prompt": HINDI, "seed": 3, "max_tokens": 12}
    texts = []
    for options in ([], ["--mesh", "tensor=2"]):
        env = {**os.environ, "JAX_NUM_CPU_DEVICES": "2"}
        with serve("jax", checkpoints["llama"], *options, env=env) as server:
            texts.append(client_of(server).completions.create(**body).choices[0].text)
    assert texts[0] == texts[1]


def test_an_open_address_without_a_key_is_a_warning(checkpoints: dict[str, Path]) -> None:
    with serve("torch", checkpoints["llama"], "--host", "0.0.0.0") as server:
        assert server.process.stderr is not None
        assert "without a key; set MOOSHAK_API_KEY" in server.process.stderr.readline()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--port", "70000"], "--port 70000 must be in 0 .. 65535"),
        (["--host", "203.0.113.1"], "cannot listen on 203.0.113.1 port 0: "),
        (["--host", ""], "--host is empty"),
        (["--host", "no such host"], "cannot listen on no such host port 0: "),
        (["--n-slots", "0"], "n_slots 0 must be at least 1"),
        (["--max-len", "97"], "max_len 97 is not in 2 .. 96"),
        (["--chunk", "0"], "chunk 0 must be at least 1"),
        (["--max-waiting", "0"], "--max-waiting 0 must be at least 1"),
        (["--max-body-bytes", "0"], "--max-body-bytes 0 must be at least 1"),
        (["--timeout", "0"], "--timeout 0 must be positive"),
        (["--timeout", "nan"], "--timeout nan must be positive"),
        (["--peer", "localhost:8001"], "--peer localhost:8001 is not a URL like"),
        (["--tokenizer", "absent"], "absent"),
    ],
)
def test_a_wrong_option_is_one_line(
    options: list[str], message: str, checkpoints: dict[str, Path]
) -> None:
    found = start("torch", str(checkpoints["llama"]), *options)
    assert found.returncode == 2 and found.stdout == ""
    (line,) = found.stderr.splitlines()
    assert line.startswith("error: ") and message in line


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_what_cannot_be_served_is_one_line(
    framework: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    absent = start(framework, str(tmp_path / "absent"))
    assert absent.returncode == 2 and "absent" in absent.stderr.splitlines()[-1]
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        found = start(framework, str(checkpoints["llama"]), "--port", port)
    assert found.returncode == 2
    line = f"error: cannot listen on 127.0.0.1 port {port}: Address already in use"
    assert found.stderr.splitlines() == [line]
    env = {**os.environ, "MOOSHAK_API_KEY": ""}
    found = start(framework, str(checkpoints["llama"]), env=env)
    assert found.returncode == 2 and "MOOSHAK_API_KEY is empty" in found.stderr


def start(
    framework: str, *words: str, env: dict[str, str] | None = None
) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", f"mooshak_{framework}.serve", "--port", "0"]
    command += ["--device", "cpu", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=env)
