"""Responses to requests at work: in full, or as server-sent events; both end with their client."""

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass
from typing import Any

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from mooshak.serving.answers import Choice, usage
from mooshak.serving.fields import ApiError
from mooshak.serving.service import Service
from mooshak.serving.work import Work

CLIENT_LEFT = 499
"""Status that nobody receives; nginx logs it too."""
LINE_SEPARATORS = re.compile("[\u0085\u2028\u2029]")
"""JSON may contain them; some clients take them for ends of lines."""


def too_late(service: Service) -> ApiError:
    """Return the error of a request that has taken more than its time."""
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
        return CompactJSON({**self.head, "choices": bodies, "usage": used})

    async def chunks(self) -> AsyncIterator[str]:
        """Yield the chunks of a stream as JSON; after a failure its error is the last one."""
        request = self.work.request
        no_usage = {"usage": None} if request.include_usage else {}
        try:
            async for found in self.work.events():
                for index, event in found:
                    self.choices[index].push(event)
                    for chunk in self.choices[index].chunks():
                        yield to_json({**self.head, "choices": [chunk], **no_usage})
        except ApiError as error:
            yield to_json(error.body())
            return
        self.observe()
        if request.include_usage:
            yield to_json({**self.head, "choices": [], "usage": usage(request, self.choices)})

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
        await unless_disconnected(receive, self._send(send), self.answer.work)

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
                await _send_event(send, to_json(too_late(service).body()))
                await _send_event(send, "[DONE]", more=False)


async def _send_event(send: Send, data: str, more: bool = True) -> None:
    body = f"data: {LINE_SEPARATORS.sub(_escaped, data)}\n\n".encode()
    await send({"type": "http.response.body", "body": body, "more_body": more})


def _escaped(match: re.Match[str]) -> str:
    return f"\\u{ord(match[0]):04x}"


async def unless_disconnected(
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


def to_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


class CompactJSON(JSONResponse):
    def render(self, content: Any) -> bytes:
        return to_json(content).encode()
