"""Figures of the server in Prometheus' text format."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from mooshak.serving.scheduler import Scheduler

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
"""Upper bounds of the buckets of times."""


class Histogram:
    """Numbers of observed values up to each bound."""

    def __init__(self, bounds: Sequence[float] = SECONDS):
        self.bounds, self.counts, self.sum = bounds, [0] * (len(bounds) + 1), 0.0

    def observe(self, value: float) -> None:
        """Count a value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value


class Metrics:
    """Counts of responses and times; samples and tokens are counted by the scheduler."""

    def __init__(self) -> None:
        self.responses: Counter[tuple[str, int]] = Counter()
        """Route and status -> number of responses."""
        self.first_token, self.duration = Histogram(), Histogram()

    def text(self, scheduler: Scheduler) -> str:
        """Return all figures."""
        counters, slots = scheduler.counters, scheduler.engine.n_slots
        finished = dict(counters.finished)  # The scheduler's thread changes it.
        lines = [
            *_metric("gauge", "slots", "Samples that can run at once.", {"": slots}),
            *_metric("gauge", "running", "Samples with a slot.", {"": scheduler.n_running}),
            *_metric("gauge", "waiting", "Samples without a slot.", {"": scheduler.n_waiting}),
            *_metric(
                "counter",
                "prompt_tokens_total",
                "Tokens of prompts.",
                {"": counters.prompt_tokens},
            ),
            *_metric(
                "counter",
                "reused_prompt_tokens_total",
                "Tokens of prompts whose keys and values were reused.",
                {"": counters.reused_tokens},
            ),
            *_metric(
                "counter",
                "generated_tokens_total",
                "Tokens of outputs.",
                {"": counters.generated_tokens},
            ),
            *_metric(
                "counter",
                "samples_total",
                "Samples that have ended.",
                {f'reason="{reason}"': number for reason, number in sorted(finished.items())},
            ),
            *_metric(
                "counter",
                "responses_total",
                "HTTP responses.",
                {
                    f'route="{route}",status="{status}"': number
                    for (route, status), number in sorted(self.responses.items())
                },
            ),
            *_histogram("first_token_seconds", "Time to the first token.", self.first_token),
            *_histogram("request_seconds", "Time of requests for tokens.", self.duration),
        ]
        return "\n".join(lines) + "\n"


def _metric(kind: str, name: str, text: str, values: Mapping[str, float]) -> Iterator[str]:
    yield f"# HELP mooshak_{name} {text}"
    yield f"# TYPE mooshak_{name} {kind}"
    for labels, value in values.items():
        yield f"mooshak_{name}{{{labels}}} {value}" if labels else f"mooshak_{name} {value}"


def _histogram(name: str, text: str, histogram: Histogram) -> Iterator[str]:
    yield from _metric("histogram", name, text, {})
    total = 0
    for bound, count in zip([*histogram.bounds, "+Inf"], histogram.counts, strict=True):
        total += count
        yield f'mooshak_{name}_bucket{{le="{bound}"}} {total}'
    yield f"mooshak_{name}_sum {histogram.sum}"
    yield f"mooshak_{name}_count {total}"
