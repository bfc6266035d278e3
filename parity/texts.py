"""Compare generated texts: prompts x strategies, in float64 and float32, computed in every way.

Both frameworks; with the KV cache and without; JAX on one device and on two; `generate` and the
engine of the server; with a draft model and without. In float64 all texts must be equal. In float32
texts may diverge at ties: a change of the logits by at most their noise floor gives either token.

python -m parity.texts runs/demo/torch/checkpoints/600 --draft runs/demo/draft/checkpoints/600
python -m parity.texts runs/demo/torch/checkpoints/600 --prompts 8 --tokens 16 --out runs/texts

Shapes: B texts, T tokens, V vocabulary.
"""

import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from mooshak.command_line import command_parser
from mooshak.config.generate import GenerateConfig
from mooshak.config.model import Dtype
from mooshak.corpus.tales import tale
from mooshak.errors import command, require
from mooshak.files import write_atomically
from mooshak.generation.completion import Completion
from mooshak.generation.lm import LM
from mooshak.generation.settings import make_settings
from mooshak.numerics.sampling_noise import noise

MAX_DIVERGENT = 0.02
"""Largest share of the texts that may diverge in float32."""

ROWS = 25
"""Texts whose logits are in memory at once."""

MESH = "tensor=2"


@dataclass(frozen=True)
class Result:
    """A strategy, computed in two ways."""

    strategy: str
    comparison: str
    dtype: Dtype
    texts: int
    divergent: int
    ties: int
    """Of the divergent texts, those whose first different token is at a tie."""
    first: str = ""
    """The first difference that is not at a tie."""

    @property
    def passed(self) -> bool:
        """True if no text diverges in float64, and few do, at ties, in float32."""
        if self.dtype == "float64":
            return self.divergent == 0
        return self.ties == self.divergent <= MAX_DIVERGENT * self.texts


