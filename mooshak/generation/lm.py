"""The Python API of both frameworks: a language model that generates, streams, scores and chats.

`mooshak_torch.LM` and `mooshak_jax.LM` supply the tokens; what is done with them is here, once.
"""

import abc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, overload

import numpy as np

from mooshak.checkpoints import safetensors
from mooshak.checkpoints.base import Checkpoint
from mooshak.config.model import ModelConfig
from mooshak.config.sections import GenerateConfig
from mooshak.errors import InputError, did_you_mean
from mooshak.generation.text import TextStream, check_tokens, end_ids
from mooshak.tokenizer.base import Tokenizer
from mooshak.tokenizer.chat_template import Messages, encode_chat, end_of_turn
from mooshak.tokenizer.files import find_tokenizer
from mooshak.tokenizer.load import open_tokenizer

Prompt = str | Sequence[int]
"""A text, or token ids."""

Step = tuple[np.ndarray, np.ndarray]
"""The next token of each row, int [B], and its log-probability, float64 [B]."""


@dataclass(frozen=True)
class Completion:
    """One sample of what follows a prompt. Printed, it is its text."""

    text: str | None
    """The continuation; None where the checkpoint has no tokenizer."""
    token_ids: list[int]
    """Without the token that ended the text."""
    logprobs: list[float] | None
    """log p of each of `token_ids` under the model, if `logprobs` was set."""
    finish_reason: str
    """stop (an end token or a stop text), or length."""
    prompt_token_ids: list[int]
    index: int = 0
    """Number of the sample among the `n` of its prompt."""

    def __str__(self) -> str:
        return " ".join(map(str, self.token_ids)) if self.text is None else self.text


class LM(abc.ABC):
    """A loaded language model and its tokenizer."""

    config: ModelConfig
    tokenizer: Tokenizer | None

    @property
    @abc.abstractmethod
    def model(self) -> Any:
        """The framework's own model, to call with token ids [B, T] for logits [B, T, V]."""

    @abc.abstractmethod
    def _steps(
        self, prompts: list[list[int]], samples: list[int], settings: GenerateConfig
    ) -> Iterator[Step]:
        """Yield the next token of each row, `max_new_tokens` times.

        Row i continues prompts[i] with the noise of sample number samples[i].
        """

    @abc.abstractmethod
    def _token_log_probs(self, ids: list[int]) -> np.ndarray:
        """Return log p(token t | tokens before t) for t = 1 .. T-1, float64 [T - 1]."""

    @abc.abstractmethod
    def _checkpoint(self) -> Checkpoint:
        """Return the weights by canonical name."""

    @overload
    def generate(self, prompt: str, **settings: Any) -> Completion: ...
    @overload
    def generate(self, prompt: Sequence[Any], **settings: Any) -> Any: ...
    def generate(self, prompt: Any, **settings: Any) -> Any:
        """Continue a prompt: text or token ids. Returns a `Completion`.

        A list of prompts gives a list, each as if it had been asked alone; with `n` > 1 a prompt
        gives a list of samples. `settings` are the keys of the configuration's section `generate`:
        max_new_tokens, temperature, top_p, seed, n, stop, ignore_eos, logprobs. Raises `InputError`
        for a setting that is unknown or out of range, an empty prompt, a token outside of the
        vocabulary, and a text that would outgrow the model's positions.
        """
        chosen = make_settings(settings)
        many = not isinstance(prompt, str) and len(prompt) > 0 and not _is_id(prompt[0])
        prompts = [self._encode(p) for p in (prompt if many else [prompt])]
        rows = [(ids, sample) for ids in prompts for sample in range(chosen.n)]
        found = self._complete([ids for ids, _ in rows], [sample for _, sample in rows], chosen)
        grouped: list[Any] = [found[i : i + chosen.n] for i in range(0, len(found), chosen.n)]
        grouped = [group[0] for group in grouped] if chosen.n == 1 else grouped
        return grouped if many else grouped[0]

    def stream(self, prompt: Prompt, **settings: Any) -> Iterator[str]:
        """Yield the text of a continuation in chunks, which join to `generate(...).text`.

        Settings and errors are those of `generate`, except for `n`, which must be 1.
        """
        chosen, ids = make_settings(settings), self._encode(prompt)
        if chosen.n != 1:
            raise InputError(f"generate.n {chosen.n}: a stream has one sample")
        if self.tokenizer is None:
            raise InputError("the checkpoint has no tokenizer: there is no text to stream")
        return self._stream(ids, chosen)

    def score(self, text: Any) -> Any:
        """Return log p(token t | tokens before t), t = 1 .. T-1, in nats: float64 [T - 1].

        `text` is a text (BOS comes first where the tokenizer has one), token ids, or a list of
        these, which gives a list. Raises `InputError` for fewer than two tokens.
        """
        if not isinstance(text, str) and len(text) > 0 and not _is_id(text[0]):
            return [self.score(one) for one in text]
        ids = self._encode(text)
        check_tokens(ids, self.config)
        if not 2 <= len(ids) <= self.config.max_seq_len:
            raise InputError(
                f"{len(ids)} tokens cannot be scored; between 2 and {self.config.max_seq_len} can"
            )
        return self._token_log_probs(ids)

    def chat(self, messages: Messages, **settings: Any) -> Any:
        """Answer a conversation: messages with `role` and `content`, by the chat template.

        Settings, results and errors are those of `generate`. Raises `InputError` where the
        checkpoint has no chat template.
        """
        if self.tokenizer is None:
            raise InputError("the checkpoint has no tokenizer, and so no chat template")
        chosen, ids = make_settings(settings), encode_chat(self.tokenizer, messages)
        rows, samples = [ids] * chosen.n, list(range(chosen.n))
        found = self._complete(rows, samples, chosen, end_of_turn(self.tokenizer))
        return found[0] if chosen.n == 1 else found

    def save(self, path: str | Path) -> None:
        """Write the weights and the tokenizer as an interchange directory.

        Raises `InputError` where `path` exists.
        """
        safetensors.write_checkpoint(Path(path), self._checkpoint())

    def _encode(self, prompt: Prompt) -> list[int]:
        if not isinstance(prompt, str):
            return [int(id) for id in prompt]
        if self.tokenizer is None:
            raise InputError("the checkpoint has no tokenizer; give token ids instead of a text")
        return self.tokenizer.encode(prompt, bos=True)

    def _complete(
        self,
        prompts: list[list[int]],
        samples: list[int],
        settings: GenerateConfig,
        more_ends: set[int] | None = None,
    ) -> list[Completion]:
        """Generate until every row has ended."""
        rows = [
            _Row(self, ids, sample, settings, more_ends or set())
            for ids, sample in zip(prompts, samples, strict=True)
        ]
        for tokens_B, log_probs_B in self._steps(prompts, samples, settings):
            for row, token, log_prob in zip(rows, tokens_B, log_probs_B, strict=True):
                row.push(int(token), float(log_prob))
            if all(row.done for row in rows):
                break
        return [row.completion() for row in rows]

    def _stream(self, ids: list[int], settings: GenerateConfig) -> Iterator[str]:
        row = _Row(self, ids, 0, settings, set())
        for (token,), (log_prob,) in self._steps([ids], [0], settings):
            if text := row.push(int(token), float(log_prob)):
                yield text
            if row.done:
                break
        if row.stream is not None and (text := row.stream.finish()):
            yield text


