"""Compare decoding: the KV cache, its roll-back, and generated tokens.

Shapes: B batch, T time.
"""

from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from mooshak.checkpoints.base import FULL_SLICE, Checkpoint
from mooshak.generation.completion import Completion
from mooshak.generation.lm import LM
from mooshak.generation.settings import make_settings
from mooshak.serving.scheduler import Scheduler
from parity.backends import CacheCall
from parity.comparisons.case import Line, ParityCase
from parity.distance import distance
from parity.tolerances import FLOAT64

STRATEGIES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"temperature": 1.0},
    "top_p 0.9 sampled": {"temperature": 1.0, "top_p": 0.9},
    "top_k 40 sampled": {"temperature": 1.5, "top_k": 40},
    "min_p 0.05 sampled": {"temperature": 1.0, "min_p": 0.05},
    "typical_p 0.8 sampled": {"temperature": 1.0, "typical_p": 0.8},
    "all filters, sampled": {
        "temperature": 0.8,
        "top_k": 100,
        "top_p": 0.95,
        "min_p": 0.01,
        "typical_p": 0.95,
    },
    "penalties, sampled": {
        "temperature": 1.0,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.5,
        "no_repeat_ngram_size": 3,
        "min_new_tokens": 4,
        "stop_token_ids": (1,),
    },
    "beam search": {"num_beams": 4, "length_penalty": 0.6},
}
"""Name in the report -> settings."""
CONSTRAINED = {"temperature": 1.0, "regex": "([a-c]{1,3}[d-h] ?)*", "stop_token_ids": (1,)}


def cache(q: ParityCase) -> Iterator[Line]:
    """Compare logits with the KV cache with logits without a cache, in float64."""
    tokens_BT = q.inputs_BT[:, :24]
    half = tokens_BT.shape[1] // 2
    calls = [CacheCall(0, tokens_BT[:, :half])]
    calls += [CacheCall(t, tokens_BT[:, t : t + 1]) for t in range(half, tokens_BT.shape[1])]
    for framework, backend in (("torch", q.torch), ("JAX", q.jax)):
        truth = backend.operations("float64", tokens_BT)["logits"]  # Uses no cache.
        found = np.concatenate(backend.cached_logits("float64", calls), 1)
        measured = distance(found, truth)
        where = "" if measured <= FLOAT64 else f"KV cache of {framework}"
        name = f"logits with KV cache from those without, {framework}"
        yield Line(name, "float64", measured, FLOAT64, where=where)


def roll_back(q: ParityCase) -> Iterator[Line]:
    """Compare logits after a roll-back of the KV cache with logits without a cache, in float64.

    Half of the tokens are read, then others that are rejected; the caches are truncated, and the
    rest follows: two tokens per call in all rows, or one token per call in a single row.
    """
    for n_rows, n_new in ((len(q.inputs_BT), 2), (1, 1)):
        # Four positions fewer than the model has: room for a cache that is not truncated.
        tokens_BT, rejected_BT = (batch[:n_rows, :-5][:, :24] for batch in q.tokens_nBS[:2])
        half = tokens_BT.shape[1] // 2
        calls = [CacheCall(0, tokens_BT[:, :half])]
        calls += [CacheCall(t, rejected_BT[:, t : t + 1]) for t in range(half, half + 4)]
        n_before = len(calls)
        ends = range(half + n_new, tokens_BT.shape[1] + 1, n_new)
        calls += [CacheCall(end - n_new, tokens_BT[:, end - n_new : end]) for end in ends]
        what = f"{n_rows} rows" if n_rows > 1 else f"one row, {n_new} token per call"
        for framework, backend in (("torch", q.torch), ("JAX", q.jax)):
            truth = backend.operations("float64", tokens_BT)["logits"][:, half : ends[-1]]
            found = backend.cached_logits("float64", calls)[n_before:]
            measured = distance(np.concatenate(found, 1), truth)
            where = "" if measured <= FLOAT64 else f"roll-back of the KV cache of {framework}"
            name = f"logits after a roll-back of the KV cache ({what}), {framework}"
            yield Line(name, "float64", measured, FLOAT64, where=where)