class Texts:
    """A checkpoint in both frameworks, and the prompts that are continued."""

    def __init__(self, path: Path, draft: Path | None, prompts: Sequence[list[int]], tokens: int):
        import mooshak_jax
        import mooshak_torch

        self.prompts, self.tokens, self.draft = prompts, tokens, draft
        self.load: dict[str, Callable[[Dtype], LM]] = {
            "torch": lambda dtype: mooshak_torch.load(path, dtype),
            "JAX": lambda dtype: mooshak_jax.load(path, dtype),
            f"JAX {MESH}": lambda dtype: mooshak_jax.load(path, dtype, mesh=MESH),
        }
        self.lm = cache(lambda name, dtype: self.load[name](dtype))
        self.floors = dict[str, float]()
        """Settings -> `noise_floor`."""

    def settings(self, values: Mapping[str, Any]) -> GenerateConfig:
        """Return the settings of a strategy; all texts have the same number of new tokens."""
        own = {"max_new_tokens": self.tokens, "ignore_eos": True, "stop_token_ids": ()}
        return make_settings({**values, **own})

    def generate(self, name: str, dtype: Dtype, settings: GenerateConfig) -> list[list[int]]:
        """Return the new tokens of each prompt, by `LM.generate`."""
        lm = self.lm(name, dtype)
        found: list[Completion] = lm.generate(list(self.prompts), **vars(settings))
        return [one.token_ids for one in found]

    def serve(self, name: str, dtype: Dtype, settings: GenerateConfig) -> list[list[int]]:
        """Return the new tokens of each prompt, by the engine."""
        import mooshak_jax.engine
        import mooshak_torch.engine
        from mooshak.serving.scheduler import Scheduler

        lm: Any = self.lm(name, dtype)
        module: Any = mooshak_torch if name == "torch" else mooshak_jax
        length = max(map(len, self.prompts)) + self.tokens
        engine = module.engine.Engine(lm, n_slots=16, max_len=length, chunk=16)
        scheduler = Scheduler(lm, engine, max_waiting=len(self.prompts))
        found = scheduler.generate(self.prompts, [settings] * len(self.prompts))
        return [one.token_ids for (one,) in found]

    def logits(self, name: str, dtype: Dtype, texts: Sequence[list[int]]) -> Iterator[np.ndarray]:
        """Yield the logits [T, V] of each text, computed without a cache, float64."""
        length = max(map(len, texts))
        padded_BT = np.array([text + [0] * (length - len(text)) for text in texts])
        forward = _forward(self.lm(name, dtype))
        for start in range(0, len(texts), ROWS):
            rows_BT = padded_BT[start : start + ROWS]
            missing = ROWS - len(rows_BT)
            logits_BTV = forward(np.pad(rows_BT, ((0, missing), (0, 0))))
            for row in range(len(rows_BT)):
                yield logits_BTV[row, : len(texts[start + row])].astype(np.float64)

    def noise_floor(self, settings: GenerateConfig) -> float:
        """Return the largest error of a float32 logit, over the texts of all prompts.

        Texts of other settings have other noise: sampled ones more than greedy ones.
        """
        if repr(settings) in self.floors:
            return self.floors[repr(settings)]
        new_texts = self.generate("torch", "float64", settings)
        texts = [prompt + new for prompt, new in zip(self.prompts, new_texts, strict=True)]
        floor = 0.0
        for truth_TV, *found in zip(
            self.logits("torch", "float64", texts),
            self.logits("torch", "float32", texts),
            self.logits("JAX", "float32", texts),
            strict=True,
        ):
            floor = max(floor, *(float(np.abs(one - truth_TV).max()) for one in found))
        self.floors[repr(settings)] = floor
        return floor

    def without_cache(
        self, name: str, dtype: Dtype, settings: GenerateConfig, found: Sequence[list[int]]
    ) -> list[list[int]]:
        """Return the tokens that are drawn from logits without a cache, after the same texts.

        The first that differs from `found` is the one at which the texts diverge.
        """
        lm, uniform_T = self.lm("torch", "float64"), noise(settings.seed, 0, self.tokens)
        texts = [prompt + new for prompt, new in zip(self.prompts, found, strict=True)]
        drawn = []
        for prompt, new, logits_TV in zip(
            self.prompts, found, self.logits(name, dtype, texts), strict=True
        ):
            rows_TV = logits_TV[len(prompt) - 1 :]
            adjusters = lm.adjusters([prompt], settings, lm.ends(settings))
            tokens = []
            for t, token in enumerate(new):
                tokens.append(_draw(rows_TV[t : t + 1], uniform_T[t], settings, adjusters)[0])
                for adjuster in adjusters:
                    adjuster.push(token)
            drawn.append(tokens)
        return drawn

    def is_tie(
        self, prompt: list[int], before: list[int], pair: tuple[int, int], settings: GenerateConfig
    ) -> bool:
        """Return whether logits within the noise floor of float64's give either of two tokens."""
        (logits_TV,) = self.logits("torch", "float64", [prompt + before])
        lm = self.lm("torch", "float64")
        adjusters = lm.adjusters([prompt], settings, lm.ends(settings))
        for adjuster in adjusters:
            for token in before:
                adjuster.push(token)
        uniform = noise(settings.seed, 0, self.tokens)[len(before)]
        floor = self.noise_floor(settings)

        def draw(change_V: np.ndarray, scale: float) -> int:
            return _draw(logits_TV[-1:] + scale * floor * change_V, uniform, settings, adjusters)[0]

        changes = [partial(draw, change_V) for change_V in _changes(pair, logits_TV.shape[1])]
        return all(any(_reaches(token, one) for one in changes) for token in pair)


def compare(texts: Texts, strategies: Mapping[str, Mapping[str, Any]]) -> Iterator[Result]:
    """Yield the results of every strategy, in every way to compute it, and both dtypes."""
    for name, values in strategies.items():
        for dtype in ("float64", "float32"):
            yield from _compare(texts, name, texts.settings(values), dtype)


def _compare(texts: Texts, name: str, settings: GenerateConfig, dtype: Dtype) -> Iterator[Result]:
    searches = settings.num_beams > 1
    found = {one: texts.generate(one, dtype, settings) for one in texts.load}
    ways = {"JAX, torch": (found["JAX"], found["torch"])}
    ways[f"JAX {MESH}, JAX"] = (found[f"JAX {MESH}"], found["JAX"])
    for one in ("torch", "JAX") if not searches else ():
        without = texts.without_cache(one, dtype, settings, found[one])
        ways[f"{one}, no cache"] = (without, found[one])
        ways[f"{one} engine, {one}"] = (texts.serve(one, dtype, settings), found[one])
        if texts.draft is not None:
            drafted = dataclasses.replace(settings, draft=texts.draft)
            ways[f"{one} with draft, {one}"] = (texts.generate(one, dtype, drafted), found[one])
    for comparison, (ours, theirs) in ways.items():
        yield _result(texts, settings, ours, theirs, Result(name, comparison, dtype, 0, 0, 0))


