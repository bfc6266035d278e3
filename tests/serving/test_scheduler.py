"""Continuous batching: a request has the same bits alone and with any neighbours."""

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch

from mooshak.config.generate import GenerateConfig
from mooshak.errors import InputError
from mooshak.generation.completion import Completion
from mooshak.serving.events import Event, QueueFullError
from mooshak.serving.scheduler import Scheduler
from mooshak_torch.ops.activations import swiglu
from tests.serving.conftest import load, make_scheduler

SETTINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0, "seed": 3},
    {"temperature": 1.3, "top_k": 20, "top_p": 0.8, "seed": 1},
    {"temperature": 0.9, "min_p": 0.05, "typical_p": 0.9},
    {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2},
    {"temperature": 1.0, "presence_penalty": 0.5, "frequency_penalty": 0.7, "n": 3},
    {"temperature": 2.0, "allowed_tokens": (5, 6, 7, 90, 300), "min_new_tokens": 9},
    {"temperature": 1.0, "n": 2, "seed": 8, "top_k": 300},
]


def requests() -> list[tuple[list[int], GenerateConfig]]:
    draw, found = random.Random(0), []
    common = [draw.randrange(3, 500) for _ in range(40)]
    for i, settings in enumerate(SETTINGS):
        prompt = [draw.randrange(3, 500) for _ in range((1, 7, 16, 33, 70, 2, 15, 48)[i])]
        prompt = common[: 20 * (i % 3)] + prompt[: 50 if i % 3 else 70]
        found.append((prompt, GenerateConfig(max_new_tokens=5 + 2 * i, logprobs=True, **settings)))
    return found


def run(scheduler: Scheduler, chosen: list[int], steps_between: int = 0) -> dict[int, Any]:
    """Run requests in this order, each after some steps of those before it."""
    found: dict[int, dict[int, Completion]] = {}
    every = requests()
    for number in chosen:
        prompt, settings = every[number]

        def receive(event: Any, number: int = number) -> None:
            assert event.error is None
            if event.completion is not None:
                found.setdefault(number, {})[event.index] = event.completion

        scheduler.submit(prompt, settings, receive)
        for _ in range(steps_between):
            scheduler.step()
    while scheduler.n_running or scheduler.n_waiting:
        scheduler.step()
    return {number: [samples[i] for i in sorted(samples)] for number, samples in found.items()}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["mooshak", "llama"])
@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_bits_do_not_depend_on_neighbours(
    framework: str, name: str, dtype: str, checkpoints: dict[str, Path]
) -> None:
    lm = load(framework, checkpoints[name], dtype)
    fresh = make_scheduler(framework, lm)
    alone = {}
    for number in range(len(SETTINGS)):
        alone |= run(fresh, [number])
        for slot in fresh.slots:  # No prefix of another request.
            slot.prefix, slot.length = [], 0
    order = list(range(len(SETTINGS)))
    together = make_scheduler(framework, lm)
    assert run(together, order) == alone
    # With the prefixes and the contents of the slots of the earlier requests.
    for seed, steps_between in ((1, 1), (2, 3), (3, 0)):
        random.Random(seed).shuffle(order)
        assert run(together, order, steps_between) == alone
    assert together.counters.reused_tokens > 100


@pytest.mark.parametrize("n_rows", [3, 16])
@pytest.mark.parametrize("width", [65, 68, 64, 11008])
@pytest.mark.parametrize("n_threads", [1, 3])
def test_gate_of_a_token_does_not_depend_on_its_row(
    n_threads: int, width: int, n_rows: int
) -> None:
    """Vector loops compute the end of a tensor, or of a thread's share, in another way."""
    before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            row_1D = torch.randn(1, width, generator=torch.Generator().manual_seed(0)).to(dtype)
            rows_B1D = row_1D.expand(n_rows, 1, width).contiguous()
            with torch.no_grad():
                found_B1D = swiglu(rows_B1D, torch.ones_like(rows_B1D))
            assert all(torch.equal(one, found_B1D[0]) for one in found_B1D)
    finally:
        torch.set_num_threads(before)


@pytest.fixture
def x64() -> Iterator[None]:
    """`load` turns x64 on for the process."""
    before = jax.config.jax_enable_x64  # type: ignore[attr-defined]
    yield
    jax.config.update("jax_enable_x64", before)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["mooshak", "llama"])
def test_float64_engines_equal_generate_and_score(name: str, checkpoints: dict[str, Path]) -> None:
    found = {}
    for framework in ("torch", "jax"):
        lm = load(framework, checkpoints[name], "float64")
        found[framework] = results = run(make_scheduler(framework, lm), list(range(len(SETTINGS))))
        for number, (prompt, settings) in enumerate(requests()):
            one, *_ = results[number]
            plain = lm._complete([prompt], [0], settings)[0]
            assert one.token_ids == plain.token_ids and one.text == plain.text
            scores = lm.score([*prompt, *one.token_ids])[len(prompt) - 1 :]
            assert np.allclose(one.logprobs, scores, atol=1e-12, rtol=0)
    for number, samples in found["torch"].items():
        for mine, other in zip(samples, found["jax"][number], strict=True):
            assert mine.token_ids == other.token_ids


