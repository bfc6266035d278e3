"""HTTP server with the OpenAI API: routes, limits, streams; docs/serve.md describes it.

Requests are parsed in threads, the scheduler works in its own; everything else is in one event
loop.
"""

import asyncio
import hmac
import json
import re
import uuid
from collections.abc import Callable
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
from mooshak.serving.fields import ApiError, Fields
from mooshak.serving.protocol import Request, parse_json
from mooshak.serving.responses import (
    CLIENT_LEFT,
    Answer,
    CompactJSON,
    EventStream,
    too_late,
    unless_disconnected,
)
from mooshak.serving.service import Service
from mooshak.serving.work import Work
from mooshak.tokenizer.chat_template import encode_with_specials, find_template

NO_KEY = ("/", "/health", "/metrics")
"""Routes without a key."""
LOOPBACK = r"https?://(localhost|127\.\d+\.\d+\.\d+|\[::1\])(:\d+)?"
"""Origins of the pages that may read responses: servers of this machine, side by side."""
PAGE_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src *; "
    "frame-ancestors 'none'"
)
"""The page loads nothing, and is part of no other one."""
RETRY_AFTER = {"Retry-After": "1"}


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
                return await unless_disconnected(http.receive, answer.response(), work)
            except BaseException:
                work.cancel()
                raise
    except TimeoutError:
        raise too_late(service) from None


async def models(http: HTTPRequest) -> Response:
    """GET /v1/models."""
    return CompactJSON({"object": "list", "data": [_card(_service(http))]})


async def model(http: HTTPRequest) -> Response:
    """GET /v1/models/NAME."""
    service, name = _service(http), http.path_params["name"]
    if name != service.parser.name:
        text = f"the model {name} does not exist; this server has {service.parser.name}"
        raise ApiError(text, "model", status=404, code="model_not_found")
    return CompactJSON(_card(service))


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
    return CompactJSON({"tokens": ids, "count": len(ids), "max_model_len": parser.max_len})


async def detokenize(http: HTTPRequest) -> Response:
    """POST /detokenize, vLLM's: the text of token ids."""
    parser, found = _service(http).parser, Fields(parse_json(await _body(http)))
    ids = parser.ids(found.take("tokens", "a list"), "tokens")
    found.take("model", "a text")
    found.end()
    return CompactJSON({"prompt": parser.tokenizer.decode(ids)})


async def tokenizer_info(http: HTTPRequest) -> Response:
    """GET /tokenizer_info, vLLM's: what lm-eval asks for."""
    tokenizer, texts = _service(http).parser.tokenizer, _service(http).texts
    named = {f"{name}_token": getattr(tokenizer, f"{name}_id") for name in ("bos", "eos", "pad")}
    try:
        template = find_template(tokenizer)
    except InputError:
        template = None
    tokens = {name: texts.text_of(id) for name, id in named.items()}
    return CompactJSON({**tokens, "chat_template": template})


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
    style = (resources.files("mooshak.report") / "style.css").read_text("utf-8")
    html = (resources.files("mooshak.serving") / "page.html").read_text("utf-8")
    html = html.replace("/* STYLE */", style)
    html = html.replace("/* FACTS */", json.dumps(facts).replace("<", "\\u003c"))
    return HTMLResponse(html, headers={"Content-Security-Policy": PAGE_POLICY})


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