def _result(
    texts: Texts,
    settings: GenerateConfig,
    ours: Sequence[list[int]],
    theirs: Sequence[list[int]],
    empty: Result,
) -> Result:
    """Return the result with its counts. Two beam searches diverge at a tie of their scores."""
    divergent, ties, first = 0, 0, ""
    for row, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if a == b:
            continue
        divergent += 1
        t = next(t for t, (x, y) in enumerate(zip(a, b, strict=True)) if x != y)
        prompt = texts.prompts[row]
        if empty.dtype == "float32" and (
            _scores_tie(texts, prompt, a, b, settings)
            if settings.num_beams > 1
            else texts.is_tie(prompt, b[:t], (a[t], b[t]), settings)
        ):
            ties += 1
        else:
            first = first or f"prompt {row}, token {t}: {a[t]} and {b[t]}"
    return dataclasses.replace(empty, texts=len(ours), divergent=divergent, ties=ties, first=first)


def _scores_tie(
    texts: Texts, prompt: list[int], a: list[int], b: list[int], settings: GenerateConfig
) -> bool:
    """Return whether two texts of one length have the same total, but for the noise floor."""
    lm = texts.lm("torch", "float64")
    totals = [lm.score(prompt + new)[len(prompt) - 1 :].sum() for new in (a, b)]
    return bool(abs(totals[0] - totals[1]) <= 2 * texts.noise_floor(settings) * math.sqrt(len(a)))


def _changes(pair: tuple[int, int], n_tokens: int) -> np.ndarray:
    """Return changes of the logits, each by at most one, that favour one token or the other.

    A draw is the first token at which a sum exceeds a number: it moves to a token when all earlier
    ones become less probable, or it and all earlier ones more. A filter keeps a token that becomes
    more probable than the others.
    """
    changes = [np.zeros(n_tokens)]
    for token in pair:
        for first in (token, token + 1):
            split = np.where(np.arange(n_tokens) < first, -1.0, 1.0)
            changes += [split, -split]
        alone = np.where(np.arange(n_tokens) == token, 1.0, -1.0)
        changes += [alone, -alone]
    return np.array(changes)


def _reaches(token: int, draw: Callable[[float], int]) -> bool:
    """Return whether a scale from 0 to 1 draws a token. A draw moves one way, in large steps.

    Bisection finds the tokens of little probability in between.
    """
    low, high = 0.0, 1.0
    drawn_low, drawn_high = draw(low), draw(high)
    while token not in (drawn_low, drawn_high):
        middle = (low + high) / 2
        is_between = min(drawn_low, drawn_high) < token < max(drawn_low, drawn_high)
        if middle in (low, high) or not is_between:
            return False
        drawn = draw(middle)
        if (drawn < token) == (drawn_low < token):
            low, drawn_low = middle, drawn
        else:
            high, drawn_high = middle, drawn
    return True


def _draw(
    logits_BV: np.ndarray, uniform: float, settings: GenerateConfig, adjusters: Sequence[Any]
) -> list[int]:
    """Return the token that is sampled from each row of logits, with the same noise."""
    import torch

    from mooshak.generation.adjustments import stack_adjustments
    from mooshak.generation.parameters import SamplingParameters
    from mooshak_torch.sampling import sample

    n = len(logits_BV)
    parameters = SamplingParameters.of([settings] * n)
    adjustments = stack_adjustments(list(adjusters) * n) if adjusters else None
    uniform_B = torch.full((n,), uniform, dtype=torch.float64)
    return sample(torch.from_numpy(logits_BV), uniform_B, parameters, adjustments).tolist()


