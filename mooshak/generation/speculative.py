"""Speculative decoding (arXiv:2211.17192): a draft model proposes tokens, the model verifies them.

The model draws the token of each position with the noise of that position, as it does without a
draft; a drafted token is accepted if it is that token. So the text is the one without a draft. The
draft model draws with the same noise, which makes it propose the same tokens often.
Shapes: B rows, N = draft_tokens + 1 tokens that the model reads in a call.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from mooshak.config.generate import GenerateConfig
from mooshak.config.model import ModelConfig
from mooshak.errors import InputError
from mooshak.generation.adjustments import Adjustments, RowAdjustments, stack_adjustments
from mooshak.generation.cached_model import CachedModel
from mooshak.generation.completion import Completion, Row
from mooshak.generation.log_probs import TokenLogProbs
from mooshak.generation.text import pad_prompts
from mooshak.numerics.sampling_noise import noise


@dataclass
class DraftedRow:
    """A row of the batch: its new tokens so far, and those that are drafted in a call."""

    prompt: Sequence[int]
    uniform_T: np.ndarray
    """Sampling noise of each new token."""
    adjuster: RowAdjustments | None
    ids: list[int] = field(default_factory=list)
    log_probs: list[tuple[np.ndarray, ...]] = field(default_factory=list)
    """A row of `TokenLogProbs` for each token, if asked for."""
    n_drafted: list[int] = field(default_factory=list)
    """For the first token of each call the number of drafted tokens; 0 for the others."""
    accepted: list[bool] = field(default_factory=list)
    """For each token whether it was a drafted one."""
    error: InputError | None = None
    """Why no token can follow."""

    drafted: list[int] = field(default_factory=list)
    limit: int = 0
    """Number of tokens that may be drafted."""
    draft_adjuster: RowAdjustments | None = None
    """Adjustments after the drafted tokens."""
    draft_error: InputError | None = None
    """Why no token can follow the drafted ones."""

    @property
    def position(self) -> int:
        """Position of the last token, which the model has not read yet."""
        return len(self.prompt) + len(self.ids) - 1

    @property
    def done(self) -> bool:
        return len(self.ids) == len(self.uniform_T) or self.error is not None

    def begin(self, draft_tokens: int) -> None:
        """Begin a call. Another token follows the drafted ones, so fewer are drafted at the end."""
        self.drafted, self.draft_error = [], None
        self.limit = 0 if self.done else min(draft_tokens, len(self.uniform_T) - len(self.ids) - 1)
        self.draft_adjuster = None if self.adjuster is None else self.adjuster.copy()

    def propose(self, token: int) -> None:
        """Draft a token, unless there are enough."""
        if len(self.drafted) < self.limit:
            self.drafted.append(token)
            if self.draft_adjuster is not None:
                self.draft_adjuster.push(token)

    def check(self) -> None:
        """Draft no further if the settings permit no token."""
        if self.draft_adjuster is None or self.draft_error is not None:
            return
        try:
            self.draft_adjuster.offset()
        except InputError as error:
            self.draft_error, self.limit = error, len(self.drafted)

    def accept(self, drawn: Sequence[int], log_probs: Sequence[tuple[np.ndarray, ...]]) -> None:
        """Append the tokens that the model draws, up to the first that was not drafted."""
        if self.done:
            return
        n_accepted = count_accepted(self.drafted, drawn)
        n_new = n_accepted + 1
        if n_accepted == len(self.drafted) and self.draft_error is not None:
            n_new, self.error = n_accepted, self.draft_error
        self.ids += drawn[:n_new]
        self.log_probs += log_probs[:n_new]
        self.n_drafted += [len(self.drafted), *[0] * n_new][:n_new]
        self.accepted += [i < n_accepted for i in range(n_new)]
        if self.adjuster is not None:
            for token in drawn[:n_new]:
                self.adjuster.push(token)

    def uniform(self, indices: np.ndarray) -> np.ndarray:
        """Return the noise of the next tokens with these indices; the last one beyond the end."""
        return self.uniform_T[np.minimum(len(self.ids) + indices, len(self.uniform_T) - 1)]


def count_accepted(drafted: Sequence[int], drawn: Sequence[int]) -> int:
    """Return how many of the first drafted tokens are those that the model draws."""
    pairs = zip(drafted, drawn, strict=False)
    return next((i for i, (ours, theirs) in enumerate(pairs) if ours != theirs), len(drafted))


class Speculation:
    """Decoding of a batch with a draft model. Iteration yields steps as `LM._steps` does."""

    def __init__(
        self,
        model: CachedModel,
        draft: CachedModel,
        prompts: Sequence[Sequence[int]],
        samples: Sequence[int],
        settings: GenerateConfig,
        adjusters: Sequence[RowAdjustments] = (),
    ):
        self.model, self.draft, self.settings = model, draft, settings
        n_new = settings.max_new_tokens
        self.rows = [
            DraftedRow(
                prompt, noise(settings.seed, sample, n_new), adjusters[i] if adjusters else None
            )
            for i, (prompt, sample) in enumerate(zip(prompts, samples, strict=True))
        ]

    def __iter__(self) -> Iterator[tuple[np.ndarray, TokenLogProbs | None]]:
        """Yield the next token of each row, int64 [B], and its log-probabilities, if asked for.

        Raises `InputError` where no token can follow.
        """
        for row in self.rows:
            row.begin(0)
        self._accept(1, self._adjustments())
        for t in range(self.settings.max_new_tokens):
            # Rows advance at their own pace; the fastest ones wait.
            while any(len(row.ids) <= t and row.error is None for row in self.rows):
                self._call()
            for row in self.rows:
                if row.error is not None and len(row.ids) <= t:
                    raise row.error
            found = None
            if self.settings.logprobs:
                columns = zip(*(row.log_probs[t] for row in self.rows), strict=True)
                found = TokenLogProbs(*map(np.stack, columns))
            yield np.array([row.ids[t] for row in self.rows]), found

    def count(self, rows: Sequence[Row]) -> list[Completion]:
        """Return the completions of the rows with the numbers of drafted and accepted tokens."""
        found = []
        for ours, row in zip(self.rows, rows, strict=True):
            n_drafted = sum(ours.n_drafted[: row.n_pushed])
            n_accepted = sum(ours.accepted[: row.n_pushed])
            found.append(replace(row.completion(), n_drafted=n_drafted, n_accepted=n_accepted))
        return found

    def _call(self) -> None:
        """Draft tokens, and verify them in one forward pass."""
        n = 1 + min(self.settings.draft_tokens, self.settings.max_new_tokens - 1)
        for row in self.rows:
            row.begin(n - 1)
        steps = self._propose()
        # Rows with fewer drafted tokens are padded by copies of their last one.
        index_BN = [np.minimum(np.arange(n), len(row.drafted)) for row in self.rows]
        columns = list(zip(self.rows, index_BN, strict=True))
        tokens_BN = np.array([np.array([row.ids[-1], *row.drafted])[i] for row, i in columns])
        self.model.extend(tokens_BN, np.array([row.position + i for row, i in columns]), n)
        self._accept(n, _join([*steps, *[steps[-1]] * (n - len(steps))]))
        lengths = [row.position for row in self.rows]
        for model in (self.model, self.draft):
            model.truncate(lengths)

    def _propose(self) -> list[Adjustments | None]:
        """Draft tokens; return the adjustments of every drafted token, and of the one after."""
        # If all drafted tokens were accepted, the draft model has not read the last two.
        texts = np.array([[*row.prompt[-1:], *row.ids[-2:]][-2:] for row in self.rows])
        places = np.array([[row.position - 1, row.position] for row in self.rows])
        steps = [self._adjustments()]
        if self.settings.temperature == 0 and steps[0] is None:
            self._propose_at_once(texts, places)
        while any(len(row.drafted) < row.limit for row in self.rows):
            self.draft.extend(texts, places, n_logits=1)
            uniform_B1 = np.stack([row.uniform(np.array([len(steps) - 1])) for row in self.rows])
            drawn_B1 = self.draft.sample(uniform_B1, self.settings, steps[-1])
            for row, token in zip(self.rows, drawn_B1[:, 0].tolist(), strict=True):
                row.propose(token)
            texts = np.array([[row.ids[-1], *row.drafted][-1:] for row in self.rows])
            places = np.array([[row.position + len(row.drafted)] for row in self.rows])
            steps.append(self._adjustments())
        return steps

    def _propose_at_once(self, texts: np.ndarray, places: np.ndarray) -> None:
        """Draft greedy tokens in one call, always as many: JAX compiles one program."""
        if not any(row.limit for row in self.rows):
            return
        n = min(self.settings.draft_tokens, self.settings.max_new_tokens - 1)
        last_B = np.array([row.position + row.limit for row in self.rows])
        drawn_BM = self.draft.propose(texts, places, last_B, n)
        for row, drawn in zip(self.rows, drawn_BM.tolist(), strict=True):
            for token in drawn:
                row.propose(token)

    def _accept(self, n: int, adjustments: Adjustments | None) -> None:
        """Draw the next `n` tokens of each row from the model's logits, and append some of them."""
        uniform_BN = np.stack([row.uniform(np.arange(n)) for row in self.rows])
        drawn_BN = self.model.sample(uniform_BN, self.settings, adjustments)
        found: list[tuple[np.ndarray, ...]] = []
        if self.settings.logprobs:
            arrays = self.model.log_probs(drawn_BN, self.settings, adjustments)
            found = list(zip(*(a for a in arrays if a is not None), strict=True))
        for i, (row, drawn) in enumerate(zip(self.rows, drawn_BN.tolist(), strict=True)):
            row.accept(drawn, found[i * n : (i + 1) * n])

    def _adjustments(self) -> Adjustments | None:
        """Return the adjustments of each row after its drafted tokens."""
        for row in self.rows:
            row.check()
        found = [row.draft_adjuster for row in self.rows if row.draft_adjuster is not None]
        return stack_adjustments(found, check=False) if found else None


def _join(steps: Sequence[Adjustments | None]) -> Adjustments | None:
    """Return the adjustments of successive tokens as rows: all tokens of the first row first."""
    given = [step for step in steps if step is not None]
    if not given:
        return None
    stacked = (np.stack(arrays, axis=1) for arrays in zip(*given, strict=True))
    return Adjustments(*(array.reshape(-1, array.shape[-1]) for array in stacked))


def check_draft(prompts: Sequence[Sequence[int]], new_tokens: int, draft: ModelConfig) -> None:
    """Raise `InputError` if a text exceeds the positions of a draft model."""
    try:
        pad_prompts(prompts, new_tokens, draft)
    except InputError as error:
        raise InputError(f"generate.draft: {error}") from error