@pytest.fixture(params=["torch", "jax"])
def scheduler(request: pytest.FixtureRequest, checkpoints: dict[str, Path]) -> Scheduler:
    return make_scheduler(request.param, load(request.param, checkpoints["llama"]))


def generate(scheduler: Scheduler, prompt: list[int], **settings: Any) -> list[Completion]:
    return scheduler.generate([prompt], [GenerateConfig(logprobs=True, **settings)])[0]


@contextmanager
def compilations() -> Iterator[list[str]]:
    """Record what JAX compiles inside the block."""
    found: list[str] = []
    active = True

    def listen(event: str, seconds: float, **more: Any) -> None:
        if active and "compile" in event:
            found.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield found
    active = False


@pytest.mark.slow
def test_jax_compiles_nothing_after_the_start(checkpoints: dict[str, Path]) -> None:
    scheduler = make_scheduler("jax", load("jax", checkpoints["llama"]), n_slots=3)
    scheduler.engine.warm_up()
    with compilations() as compiled:
        assert run(scheduler, list(range(len(SETTINGS))))
        assert compiled == []
        jax.jit(lambda x: x + len(compiled))(1.0)
    assert compiled  # They are recorded.


@pytest.mark.slow
def test_prefixes_are_shared_by_samples_and_turns(scheduler: Scheduler) -> None:
    prompt = list(range(3, 43))  # Two chunks of 16 and a part of one.
    samples = generate(scheduler, prompt, max_new_tokens=8, n=3, temperature=1.0, ignore_eos=True)
    assert len({tuple(one.token_ids) for one in samples}) == 3
    counters = scheduler.counters
    assert (counters.prompt_tokens, counters.reused_tokens) == (120, 64)
    turn = [*prompt, *samples[0].token_ids, 5, 6, 7]
    after = generate(scheduler, turn, max_new_tokens=8)
    assert counters.reused_tokens == 96  # The reply is prefilled.
    generate(scheduler, turn, max_new_tokens=1)
    assert counters.reused_tokens == 96 + 48
    assert generate(fresh(scheduler), turn, max_new_tokens=8) == after


def fresh(scheduler: Scheduler) -> Scheduler:
    """Return a scheduler on a new engine of the same kind."""
    return Scheduler(scheduler.lm, type(scheduler.engine)(scheduler.lm, 4, chunk=16))


@pytest.mark.slow
def test_texts_may_be_as_long_as_the_model(scheduler: Scheduler) -> None:
    draw = random.Random(1)
    prompt = [draw.randrange(3, 500) for _ in range(90)]
    (full,) = generate(scheduler, prompt, max_new_tokens=6, ignore_eos=True)
    assert len(full.token_ids) == 6
    text = prompt + full.token_ids
    assert np.allclose(full.logprobs, scheduler.lm.score(text)[89:], atol=1e-4)
    with pytest.raises(InputError, match=r"prompt has 90 tokens.*longer than 96"):
        generate(scheduler, prompt, max_new_tokens=7)
    with pytest.raises(InputError, match="no tokens"):
        generate(scheduler, [], max_new_tokens=7)
    with pytest.raises(InputError, match="token 512 is outside"):
        generate(scheduler, [1, 512], max_new_tokens=7)


@pytest.mark.slow
def test_cache_in_bfloat16(checkpoints: dict[str, Path]) -> None:
    found = {}
    for framework in ("torch", "jax"):
        lm = load(framework, checkpoints["mooshak"])
        scheduler = make_scheduler(framework, lm, kv_dtype="bfloat16")
        (found[framework],) = generate(scheduler, [1, 5, 9], max_new_tokens=40, ignore_eos=True)
        exact = lm.score([1, 5, 9, *found[framework].token_ids])[2:]
        difference = np.abs(np.array(found[framework].logprobs) - exact).max()
        assert 1e-5 < difference < 0.1
    assert np.allclose(found["torch"].logprobs, found["jax"].logprobs, atol=1e-3)


def test_a_sample_without_a_token_left_ends_alone(scheduler: Scheduler) -> None:
    events: list[Event] = []
    good = GenerateConfig(max_new_tokens=5, ignore_eos=True)
    bad = GenerateConfig(max_new_tokens=5, no_repeat_ngram_size=1, allowed_tokens=(5, 6, 7))
    scheduler.submit([5, 6, 9], good, events.append)
    scheduler.submit([5, 6, 9], bad, events.append)
    while scheduler.n_running or scheduler.n_waiting:
        scheduler.step()
    last = [event for event in events if event.completion or event.error]
    assert [event.error for event in last if event.error] == [
        "no token may follow the 1 generated ones: relax generate.allowed_tokens or "
        "generate.no_repeat_ngram_size"
    ]
    assert [len(event.completion.token_ids) for event in last if event.completion] == [5]
    assert scheduler.counters.finished == {"error": 1, "length": 1}