@cache
def _forward(lm: Any) -> Callable[[np.ndarray], np.ndarray]:
    """Return the function token ids [B, T] -> logits [B, T, V], without a cache."""
    if not hasattr(lm, "graphdef"):
        import torch

        def forward(tokens_BT: np.ndarray) -> np.ndarray:
            with torch.no_grad():
                logits: np.ndarray = lm.model(torch.from_numpy(tokens_BT)).numpy()
            return logits

        return forward
    import jax

    from mooshak_jax.params import merge

    compiled = jax.jit(lambda params, tokens_BT: merge(lm.graphdef, params)(tokens_BT))
    return lambda tokens_BT: np.asarray(compiled(lm.params, tokens_BT.astype(np.int32)))


def tale_prompts(lm: LM, n: int, max_len: int) -> list[list[int]]:
    """Return the beginnings of `n` tales, Hindi and English in turns, of unequal lengths.

    Without a tokenizer they are random token ids.
    """
    generator = np.random.default_rng(0)
    lengths = generator.integers(3, min(24, max_len) + 1, n).tolist()
    if lm.tokenizer is None:
        high = lm.config.vocab_size
        return [generator.integers(0, high, length).tolist() for length in lengths]
    texts = (tale(1, i // 2).text(("hi", "en")[i % 2]) for i in range(n))
    return [lm.encode(text)[:length] for text, length in zip(texts, lengths, strict=True)]


def markdown(results: Sequence[Result]) -> str:
    """Return a table for each dtype: a row for each strategy, a column for each comparison."""
    tables = []
    for dtype in dict.fromkeys(result.dtype for result in results):
        own = {(r.strategy, r.comparison): r for r in results if r.dtype == dtype}
        strategies, columns = (list(dict.fromkeys(names)) for names in zip(*own, strict=True))
        lines = [f"| {dtype} | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
        for name in strategies:
            cells = [_cell(own[name, c]) if (name, c) in own else "" for c in columns]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        tables.append("\n".join(lines) + "\n")
    return "\n".join(tables)


def _cell(result: Result) -> str:
    return str(result.divergent) + ("" if result.passed else f" ({result.ties} at ties)")


@command
def main() -> None:
    parser = command_parser("parity.texts", __doc__, "CHECKPOINT [--draft CHECKPOINT] [--out DIR]")
    add = parser.add_argument
    add("checkpoint", type=Path, metavar="CHECKPOINT", help="checkpoint of any format")
    add("--draft", type=Path, metavar="CHECKPOINT", help="draft model of speculative decoding")
    add("--prompts", type=int, default=200, metavar="N", help="number of prompts (default: 200)")
    add("--tokens", type=int, default=64, metavar="N", help="new tokens of each (default: 64)")
    add("--out", type=Path, metavar="DIR", help="write texts.json and texts.md there")
    args = parser.parse_args()
    require(args.prompts >= 1, f"--prompts {args.prompts} must be at least 1")
    require(args.tokens >= 1, f"--tokens {args.tokens} must be at least 1")
    # After the arguments: --help and a typo need no framework.
    import jax

    from parity.comparisons.decoding import STRATEGIES

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_enable_x64", True)
    import mooshak_torch

    lm = mooshak_torch.load(args.checkpoint)
    room = lm.config.max_seq_len - args.tokens
    require(room >= 3, f"--tokens {args.tokens} leaves no room for a prompt of three tokens")
    start, results = time.perf_counter(), []
    prompts = tale_prompts(lm, args.prompts, room)
    for result in compare(Texts(args.checkpoint, args.draft, prompts, args.tokens), STRATEGIES):
        results.append(result)
        seconds = time.perf_counter() - start
        what = f"{result.strategy}: {result.comparison}, {result.dtype}"
        print(
            f"{seconds:6.0f} s  {what}: {result.divergent} of {result.texts} texts diverge, "
            f"{result.ties} at ties {result.first}",
            flush=True,
        )
    text = markdown(results)
    print(text)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        rows = [dataclasses.asdict(r) | {"passed": r.passed} for r in results]
        write_atomically(args.out / "texts.json", json.dumps(rows, indent=2) + "\n")
        write_atomically(args.out / "texts.md", text)
    failed = [result for result in results if not result.passed]
    if failed:
        print(f"{len(failed)} of {len(results)} comparisons failed")
        sys.exit(1)


if __name__ == "__main__":
    main()
