"""Continuous batching: requests join and leave the slots of an engine at any step.

A prompt is prefilled in chunks, one prompt after the other. Slots keep the keys and values of their
prompt after the request has ended: a prompt that begins with the same tokens, such as the other
samples of a request or the next turn of a chat, starts after the complete chunks that are equal.
What was decoded token by token is not reused, because its bits differ from those of a prefill.

The result of a request is a function of the request alone: every computation has one shape
(mooshak/serving/engine.py), and the noise is that of (seed, sample, position).
"""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from mooshak.config.generate import GenerateConfig
from mooshak.errors import InputError, require
from mooshak.generation.adjustments import Adjustments, RowAdjustments
from mooshak.generation.completion import Completion, Row
from mooshak.generation.lm import LM
from mooshak.generation.log_probs import TokenLogProbs, join_log_probs
from mooshak.generation.parameters import SamplingParameters
from mooshak.generation.text import check_tokens
from mooshak.numerics.sampling_noise import noise
from mooshak.serving.engine import Engine, StepInputs
from mooshak.serving.events import Counters, Event, QueueFullError, Ticket, Token

PREFILL_CHUNKS = 4
"""Chunks of prompts between two tokens of the requests that are decoded: bounds their delay."""


@dataclass(eq=False)
class _Sample:
    """A sample that waits or has a slot."""

    ticket: Ticket
    prompt: list[int]
    settings: GenerateConfig
    ends: set[int]
    row: Row
    uniform_T: np.ndarray
    on_event: Callable[[Event], None]
    adjuster: RowAdjustments | None = None
    """Made when the sample gets a slot: it is as large as the vocabulary."""
    prompt_chunks: list[TokenLogProbs] = field(default_factory=list)
    n_generated: int = 0


@dataclass(eq=False)
class _Slot:
    """A row of the engine."""

    index: int
    sample: _Sample | None = None
    prefix: list[int] = field(default_factory=list)
    """Tokens whose keys and values are in the slot as a prefill writes them."""
    length: int = 0
    """Number of tokens with keys and values."""

    @property
    def ready(self) -> bool:
        """True if the sample's next token can be sampled: its prompt is prefilled."""
        return self.sample is not None and self.length >= len(self.sample.prompt)


