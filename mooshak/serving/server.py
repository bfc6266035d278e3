"""HTTP server with the OpenAI API: routes, limits, streams; docs/serve.md describes it.

Requests are parsed in threads, the scheduler works in its own; everything else is in one event
loop.
"""

import asyncio
import hmac
import json
import re
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HTTPRequest
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mooshak.errors import InputError
from mooshak.serving.answers import Choice, usage
from mooshak.serving.fields import ApiError, Fields
from mooshak.serving.metrics import Metrics
from mooshak.serving.protocol import Parser, Request, parse_json
from mooshak.serving.scheduler import Scheduler
from mooshak.serving.token_texts import TokenTexts
from mooshak.serving.work import Work
from mooshak.tokenizer.chat_template import encode_with_specials, find_template

NO_KEY = ("/", "/health", "/metrics")
"""Routes without a key."""
LOOPBACK = r"https?://(localhost|127\.\d+\.\d+\.\d+|\[::1\])(:\d+)?"
"""Origins of the pages that may read responses: servers of this machine, side by side."""
CLIENT_LEFT = 499
"""Status that nobody receives; nginx logs it too."""
RETRY_AFTER = {"Retry-After": "1"}
LINE_SEPARATORS = re.compile("[\u0085\u2028\u2029]")
"""JSON may contain them; some clients take them for ends of lines."""


@dataclass
class Service:
    """What the routes share."""

    parser: Parser
    scheduler: Scheduler
    framework: str
    """`torch` or `jax`."""
    api_key: str | None
    max_body_bytes: int
    timeout: float
    """Seconds from the start of a request to the end of its response."""
    peer: str | None
    """Base URL of a second server, for the page."""
    draining: bool = False
    metrics: Metrics = field(default_factory=Metrics)
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.texts = TokenTexts(self.parser.tokenizer)


def make_app(service: Service, lifespan: Any) -> Starlette:
    """Return the ASGI application. `lifespan` starts and ends the scheduler's thread."""
    app = Starlette(
        routes=ROUTES,
        middleware=[
            Middleware(
                CORSMiddleware,
                allow_origin_regex=LOOPBACK,
                allow_methods=["GET", "POST"],
                allow_headers=["Authorization", "Content-Type", "X-Request-Id"],
                expose_headers=["X-Request-Id"],
            ),
            Middleware(Gate, service=service),
        ],
        exception_handlers={ApiError: _api_error, HTTPException: _http_error, Exception: _fault},
        lifespan=lifespan,
    )
    app.state.service = service
    return app


class Gate:
    """Gives each request an id, checks its key, and counts its response."""

    def __init__(self, app: ASGIApp, service: Service):
        self.app, self.service = app, service
        self.routes = {route.path for route in ROUTES}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        id = given if re.fullmatch(r"[\w.:-]{1,128}", given, re.ASCII) else uuid.uuid4().hex
        scope["state"] = {**scope.get("state", {}), "id": id}

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-request-id", id.encode())]
                route = scope["path"] if scope["path"] in self.routes else "other"
                self.service.metrics.responses[route, message["status"]] += 1
            await send(message)

        if scope["path"] not in NO_KEY and not self._has_key(headers.get(b"authorization", b"")):
            error = ApiError("the API key is missing or wrong", status=401, code="invalid_api_key")
            headers401 = {"WWW-Authenticate": "Bearer"}
            await _error_response(error, headers401)(scope, receive, send_with_id)
            return
        await self.app(scope, receive, send_with_id)

    def _has_key(self, authorization: bytes) -> bool:
        key = self.service.api_key
        return key is None or hmac.compare_digest(authorization, b"Bearer " + key.encode())


async def completions(http: HTTPRequest) -> Response:
    """POST /v1/completions."""
    return await _generate(http, _service(http).parser.completion)


async def chat_completions(http: HTTPRequest) -> Response:
    """POST /v1/chat/completions."""
    return await _generate(http, _service(http).parser.chat)


async def _generate(http: HTTPRequest, parse: Callable[[bytes], Request]) -> Response:
    """Answer a request for completions, within its time; cancel it if the client leaves."""
    service, start = _service(http), asyncio.get_running_loop().time()
    try:
        async with asyncio.timeout_at(start + service.timeout):
            body = await _body(http)
            # Tokenizing a long prompt must not stop the other streams.
            request = await asyncio.to_thread(parse, body)
            work = Work(service.scheduler, request)
            answer = Answer(service, work, http.state.id, start)
            try:
                await asyncio.to_thread(work.submit)
                if request.stream:
                    return EventStream(answer)
                return await _unless_disconnected(http.receive, answer.response(), work)
            except BaseException:
                work.cancel()
                raise
    except TimeoutError:
        raise _too_late(service) from None


