"""A completion, and the row of a batch in which it is generated."""

from dataclasses import dataclass
from functools import reduce

from mooshak.config.generate import GenerateConfig
from mooshak.generation.constraints import Constraint, make_constraint
from mooshak.generation.log_probs import TokenLogProbs
from mooshak.generation.text import TextStream
from mooshak.tokenizer.base import Tokenizer


@dataclass(frozen=True)
class Completion:
    """A sample of the continuation of a prompt; `str` returns its text."""

    text: str | None
    """The continuation; None if the checkpoint has no tokenizer."""
    token_ids: list[int]
    """Generated tokens, without the end token."""
    logprobs: list[float] | None
    """log p of each of `token_ids`, in nats, if the setting `logprobs` is true."""
    finish_reason: str
    """`stop` (an end token, a stop text, a constraint that is met) or `length` (max_new_tokens)."""
    prompt_token_ids: list[int]
    """Tokens of the prompt, with BOS if it was a text."""
    index: int = 0
    """Index of the sample among the `n` samples of its prompt, or rank in a beam search."""
    top_logprobs: list[dict[int, float]] | None = None
    """The most probable tokens in the place of each token, with log p, if asked for."""
    prompt_logprobs: list[float | None] | None = None
    """log p of each token of the prompt, if asked for; None for the first one."""
    prompt_top_logprobs: list[dict[int, float] | None] | None = None
    """The most probable tokens in the places of the prompt, if asked for."""
    score: float | None = None
    """Of a beam search: the total log-probability, with penalties, / length ** length_penalty."""
    n_drafted: int | None = None
    """Number of tokens that the draft model has proposed, if there is one."""
    n_accepted: int | None = None
    """Number of those that are in the continuation, its end token included."""
    end_token_id: int | None = None
    """The end token that ended the text; None where something else did."""

    def __str__(self) -> str:
        return " ".join(map(str, self.token_ids)) if self.text is None else self.text


class Row:
    """A sample that is being generated."""

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        prompt: list[int],
        index: int,
        settings: GenerateConfig,
        ends: set[int],
        streamed: bool,
    ):
        self.prompt, self.index, self.settings = prompt, index, settings
        self.done = False
        self.end_token: int | None = None
        self.n_pushed = 0
        """Number of tokens up to the end, an end token included."""
        # Each decoding is of all tokens: without need, only `completion` decodes.
        self.decodes = streamed or bool(settings.stop)
        self.ids: list[int] = []
        self.log_probs: list[float] = []
        self.top_log_probs: list[dict[int, float]] = []
        self.prompt_log_probs: TokenLogProbs | None = None
        self.stream: TextStream | None = None
        self.ends = ends
        if tokenizer is not None:
            self.stream = TextStream(tokenizer, prompt, settings.stop)
        if settings.ignore_eos:
            self.ends = set(settings.stop_token_ids)
        self.constraint = make_constraint(settings, tokenizer, prompt, self.ends)

    def push(self, token: int, log_probs: TokenLogProbs | None, i: int) -> str:
        """Append a token, unless the row has ended; return the text that became final.

        Row i of `log_probs` is that of the token.
        """
        if self.done:
            return ""
        self.n_pushed += 1
        if token in self.ends:
            self.done, self.end_token = True, token
            return ""
        self.ids.append(token)
        if log_probs is not None and self.settings.logprobs:
            self.log_probs.append(float(log_probs.log_prob_B[i]))
            if n := self.settings.top_logprobs:
                self.top_log_probs.append(log_probs.top(i, n))
        if self.constraint is not None:
            self.constraint = self.constraint.after(token)
            self.done = self.constraint.done
        if self.stream is None:
            return ""
        if not self.decodes:
            self.stream.ids.append(token)
            return ""
        text = self.stream.push(token)
        self.done |= self.stream.stopped
        return text

    def ends_with(self, ids: list[int]) -> bool:
        """Return whether new tokens end the text: with a stop text, or a constraint that is met."""
        if self.constraint is not None and reduce(Constraint.after, ids, self.constraint).done:
            return True
        if self.stream is None or not self.settings.stop:
            return False
        stream = TextStream(self.stream.tokenizer, self.prompt)
        stream.ids = ids
        text = stream.text
        return any(stop in text for stop in self.settings.stop)

    def completion(self) -> Completion:
        settings, of_prompt = self.settings, self.prompt_log_probs
        n, has_top = settings.top_logprobs, bool(settings.logprobs and settings.top_logprobs)
        logprobs: list[float | None] | None = None
        tops: list[dict[int, float] | None] | None = None
        if of_prompt is not None:
            logprobs = [None, *of_prompt.log_prob_B.tolist()]
            if n:
                tops = [None, *(of_prompt.top(i, n) for i in range(len(self.prompt) - 1))]
        return Completion(
            text=None if self.stream is None else self.stream.text,
            token_ids=self.ids,
            logprobs=self.log_probs if settings.logprobs else None,
            finish_reason="stop" if self.done else "length",
            prompt_token_ids=self.prompt,
            index=self.index,
            top_logprobs=self.top_log_probs if has_top else None,
            prompt_logprobs=logprobs,
            prompt_top_logprobs=tops,
            end_token_id=self.end_token,
        )
