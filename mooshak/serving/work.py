"""A request at work: its samples in the scheduler, and their events in the server's event loop."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import suppress

from mooshak.errors import InputError
from mooshak.serving.events import Event, QueueFullError, Ticket
from mooshak.serving.fields import ApiError
from mooshak.serving.protocol import Request, named_error
from mooshak.serving.scheduler import Scheduler

CANCELLED = "cancelled"
"""Error of the last event of a cancelled sample."""

Found = list[tuple[int, Event]]
"""Indices of samples among those of all prompts, with their events."""


class Work:
    """The samples of a request, from `submit` to `cancel`, both in the event loop's process.

    The queue of a slow reader is as long as its own request; other requests do not wait for it.
    """

    def __init__(self, scheduler: Scheduler, request: Request):
        self.scheduler, self.request = scheduler, request
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Found] = asyncio.Queue()
        self._tickets: list[Ticket] = []
        self._cancelled = False
        self._left = len(request.prompts) * request.n
        self.first_token: float | None = None
        """Time of the first token, or of the end of a sample without one."""

    def submit(self) -> None:
        """Submit all samples, or none. May run in any thread. Raises `ApiError`."""
        request = self.request
        try:
            for place, prompt in enumerate(request.prompts):
                ticket = self.scheduler.submit(
                    prompt.ids,
                    prompt.settings,
                    self._receiver(place * request.n),
                    set(request.more_ends),
                    streamed=request.stream,
                )
                self._tickets.append(ticket)
                if self._cancelled:
                    ticket.cancel()
        except InputError as error:
            self.cancel()
            raise named_error(error, request.names) from error
        except QueueFullError as error:
            self.cancel()
            raise ApiError(f"{error}; try again later", status=503, code="overloaded") from error

    def cancel(self) -> None:
        """Free the slots; nothing happens to samples that have ended."""
        self._cancelled = True  # Before: `submit` may still run.
        for ticket in self._tickets:
            ticket.cancel()

    async def events(self) -> AsyncIterator[Found]:
        """Yield the events, until all samples have ended. Raises `ApiError` if one fails.

        If the request is not streamed, the events of a sample come together.
        """
        while self._left:
            found = await self._queue.get()
            for _, event in found:
                if event.error is not None:
                    raise self._failure(event.error)
                self._left -= event.completion is not None
            yield found

    def _receiver(self, first: int) -> Callable[[Event], None]:
        """Return what the scheduler calls, in its thread, with the events of a prompt."""
        pending: dict[int, Found] = {}

        def receive(event: Event) -> None:
            found = pending.setdefault(event.index, [])
            found.append((first + event.index, event))
            is_last = event.completion is not None or event.error is not None
            if self.first_token is None and (event.tokens or is_last):
                self.first_token = self._loop.time()
            if self.request.stream or is_last:
                pending[event.index] = []
                # The loop is closed where the process ends without waiting for requests.
                with suppress(RuntimeError):
                    self._loop.call_soon_threadsafe(self._queue.put_nowait, found)

        return receive

    def _failure(self, error: str) -> ApiError:
        if error == CANCELLED:
            return ApiError("the server is shutting down", status=503, code="overloaded")
        if self.scheduler.failed:
            return ApiError(error, status=500, code="engine_failed")
        return named_error(InputError(error), self.request.names)
