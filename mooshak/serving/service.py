"""The state that all routes share: the model that is served, and the limits of its requests."""

import time
from dataclasses import dataclass, field

from mooshak.serving.metrics import Metrics
from mooshak.serving.protocol import Parser
from mooshak.serving.scheduler import Scheduler
from mooshak.tokenizer.token_texts import TokenTexts


@dataclass
class Service:
    """A model that is served, with its scheduler and limits."""

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
