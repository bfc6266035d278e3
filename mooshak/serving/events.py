"""Tokens, events and tickets of requests, and the counters of a scheduler."""

from dataclasses import dataclass, field

from mooshak.generation.completion import Completion


class QueueFullError(Exception):
    """Too many requests are waiting."""


@dataclass(frozen=True)
class Token:
    """A token of an output or a prompt."""

    id: int
    log_prob: float | None = None
    """log p under the model, in nats, if it was asked for; None for the first one of a prompt."""
    top: dict[int, float] | None = None
    """The most probable tokens at this place, with their log-probabilities, if asked for."""


@dataclass(frozen=True)
class Event:
    """News of a sample, in the order in which they happen."""

    index: int
    """Sample of the request, 0 .. n - 1."""
    text: str = ""
    """Text that became final."""
    tokens: tuple[Token, ...] = ()
    """Generated tokens, without end tokens."""
    prompt: tuple[Token, ...] | None = None
    """Tokens of the prompt, in the first event, if their log-probabilities were asked for."""
    completion: Completion | None = None
    """The result; in the last event, unless there is an error."""
    error: str | None = None
    """Reason why there is no result; in the last event."""


class Ticket:
    """A submitted request."""

    def __init__(self) -> None:
        self.cancelled = False

    def cancel(self) -> None:
        """End all samples at the next step: each has a last event with the error `cancelled`."""
        self.cancelled = True


@dataclass
class Counters:
    """Totals since the start."""

    prompt_tokens: int = 0
    """Tokens of prompts."""
    reused_tokens: int = 0
    """Tokens of prompts whose keys and values were reused."""
    generated_tokens: int = 0
    finished: dict[str, int] = field(default_factory=dict)
    """Finish reason, `cancelled` or `error` -> number of samples."""