def _too_late(service: Service) -> ApiError:
    text = f"the request took more than {service.timeout:g} seconds"
    return ApiError(text, status=504, code="timeout")


@dataclass
class Answer:
    """The response to a request at work."""

    service: Service
    work: Work
    id: str
    start: float

    def __post_init__(self) -> None:
        request = self.work.request
        n_choices = len(request.prompts) * request.n
        self.choices = [Choice(request, i, self.service.texts) for i in range(n_choices)]
        is_chat = request.is_chat
        kind = "chat.completion" if is_chat else "text_completion"
        self.head = {
            "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{self.id}",
            "object": kind + ".chunk" if is_chat and request.stream else kind,
            "created": int(time.time()),
            "model": self.service.parser.name,
        }

    async def response(self) -> Response:
        """Return the complete response. Raises `ApiError`."""
        async for found in self.work.events():
            for index, event in found:
                self.choices[index].push(event)
        self.observe()
        bodies = [choice.body() for choice in self.choices]
        used = usage(self.work.request, self.choices)
        return _Json({**self.head, "choices": bodies, "usage": used})

    async def chunks(self) -> AsyncIterator[str]:
        """Yield the chunks of a stream as JSON; after a failure its error is the last one."""
        request = self.work.request
        no_usage = {"usage": None} if request.include_usage else {}
        try:
            async for found in self.work.events():
                for index, event in found:
                    self.choices[index].push(event)
                    for chunk in self.choices[index].chunks():
                        yield _json({**self.head, "choices": [chunk], **no_usage})
        except ApiError as error:
            yield _json(error.body())
            return
        self.observe()
        if request.include_usage:
            yield _json({**self.head, "choices": [], "usage": usage(request, self.choices)})

    def observe(self) -> None:
        """Count the times of a request that has ended."""
        metrics, now = self.service.metrics, asyncio.get_running_loop().time()
        metrics.duration.observe(now - self.start)
        metrics.first_token.observe((self.work.first_token or now) - self.start)


class EventStream(Response):
    """The response as server-sent events."""

    media_type = "text/event-stream"

    def __init__(self, answer: Answer):
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self.answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await _unless_disconnected(receive, self._send(send), self.answer.work)

    async def _send(self, send: Send) -> None:
        head = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        service, start = self.answer.service, self.answer.start
        try:
            async with asyncio.timeout_at(start + service.timeout):
                await send(head)
                async for chunk in self.answer.chunks():
                    await _send_event(send, chunk)
                await _send_event(send, "[DONE]", more=False)
        except TimeoutError:
            # A client that does not read is not waited for.
            async with asyncio.timeout(1):
                await _send_event(send, _json(_too_late(service).body()))
                await _send_event(send, "[DONE]", more=False)


async def _send_event(send: Send, data: str, more: bool = True) -> None:
    body = f"data: {LINE_SEPARATORS.sub(_escaped, data)}\n\n".encode()
    await send({"type": "http.response.body", "body": body, "more_body": more})


def _escaped(match: re.Match[str]) -> str:
    return f"\\u{ord(match[0]):04x}"


async def _unless_disconnected(
    receive: Receive, answer: Coroutine[Any, Any, Any], work: Work
) -> Any:
    """Return what a coroutine returns; it is cancelled, with its work, if the client leaves."""
    task, gone = asyncio.ensure_future(answer), asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else Response(status_code=CLIENT_LEFT)
    finally:
        work.cancel()  # Nothing happens to samples that have ended.
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def models(http: HTTPRequest) -> Response:
    """GET /v1/models."""
    return _Json({"object": "list", "data": [_card(_service(http))]})


async def model(http: HTTPRequest) -> Response:
    """GET /v1/models/NAME."""
    service, name = _service(http), http.path_params["name"]
    if name != service.parser.name:
        text = f"the model {name} does not exist; this server has {service.parser.name}"
        raise ApiError(text, "model", status=404, code="model_not_found")
    return _Json(_card(service))


def _card(service: Service) -> dict[str, Any]:
    return {
        "id": service.parser.name,
        "object": "model",
        "created": service.created,
        "owned_by": "mooshak",
        "max_model_len": service.parser.max_len,
        "framework": service.framework,
    }