def decoding(q: ParityCase) -> Iterator[Line]:
    """Count tokens that differ, for each strategy."""
    for dtype in ("float64", "float32"):
        lms = q.torch.lm(dtype), q.jax.lm(dtype)
        for name, values in STRATEGIES.items():
            ours, theirs = (_generate(q, lm, values) for lm in lms)
            yield _line(f"{name} tokens that differ", dtype, ours, theirs)
        if find_spec("llguidance"):  # The extra `constraints`.
            ours, theirs = (_generate(q, _with_letters(lm), CONSTRAINED) for lm in lms)
            yield _line("constrained (regex) tokens that differ", dtype, ours, theirs)


def engines(q: ParityCase) -> Iterator[Line]:
    """Count tokens of one framework that differ between ways to compute the same, in float64.

    The engine decodes in slots that are joined and left at different times. The draft is the model
    with noise in its weights: some of its tokens are accepted, others are rejected.
    """
    values = STRATEGIES["penalties, sampled"]
    for framework, backend in (("torch", q.torch), ("JAX", q.jax)):
        lm = backend.lm("float64")
        plain = _generate(q, lm, values)
        drafting = copy(backend)
        drafting.source = _with_noise(backend.source)
        drafted = _generate(q, lm, values | {"draft": drafting.lm("float64")})
        name = f"sampled tokens that differ with a draft, {framework}"
        yield _line(name, "float64", drafted, plain)
        settings = make_settings(values | {"max_new_tokens": q.decode})
        prompts = q.prompts
        found = Scheduler(lm, backend.engine(lm)).generate(prompts, [settings] * len(prompts))
        served = _pad([one.token_ids for (one,) in found], q.decode)
        yield _line(
            f"sampled tokens that differ in the engine, {framework}", "float64", served, plain
        )


def _with_noise(source: Checkpoint) -> Checkpoint:
    """Return a checkpoint with relative noise of a fifth in every weight."""

    def read(name: str, rows: slice = FULL_SLICE) -> np.ndarray:
        array = source.read(name, FULL_SLICE)
        noise = np.random.default_rng(len(name)).standard_normal(array.shape)
        return (array * (1 + 0.2 * noise)).astype(array.dtype)[rows]

    return replace(source, read=read)


class Letters:
    """A tokenizer for any vocabulary: each token is a letter. Random models have no other one."""

    path, eos_id = Path("letters"), 0

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size

    def pieces(self) -> list[str]:
        """Return the tokens by id."""
        return ["abcdefghij "[id % 11] for id in range(self.vocab_size)]

    texts = pieces

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids."""
        return "".join("abcdefghij "[id % 11] for id in ids)


def _with_letters(lm: LM) -> LM:
    """Return a model with a tokenizer, for constraints."""
    found: Any = copy(lm)
    found.tokenizer = Letters(lm.config.vocab_size)
    return found  # type: ignore[no-any-return]


def _generate(q: ParityCase, lm: LM, values: Mapping[str, Any]) -> np.ndarray:
    """Return the new tokens [B, max_new_tokens] of each prompt, -1 after the end of a text."""
    settings: dict[str, Any] = {"max_new_tokens": q.decode, **values}
    found: list[Completion] = lm.generate(q.prompts, **settings)
    return _pad([one.token_ids for one in found], q.decode)


def _pad(rows: Sequence[Sequence[int]], length: int) -> np.ndarray:
    return np.array([[*row, *[-1] * (length - len(row))] for row in rows])


def _line(name: str, dtype: str, ours: np.ndarray, theirs: np.ndarray) -> Line:
    """Return the line that counts the tokens that differ."""
    different = ours != theirs
    rows, steps = np.nonzero(different)
    first = int(steps.min()) if len(steps) else 0
    where = f"token {first} of row {rows[steps.argmin()]}" if len(steps) else ""
    return Line(f"{name}, of {ours.size}", dtype, float(different.sum()), 0.0, where=where)