class Scheduler:
    """Requests of many clients on one engine. `submit` and `close` may be called by any thread."""

    def __init__(self, lm: LM, engine: Engine, max_waiting: int = 1024):
        self.lm, self.engine, self.max_waiting = lm, engine, max_waiting
        self.counters = Counters()
        self.slots = [_Slot(i) for i in range(engine.n_slots)]
        self._waiting: deque[_Sample] = deque()
        self._news = threading.Condition()
        self.failed = False
        """True after an exception of the engine."""
        self._closed: str | None = None

    @property
    def n_running(self) -> int:
        """Number of samples with a slot."""
        return sum(slot.sample is not None for slot in self.slots)

    @property
    def n_waiting(self) -> int:
        """Number of samples without a slot."""
        return len(self._waiting)

    def submit(
        self,
        prompt: Sequence[int],
        settings: GenerateConfig,
        on_event: Callable[[Event], None],
        more_ends: set[int] | None = None,
        streamed: bool = True,
    ) -> Ticket:
        """Queue a request; `on_event` is called in the thread of `run`.

        `more_ends` are further end tokens. Without `streamed` the text is decoded once, at the end.
        Raises `InputError` for a request that cannot be served, `QueueFullError` if too many wait
        or the scheduler is closed.
        """
        ids = list(prompt)
        self._check(ids, settings)
        ticket, ends = Ticket(), self.lm.ends(settings) | (more_ends or set())
        for adjuster in self.lm.adjusters([ids], settings, ends):  # For its errors.
            adjuster.offset()
        samples = []
        for index in range(settings.n):
            row = Row(self.lm.tokenizer, ids, index, settings, ends, streamed)
            uniform_T = noise(settings.seed, index, settings.max_new_tokens)
            samples.append(_Sample(ticket, ids, settings, ends, row, uniform_T, on_event))
        with self._news:
            if self._closed:
                raise QueueFullError(self._closed)
            if len(self._waiting) + len(samples) > self.max_waiting:
                raise QueueFullError(f"{len(self._waiting)} requests are waiting")
            self._waiting.extend(samples)
            self._news.notify()
        return ticket

    def close(self, drain: bool = True) -> None:
        """Accept no more requests, and let `run` return: with `drain` when all have ended."""
        with self._news:
            self._closed = "the server is shutting down"
            if not drain:
                for sample in self._unfinished():
                    sample.ticket.cancel()
            self._news.notify()

    def run(self) -> None:
        """Work until the scheduler is closed. An exception of the engine ends all requests."""
        try:
            while True:
                with self._news:
                    while not (self._waiting or self.n_running or self._closed):
                        self._news.wait()
                    if self._closed and not (self._waiting or self.n_running):
                        return
                self.step()
        except BaseException as error:
            with self._news:
                self.failed, self._closed = True, f"the engine failed: {error}"
                lost = self._unfinished()
                self._waiting.clear()
            for sample in lost:
                self._end(sample, error=self._closed)
            raise

    def generate(
        self, prompts: Sequence[Sequence[int]], settings: Sequence[GenerateConfig]
    ) -> list[list[Completion]]:
        """Return the samples of each prompt, in the calling thread, which must be the only one.

        Raises `InputError` for a request that cannot be served.
        """
        found: list[dict[int, Completion]] = [{} for _ in prompts]
        errors: list[str] = []

        def receiver(place: int) -> Callable[[Event], None]:
            def receive(event: Event) -> None:
                if event.error is not None:
                    errors.append(event.error)
                if event.completion is not None:
                    found[place][event.index] = event.completion

            return receive

        for place, (ids, one) in enumerate(zip(prompts, settings, strict=True)):
            self.submit(ids, one, receiver(place), streamed=False)
        while self._waiting or self.n_running:
            self.step()
        if errors:
            raise InputError(errors[0])
        return [[samples[i] for i in sorted(samples)] for samples in found]

    def step(self) -> None:
        """Prefill some chunks of waiting prompts; generate a token of every ready sample."""
        self._drop_cancelled()
        n_chunks = 0
        while n_chunks < PREFILL_CHUNKS and self._prefill_chunk():
            n_chunks += 1
        if any(slot.ready for slot in self.slots):
            self._decode()

    def _unfinished(self) -> list[_Sample]:
        return [*self._waiting, *(slot.sample for slot in self.slots if slot.sample is not None)]

    def _check(self, ids: list[int], settings: GenerateConfig) -> None:
        limit = self.engine.max_len
        if not ids:
            raise InputError("the prompt has no tokens")
        check_tokens(ids, self.engine.config)
        beams, draft = settings.num_beams, settings.draft
        require(
            beams == 1, f"generate.num_beams {beams}: the engine has no beam search; set it to 1"
        )
        require(draft is None, "generate.draft: the engine uses no draft model; leave it out")
        if len(ids) + settings.max_new_tokens > limit:
            raise InputError(
                f"the prompt has {len(ids)} tokens; with generate.max_new_tokens "
                f"{settings.max_new_tokens} the text is longer than {limit}"
            )

    def _drop_cancelled(self) -> None:
        with self._news:
            dropped = [sample for sample in self._waiting if sample.ticket.cancelled]
            for sample in dropped:
                self._waiting.remove(sample)
        for sample in dropped:
            self._end(sample, error="cancelled")
        for slot in self.slots:
            if slot.sample is not None and slot.sample.ticket.cancelled:
                self._end(self._free(slot), error="cancelled")

    def _prefill_chunk(self) -> bool:
        """Prefill one chunk; return whether there was one."""
        begun = (slot for slot in self.slots if slot.sample is not None and not slot.ready)
        slot = next(begun, None) or self._admit()
        if slot is None or slot.sample is None:
            return False
        sample, start = slot.sample, slot.length
        chunk = sample.prompt[start : start + self.engine.chunk]
        end = start + len(chunk)
        wants, n_top = sample.settings.prompt_logprobs, sample.settings.top_logprobs
        # Nothing follows the last token; any target has the same shape.
        targets = [*sample.prompt[start + 1 : end + 1], 0][: len(chunk)] if wants else None
        found = self.engine.prefill(slot.index, chunk, start, targets, top=bool(n_top))
        if found is not None:
            sample.prompt_chunks.append(found)
        slot.prefix += chunk
        slot.length = end
        if slot.ready:
            # Position max_len - 1 may be overwritten while the slot is not in use.
            slot.prefix = slot.prefix[: self.engine.max_len - 1]
            if wants:
                sample.row.prompt_log_probs = join_log_probs(sample.prompt_chunks, -1)
                prompt = _prompt_tokens(sample.row)
                sample.on_event(Event(sample.row.index, prompt=prompt))
            if not sample.settings.max_new_tokens:
                self._end(self._free(slot))
        return True

    def _admit(self) -> _Slot | None:
        """Give the first waiting sample a slot with as much of its prompt as possible."""
        free = [slot for slot in self.slots if slot.sample is None]
        with self._news:
            if not free or not self._waiting:
                return None
            sample = self._waiting.popleft()
        limit = 0 if sample.settings.prompt_logprobs else len(sample.prompt) - 1
        known = {slot.index: self._reusable(slot, sample.prompt, limit) for slot in self.slots}
        best = max(self.slots, key=lambda slot: known[slot.index])
        # Overwrite the slot that holds the least.
        target = min(free, key=lambda slot: (len(slot.prefix), slot.index))
        if known[best.index] and best in free:
            target = best
        target.sample = sample  # Before a copy that may fail: `run` then ends the sample.
        if known[best.index] and best is not target:
            self.engine.copy_slot(best.index, target.index)
        target.length = known[best.index]
        target.prefix = sample.prompt[: target.length]
        sample.adjuster = next(
            iter(self.lm.adjusters([sample.prompt], sample.settings, sample.ends)), None
        )
        self.counters.prompt_tokens += len(sample.prompt)
        self.counters.reused_tokens += target.length
        return target

    def _reusable(self, slot: _Slot, prompt: list[int], limit: int) -> int:
        """Return how many of the first tokens of a prompt a slot has, in complete chunks."""
        equal = 0
        for mine, other in zip(slot.prefix, prompt[:limit], strict=False):
            if mine != other:
                break
            equal += 1
        return equal // self.engine.chunk * self.engine.chunk

    def _decode(self) -> None:
        adjustments = self._adjustments()
        ready = [slot for slot in self.slots if slot.ready]
        if not ready:
            return
        n_slots, greedy = self.engine.n_slots, GenerateConfig()
        position_B, uniform_B = np.zeros(n_slots, np.int64), np.zeros(n_slots)
        settings = [greedy] * n_slots
        for slot in self.slots:
            # Where nobody reads: the next token of an unused slot, or of an unfinished prefill.
            position_B[slot.index] = min(slot.length, self.engine.max_len - 1)
            if slot.ready and slot.sample is not None:
                settings[slot.index] = slot.sample.settings
                uniform_B[slot.index] = slot.sample.uniform_T[slot.sample.n_generated]
        samples = [slot.sample for slot in ready if slot.sample is not None]
        inputs = StepInputs(
            position_B,
            visible=max(slot.length for slot in ready) + 1,
            uniform_B=uniform_B,
            parameters=SamplingParameters.of(settings),
            adjustments=adjustments,
            log_probs=any(s.settings.logprobs for s in samples),
            top=any(s.settings.logprobs and s.settings.top_logprobs for s in samples),
            processed_B=np.array([one.processed_logprobs for one in settings]),
            continues=any(s.n_generated + 1 < s.settings.max_new_tokens for s in samples),
        )
        token_B, found = self.engine.step(inputs)
        for slot in ready:
            slot.length += 1
            self._push(slot, int(token_B[slot.index]), found)

    def _adjustments(self) -> Adjustments | None:
        """Return the adjustments of all slots; a sample for which no token is left ends."""
        rows: list[tuple[_Slot, RowAdjustments]] = []
        for slot in self.slots:
            if slot.ready and slot.sample is not None and slot.sample.adjuster is not None:
                try:
                    slot.sample.adjuster.offset()
                except InputError as error:
                    self._end(self._free(slot), error=str(error))
                else:
                    rows.append((slot, slot.sample.adjuster))
        if not rows:
            return None
        shape = (self.engine.n_slots, self.engine.config.vocab_size)
        bias_BV, penalty_BV, offset_BV = np.zeros(shape), np.ones(shape), np.zeros(shape)
        for slot, row in rows:
            bias_BV[slot.index], penalty_BV[slot.index] = row.bias_V, row.penalty_V
            offset_BV[slot.index] = row.offset_V
        return Adjustments(bias_BV, penalty_BV, offset_BV)

    def _push(self, slot: _Slot, id: int, log_probs: TokenLogProbs | None) -> None:
        """Append a token to the sample of a slot, which may end it."""
        sample = slot.sample
        assert sample is not None
        row, n_before = sample.row, len(sample.row.ids)
        text = row.push(id, log_probs, slot.index)
        if sample.adjuster is not None:
            sample.adjuster.push(id)
        sample.n_generated += 1
        tokens = tuple(_token(row, i) for i in range(n_before, len(row.ids)))
        self.counters.generated_tokens += len(tokens)
        if not row.done and sample.n_generated < sample.settings.max_new_tokens:
            sample.on_event(Event(row.index, text, tokens))
            return
        if row.stream is not None and row.decodes:
            text += row.stream.finish()
        self._end(self._free(slot), text, tokens)

    def _free(self, slot: _Slot) -> _Sample:
        """Take the sample from a slot, whose prompt stays for later ones."""
        sample = slot.sample
        assert sample is not None
        slot.sample, slot.length = None, len(slot.prefix)
        return sample

    def _end(
        self,
        sample: _Sample,
        text: str = "",
        tokens: tuple[Token, ...] = (),
        error: str | None = None,
    ) -> None:
        """Send the last event of a sample."""
        completion = None if error is not None else sample.row.completion()
        reason = completion.finish_reason if completion is not None else "error"
        reason = "cancelled" if error == "cancelled" else reason
        self.counters.finished[reason] = self.counters.finished.get(reason, 0) + 1
        event = Event(sample.row.index, text, tokens, completion=completion, error=error)
        sample.on_event(event)


def _token(row: Row, i: int) -> Token:
    """Return a generated token of a row, with the log-probabilities that were asked for."""
    log_prob = row.log_probs[i] if row.log_probs else None
    return Token(row.ids[i], log_prob, row.top_log_probs[i] if row.top_log_probs else None)


def _prompt_tokens(row: Row) -> tuple[Token, ...]:
    """Return the tokens of a prompt, with their log-probabilities."""
    found, n = row.prompt_log_probs, row.settings.top_logprobs
    assert found is not None
    rest = zip(row.prompt[1:], found.log_prob_B.tolist(), strict=True)
    tokens = [Token(id, p, found.top(i, n) if n else None) for i, (id, p) in enumerate(rest)]
    return Token(row.prompt[0]), *tokens