async def tokenize(http: HTTPRequest) -> Response:
    """POST /tokenize, vLLM's: token ids of a text, in which special tokens are recognised."""
    parser, found = _service(http).parser, Fields(parse_json(await _body(http)))
    prompt = found.take("prompt", "a text")
    special = found.take("add_special_tokens", "true or false", True)
    found.take("model", "a text")
    found.end()
    if prompt is None:
        raise ApiError("prompt must be a text", "prompt")
    bos = parser.tokenizer.encode("", bos=True) if special else []
    ids = bos + await asyncio.to_thread(encode_with_specials, parser.tokenizer, prompt)
    return _Json({"tokens": ids, "count": len(ids), "max_model_len": parser.max_len})


async def detokenize(http: HTTPRequest) -> Response:
    """POST /detokenize, vLLM's: the text of token ids."""
    parser, found = _service(http).parser, Fields(parse_json(await _body(http)))
    ids = parser.ids(found.take("tokens", "a list"), "tokens")
    found.take("model", "a text")
    found.end()
    return _Json({"prompt": parser.tokenizer.decode(ids)})


async def tokenizer_info(http: HTTPRequest) -> Response:
    """GET /tokenizer_info, vLLM's: what lm-eval asks for."""
    tokenizer, texts = _service(http).parser.tokenizer, _service(http).texts
    named = {f"{name}_token": getattr(tokenizer, f"{name}_id") for name in ("bos", "eos", "pad")}
    try:
        template = find_template(tokenizer)
    except InputError:
        template = None
    tokens = {name: texts.text_of(id) for name, id in named.items()}
    return _Json({**tokens, "chat_template": template})


async def health(http: HTTPRequest) -> Response:
    """GET /health: 200 while requests are accepted."""
    service = _service(http)
    status = "draining" if service.draining else "failed" if service.scheduler.failed else "ok"
    return JSONResponse({"status": status}, status_code=200 if status == "ok" else 503)


async def metrics(http: HTTPRequest) -> Response:
    """GET /metrics: Prometheus' text format."""
    service = _service(http)
    text = service.metrics.text(service.scheduler)
    return PlainTextResponse(text, headers={"Content-Type": "text/plain; version=0.0.4"})


async def page(http: HTTPRequest) -> Response:
    """GET /: the page on which prompts can be tried."""
    service = _service(http)
    facts = {"peer": service.peer, "needs_key": service.api_key is not None}
    # A data file of another package: the styles of all pages are one.
    style = (resources.files("mooshak.report") / "style.css").read_text()
    html = (resources.files("mooshak.serving") / "page.html").read_text()
    html = html.replace("/* STYLE */", style)
    html = html.replace("/* FACTS */", json.dumps(facts).replace("<", "\\u003c"))
    return HTMLResponse(html)


ROUTES = [
    Route("/v1/completions", completions, methods=["POST"]),
    Route("/v1/chat/completions", chat_completions, methods=["POST"]),
    Route("/v1/models", models),
    Route("/v1/models/{name:path}", model),
    Route("/tokenize", tokenize, methods=["POST"]),
    Route("/detokenize", detokenize, methods=["POST"]),
    Route("/tokenizer_info", tokenizer_info),
    Route("/health", health),
    Route("/metrics", metrics),
    Route("/", page),
]


def _service(http: HTTPRequest) -> Service:
    found: Service = http.app.state.service
    return found


async def _body(http: HTTPRequest) -> bytes:
    """Return the body of a request. Raises `ApiError` if it is too long or not called JSON."""
    # A form of a web page elsewhere can send any other type without asking this server.
    if http.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
        raise ApiError("the Content-Type must be application/json", status=415)
    limit = _service(http).max_body_bytes
    body = bytearray()
    try:
        async for part in http.stream():
            body += part
            if len(body) > limit:
                raise ApiError(f"the body has more than {limit} bytes", status=413)
    except ClientDisconnect:
        raise ApiError("the client has left", status=CLIENT_LEFT) from None
    return bytes(body)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


class _Json(JSONResponse):
    def render(self, content: Any) -> bytes:
        return _json(content).encode()


def _error_response(error: ApiError, headers: dict[str, str] | None = None) -> Response:
    headers = headers or (RETRY_AFTER if error.status == 503 else {})
    return JSONResponse(error.body(), error.status, headers)


async def _api_error(_: HTTPRequest, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return _error_response(error)


async def _http_error(http: HTTPRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    text = f"{http.method} {http.url.path}: {error.detail.lower()}"
    return _error_response(ApiError(text, status=error.status_code), dict(error.headers or {}))


async def _fault(_: HTTPRequest, error: Exception) -> Response:
    return _error_response(ApiError("the server has a fault; its log has more", status=500))