class _Row:
    """A sample while it is generated."""

    def __init__(
        self, lm: LM, prompt: list[int], index: int, settings: GenerateConfig, ends: set[int]
    ):
        self.prompt, self.index, self.settings = prompt, index, settings
        self.done = False
        self.ids: list[int] = []
        self.log_probs: list[float] = []
        self.stream: TextStream | None = None
        self.ends = ends
        if lm.tokenizer is not None:
            self.stream = TextStream(lm.tokenizer, prompt, settings.stop)
            self.ends = ends | end_ids(lm.tokenizer)
        if settings.ignore_eos:
            self.ends = set()

    def push(self, token: int, log_prob: float) -> str:
        """Take in a token, unless the row has ended; return the text that became final."""
        if self.done or token in self.ends:
            self.done = True
            return ""
        self.ids.append(token)
        self.log_probs.append(log_prob)
        if self.stream is None:
            return ""
        text = self.stream.push(token)
        self.done = self.stream.stopped
        return text

    def completion(self) -> Completion:
        return Completion(
            text=None if self.stream is None else self.stream.text,
            token_ids=self.ids,
            logprobs=self.log_probs if self.settings.logprobs else None,
            finish_reason="stop" if self.done else "length",
            prompt_token_ids=self.prompt,
            index=self.index,
        )


def make_settings(settings: dict[str, Any]) -> GenerateConfig:
    """Return the generation settings of keyword arguments. Raises `InputError` for unknown ones."""
    known = {field.name for field in fields(GenerateConfig)}
    if unknown := sorted(settings.keys() - known):
        raise InputError(f"unknown setting {unknown[0]}{did_you_mean(unknown[0], known)}")
    return GenerateConfig(**settings)


def load_tokenizer(
    checkpoint: Path, model: ModelConfig, given: str | Path | None = None
) -> Tokenizer | None:
    """Return the tokenizer of a checkpoint, `given` or its own; None where it has none.

    Raises `InputError` where it does not fit the model's vocabulary.
    """
    path = find_tokenizer(checkpoint, str(given) if given else None, required=False)
    if path is None:
        return None
    tokenizer = open_tokenizer(path)
    # A model that was not made here may have rows to spare; its tokenizer is in its directory.
    own = tokenizer.path.parent == checkpoint
    needed = tokenizer.vocab_size if own else tokenizer.padded_vocab_size
    if needed > model.vocab_size or (needed < model.vocab_size and not own):
        raise InputError(
            f"the tokenizer has {tokenizer.vocab_size} pieces, the model's vocabulary is "
            f"{model.vocab_size}; name the right one with --tokenizer"
        )
    return tokenizer


def _is_id(value: Any) -> bool:
    return isinstance(value, (int, np.integer))