def test_cancelled_requests_free_their_slots(scheduler: Scheduler) -> None:
    events: list[Event] = []
    long = GenerateConfig(max_new_tokens=80, n=6, ignore_eos=True)  # Four slots: two samples wait.
    ticket = scheduler.submit([5, 6], long, events.append)
    scheduler.step()
    scheduler.step()
    assert (scheduler.n_running, scheduler.n_waiting) == (4, 2)
    ticket.cancel()
    scheduler.step()
    assert (scheduler.n_running, scheduler.n_waiting) == (0, 0)
    assert sorted(e.index for e in events if e.error == "cancelled") == list(range(6))
    assert scheduler.counters.finished == {"cancelled": 6}


def test_events_join_to_the_completion(scheduler: Scheduler) -> None:
    events: list[Event] = []
    settings = GenerateConfig(max_new_tokens=30, temperature=1.5, logprobs=True, stop=("ा", "e"))
    scheduler.submit([1, 30, 40], settings, events.append)
    while scheduler.n_running or scheduler.n_waiting:
        scheduler.step()
    done = events[-1].completion
    assert done is not None and all(event.completion is None for event in events[:-1])
    assert "".join(event.text for event in events) == done.text
    tokens = [token for event in events for token in event.tokens]
    assert [token.id for token in tokens] == done.token_ids
    assert [token.log_prob for token in tokens] == done.logprobs


def test_close_drains_and_a_full_queue_refuses(scheduler: Scheduler) -> None:
    events: list[Event] = []
    scheduler.max_waiting = 3
    settings = GenerateConfig(max_new_tokens=5, ignore_eos=True)
    for _ in range(3):
        scheduler.submit([1, 2, 3], settings, events.append)
    with pytest.raises(QueueFullError, match="3 requests are waiting"):
        scheduler.submit([1, 2, 3], settings, events.append)
    thread = threading.Thread(target=scheduler.run)
    thread.start()
    scheduler.close()
    thread.join(60)
    assert not thread.is_alive()
    assert sum(event.completion is not None for event in events) == 3
    with pytest.raises(QueueFullError, match="shutting down"):
        scheduler.submit([1, 2, 3], settings, events.append)


def test_close_without_drain_cancels(scheduler: Scheduler) -> None:
    events: list[Event] = []
    scheduler.submit([1, 2], GenerateConfig(max_new_tokens=80, ignore_eos=True), events.append)
    scheduler.step()
    scheduler.close(drain=False)
    scheduler.run()
    assert events[-1].error == "cancelled"


def test_failure_of_the_engine_ends_all_requests(
    scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[Event] = []
    for _ in range(6):
        scheduler.submit([1, 2], GenerateConfig(max_new_tokens=80), events.append)

    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(scheduler.engine, "step", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        scheduler.run()
    assert [event.error for event in events] == ["the engine failed: out of memory"] * 6
    with pytest.raises(QueueFullError, match="engine failed"):
        scheduler.submit([1, 2], GenerateConfig(max_new_tokens=4), events.append)


def test_failed_copy_of_a_prefix_loses_no_request(
    scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[Event] = []

    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(scheduler.engine, "copy_slot", fail)
    settings = GenerateConfig(max_new_tokens=8, n=2)
    scheduler.submit(list(range(3, 43)), settings, events.append)
    with pytest.raises(RuntimeError, match="out of memory"):
        scheduler.run()
    last = [event for event in events if event.error or event.completion]
    assert sorted(event.index for event in last) == [0, 1]


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"n_slots": 0}, "n_slots 0 must be at least 1"),
        ({"chunk": 0}, "chunk 0 must be at least 1"),
        ({"max_len": 97}, "max_len 97 is not in 2 .. 96"),
        ({"max_len": 1}, "max_len 1 is not in 2 .. 96"),
    ],
)
def test_engine_names_a_wrong_shape(
    shape: dict[str, int], message: str, checkpoints: dict[str, Path]
) -> None:
    lm = load("torch", checkpoints["mooshak"])
    with pytest.raises(InputError, match=message):
        make_scheduler("torch", lm, **shape)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["tensor=2", "fsdp=2,tensor=2"])
def test_engine_on_a_mesh_gives_the_same_tokens(mesh: str, checkpoints: dict[str, Path]) -> None:
    order = list(range(len(SETTINGS)))
    one = run(make_scheduler("jax", load("jax", checkpoints["llama"])), order)
    scheduler = make_scheduler("jax", load("jax", checkpoints["llama"], mesh=mesh))
    scheduler.engine.warm_up()
    (k_BSGK, _), *_ = scheduler.engine.state.kv  # type: ignore[attr-defined]
    assert k_BSGK.sharding.shard_shape(k_BSGK.shape)[2] == k_BSGK.shape[2] // 2
    with compilations() as compiled:
        found = run(scheduler, order)
    assert compiled == []
    for number, samples in one.items():
        for mine, other in zip(samples, found[number], strict=True):
            assert mine.token_ids == other.token_ids
            assert np.allclose(mine.logprobs, other.logprobs, atol=1e-4)
    assert run(scheduler, order[::-1], steps_between=2) == found
