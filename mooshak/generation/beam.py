"""Beam search: as in transformers, on a model of either framework.

In each step the best 2 W continuations of all beams of a prompt are considered (more if there are
several end tokens): the first W of those that go on are the next beams. A text that ends among the
first W is a candidate for the result, ranked by total log-probability / length ** length_penalty;
the length counts the end token. Penalties and bans act on log-probabilities.
Shapes: B rows, W beams of each prompt, C candidates.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from mooshak.config.generate import GenerateConfig
from mooshak.errors import InputError
from mooshak.generation.adjustments import RowAdjustments, stack_adjustments
from mooshak.generation.cached_model import CachedModel

Stopped = Callable[[list[int]], bool]
"""Function that says if the text of new tokens of a prompt contains a stop text."""


@dataclass(frozen=True)
class Beam:
    """A continuation."""

    ids: list[int]
    """New tokens, with the end token if there is one."""
    log_probs: list[float]
    """Of `ids`, under the model."""
    score: float
    """Sum of the adjusted log-probabilities; in a result, divided by length ** length_penalty."""
    adjuster: RowAdjustments | None = None
    parent: int = 0
    """Index of the beam that this one continues."""


class Search:
    """The beams of one prompt."""

    def __init__(
        self,
        settings: GenerateConfig,
        ends: set[int],
        adjuster: RowAdjustments | None = None,
        stopped: Stopped | None = None,
    ):
        self.settings, self.ends, self.stopped = settings, ends, stopped
        self.beams = [Beam([], [], 0.0, adjuster)]
        self.results: list[Beam] = []
        """The best texts that have ended, at most `num_beams`, in descending order."""
        self.done = False

    def advance(self, candidates: Iterable[tuple[int, int, float, float]]) -> None:
        """Take a step: beam, token, score and log-probability of each candidate, the best first."""
        n_beams = self.settings.num_beams
        beams: list[Beam] = []
        for rank, (index, token, score, log_prob) in enumerate(candidates):
            if score == -math.inf or (rank >= n_beams and len(beams) == n_beams):
                break
            beam = self.beams[index]
            ids, log_probs = [*beam.ids, token], [*beam.log_probs, log_prob]
            if self._ended(ids):
                if rank < n_beams:
                    score /= len(ids) ** self.settings.length_penalty
                    self.results.append(Beam(ids, log_probs, score))
            elif len(beams) < n_beams:
                adjuster = None if beam.adjuster is None else beam.adjuster.copy()
                if adjuster is not None:
                    adjuster.push(token)
                beams.append(Beam(ids, log_probs, score, adjuster, index))
        # The sort is stable: of equal scores, the text that ended first.
        self.results = sorted(self.results, key=lambda beam: -beam.score)[:n_beams]
        self.beams = beams
        self.done = not beams or self._is_decided()

    def _ended(self, ids: list[int]) -> bool:
        if ids[-1] in self.ends or len(ids) == self.settings.max_new_tokens:
            return True
        return self.stopped is not None and self.stopped(ids)

    def _is_decided(self) -> bool:
        """Return whether the search ends before all beams do (see `early_stopping`)."""
        settings = self.settings
        if len(self.results) < settings.num_beams:
            return False
        if settings.early_stopping not in (False, "never"):
            return True
        length = len(self.beams[0].ids)
        if settings.early_stopping == "never" and settings.length_penalty > 0:
            length = settings.max_new_tokens
        return self.beams[0].score / length**settings.length_penalty <= self.results[-1].score


def beam_search(
    model: CachedModel,
    prompts: Sequence[Sequence[int]],
    settings: GenerateConfig,
    ends: set[int],
    adjusters: Sequence[RowAdjustments] = (),
    stopped: Sequence[Stopped] = (),
) -> list[list[Beam]]:
    """Return the `num_return_sequences` best continuations of each prompt, in descending order.

    `model` has `num_beams` rows for each prompt. `adjusters` and `stopped` have one for each, or
    none. Raises `InputError` if the settings permit fewer texts.
    """
    n_beams = settings.num_beams
    searches = [
        Search(settings, ends, adjusters[i] if adjusters else None, stopped[i] if stopped else None)
        for i in range(len(prompts))
    ]
    # Enough for as many beams that go on, also if each of the best ones ends with every end token.
    n_candidates = max(2, 1 + len(ends)) * n_beams
    rows = _rows(searches)
    for t in range(settings.max_new_tokens):
        score_B = np.array([-math.inf if beam is None else beam.score for beam in rows])
        adjustments = None
        if adjusters:
            own = [adjusters[i // n_beams] for i in range(len(rows))]
            used = [beam.adjuster if beam else None for beam in rows]
            pairs = zip(used, own, strict=True)
            adjustments = stack_adjustments([ours or theirs for ours, theirs in pairs], check=False)
        found = model.best(score_B, n_beams, n_candidates, adjustments)
        for search, *columns in zip(searches, *found, strict=True):
            if not search.done:
                search.advance(zip(*(column.tolist() for column in columns), strict=True))
        if all(search.done for search in searches):
            break
        rows = _rows(searches)
        parents = [0 if beam is None else beam.parent for beam in rows]
        model.select([i - i % n_beams + parent for i, parent in enumerate(parents)])
        tokens_B1 = np.array([[0 if beam is None else beam.ids[-1]] for beam in rows])
        positions_B1 = np.array([[len(prompts[i // n_beams]) + t] for i in range(len(rows))])
        model.extend(tokens_B1, positions_B1, n_logits=1)
    return [_best(search) for search in searches]


def _rows(searches: Sequence[Search]) -> list[Beam | None]:
    """Return the beams of all prompts, None where a prompt has fewer, or its search is done."""
    rows: list[Beam | None] = []
    for search in searches:
        beams = [] if search.done else search.beams
        rows += [*beams, *[None] * (search.settings.num_beams - len(beams))]
    return rows


def _best(search: Search) -> list[Beam]:
    n, found = search.settings.num_return_sequences, len(search.results)
    if found < n:
        raise InputError(
            f"generate.num_return_sequences {n}: the beam search found only {found} texts; relax "
            "the settings that ban tokens or stop texts"
        )
    return search.results[:n]
