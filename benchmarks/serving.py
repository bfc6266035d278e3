"""Requests of unequal lengths, for workers that decode them at once."""

from typing import Any

import numpy as np

from benchmarks.cases import Size, spread
from benchmarks.worker import Repeat, timed
from mooshak.config.generate import GenerateConfig
from mooshak.generation.lm import LM
from mooshak.serving.engine import Engine
from mooshak.serving.scheduler import Scheduler


def make_requests(size: Size) -> list[tuple[list[int], int]]:
    """Return prompts of random tokens, and their numbers of new tokens."""
    generator, n = np.random.default_rng(0), size["batch_size"]
    new = generator.permutation(spread(size["new_tokens"], n)).tolist()
    prompts = (generator.integers(0, size["vocab_size"], n) for n in spread(size["prompt"], n))
    return [(ids.tolist(), n_new) for ids, n_new in zip(prompts, new, strict=True)]


def engine_options(size: Size) -> dict[str, Any]:
    """Return the arguments of an engine with a slot for each request."""
    longest = max(len(prompt) + n_new for prompt, n_new in make_requests(size))
    return {"n_slots": size["batch_size"], "max_len": longest, "chunk": size["chunk"]}


def serve(lm: LM, engine: Engine, size: Size) -> Repeat:
    """Time greedy decoding of the requests in an engine."""
    scheduler = Scheduler(lm, engine)
    prompts, new = zip(*make_requests(size), strict=True)
    settings = [GenerateConfig(max_new_tokens=n_new, ignore_eos=True) for n_new in new]

    def work() -> None:
        scheduler.generate(prompts, settings)

    work()
    return lambda: timed(work)
