"""The Python API of both frameworks: a language model that generates, streams, scores and chats.

`mooshak_torch.LM` and `mooshak_jax.LM` compute tokens and log-probabilities; everything else is
shared.
"""

import abc
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args, overload

import numpy as np

from mooshak.checkpoints import safetensors
from mooshak.checkpoints.base import Checkpoint
from mooshak.checkpoints.resume import check_tokenizer
from mooshak.config.generate import GenerateConfig
from mooshak.config.model import Dtype, ModelConfig
from mooshak.errors import InputError, require
from mooshak.generation.adjustments import (
    RowAdjustments,
    bad_word_ids,
    check_token_settings,
    needs_adjustments,
)
from mooshak.generation.beam import beam_search
from mooshak.generation.cached_model import CachedModel
from mooshak.generation.completion import Completion, Row
from mooshak.generation.constraints import make_constraint
from mooshak.generation.log_probs import TokenLogProbs
from mooshak.generation.settings import check_stream, generation_defaults, make_settings
from mooshak.generation.speculative import Speculation, check_draft
from mooshak.generation.text import check_tokens, end_ids, pad_prompts
from mooshak.tokenizer.base import Tokenizer
from mooshak.tokenizer.chat_template import Messages, encode_chat, end_of_turn
from mooshak.tokenizer.files import files_of_tokenizer, generation_files
from mooshak.tokenizer.metadata import (
    GENERATION_CONFIG,
    NFC_FILE,
    TEXT_NORMALIZATION,
    named_end_ids,
)

Prompt = str | Sequence[int]
"""A text, or token ids."""
Prompts = list[str] | list[list[int]] | list[Prompt] | tuple[Prompt, ...]
One = Literal[1]

Step = tuple[np.ndarray, TokenLogProbs | None]
"""The next token of each row, int [B], and its log-probabilities, if asked for."""


class LM(abc.ABC):
    """A loaded language model and its tokenizer."""

    config: ModelConfig
    """Architecture and sizes of the model."""
    tokenizer: Tokenizer | None
    """The tokenizer; None if the checkpoint has none: prompts are then token ids."""
    defaults: Mapping[str, Any] = {}
    """Settings of the checkpoint's generation_config.json, which those of a call replace."""
    generation_config: Path | None = None
    """The checkpoint's generation_config.json, if it has one."""
    _directory: Path | None = None

    def __init__(self) -> None:
        self._drafts: dict[Path, LM] = {}

    @property
    @abc.abstractmethod
    def model(self) -> Any:
        """The model of the framework: called with token ids [B, T], it returns logits [B, T, V]."""

    @abc.abstractmethod
    def _steps(
        self,
        prompts: list[list[int]],
        samples: list[int],
        settings: GenerateConfig,
        adjusters: list[RowAdjustments],
    ) -> Iterator[Step]:
        """Yield the next token of each row, `max_new_tokens` times.

        Row i continues prompts[i] with the sampling noise of sample samples[i]; `adjusters`, one
        for each row or none, change the logits.
        """

    @abc.abstractmethod
    def _cached_model(
        self, prompts: list[list[int]], new_tokens: int, n_beams: int = 1
    ) -> CachedModel:
        """Return the model after reading the prompts, with `n_beams` rows for each of them."""

    @abc.abstractmethod
    def _load_draft(self, path: Path) -> "LM":
        """Load a model in the same dtype on the same device, or mesh, without a tokenizer."""

    @abc.abstractmethod
    def _token_log_probs(self, ids: list[int]) -> np.ndarray:
        """Return log p(token t | tokens before t), t = 1 .. T - 1, in nats, float64 [T - 1]."""

    @abc.abstractmethod
    def _most_probable(self, ids: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """Return the most probable tokens after each token but the last, and their log p.

        int64 and float64 [T - 1, N], as `most_probable` (sampling.py) returns them.
        """

    @abc.abstractmethod
    def _checkpoint(self) -> Checkpoint:
        """Return the weights under their canonical names, open for reading."""

    @overload
    def generate(
        self, prompt: Prompt, *, n: One = 1, num_return_sequences: One = 1, **settings: Any
    ) -> Completion: ...
    @overload
    def generate(
        self, prompt: Prompts, *, n: One = 1, num_return_sequences: One = 1, **settings: Any
    ) -> list[Completion]: ...
    @overload
    def generate(
        self, prompt: Prompt | Prompts, **settings: Any
    ) -> Completion | list[Completion] | list[list[Completion]]: ...
    def generate(
        self, prompt: Prompt | Prompts, **settings: Any
    ) -> Completion | list[Completion] | list[list[Completion]]:
        """Continue a prompt, a text or token ids; return a `Completion`.

        A list of prompts returns a list; each result is the same as for the prompt alone. If `n` or
        `num_return_sequences` is more than 1, each prompt returns a list. `settings` are the fields
        of `GenerateConfig` (docs/generation.md); those that are not given have the values of the
        checkpoint's generation_config.json. Raises `InputError` for an unknown or invalid setting,
        a prompt without tokens, a token outside of the vocabulary, or a prompt and continuation
        that are longer than `max_seq_len`.
        """
        chosen = self.settings(settings)
        given, many = _as_list(prompt)
        prompts = [self.encode(one) for one in given]
        rows = [(ids, sample) for ids in prompts for sample in range(chosen.n)]
        found = self._complete([ids for ids, _ in rows], [sample for _, sample in rows], chosen)
        n = chosen.n_results
        grouped: list[Any] = [found[i : i + n] for i in range(0, len(found), n)]
        grouped = [group[0] for group in grouped] if n == 1 else grouped
        return grouped if many else grouped[0]

    def stream(self, prompt: Prompt, **settings: Any) -> Iterator[str]:
        """Yield the continuation of a prompt in chunks of text; joined, `generate(...).text`.

        Settings and errors are those of `generate`; `n` and `num_beams` must be 1. Raises
        `InputError` if the checkpoint has no tokenizer.
        """
        chosen, ids = self.settings(settings), self.encode(prompt)
        check_stream(chosen)
        if self.tokenizer is None:
            raise InputError("the checkpoint has no tokenizer, so there is no text to stream")
        self.check(ids, chosen)  # Errors are raised here, not at the first `next`.
        return self._stream(ids, chosen)

    @overload
    def score(self, text: Prompt) -> np.ndarray: ...
    @overload
    def score(self, text: Prompts) -> list[np.ndarray]: ...
    def score(self, text: Prompt | Prompts) -> np.ndarray | list[np.ndarray]:
        """Return log p(token t | tokens before t), t = 1 .. T - 1, in nats: float64 [T - 1].

        `text` is a text (BOS is prepended), token ids, or a list of these, which returns a list.
        Raises `InputError` for fewer than two tokens, more than `max_seq_len`, or a token outside
        of the vocabulary.
        """
        given, many = _as_list(text)
        if many:
            return [self.score(one) for one in given]
        ids = self.encode(given[0])
        if not 2 <= len(ids) <= self.config.max_seq_len:
            counts = f"2 .. {self.config.max_seq_len}, with BOS if there is one"
            raise InputError(f"cannot score {len(ids)} tokens; give {counts}")
        return self._token_log_probs(ids)

    @overload
    def chat(
        self, messages: Messages, *, n: One = 1, num_return_sequences: One = 1, **settings: Any
    ) -> Completion: ...
    @overload
    def chat(self, messages: Messages, **settings: Any) -> Completion | list[Completion]: ...
    def chat(self, messages: Messages, **settings: Any) -> Completion | list[Completion]:
        """Generate the next turn of a conversation: messages with `role` and `content`.

        The checkpoint's chat template renders the prompt, or for tokenizers of this project ours.
        Settings, results and errors are those of `generate`. Raises `InputError` if the checkpoint
        has no chat template.
        """
        if self.tokenizer is None:
            raise InputError("the checkpoint has no tokenizer, so it has no chat template")
        chosen = self.settings(settings)
        ids = encode_chat(self.tokenizer, messages)
        rows, samples = [ids] * chosen.n, list(range(chosen.n))
        found = self._complete(rows, samples, chosen, end_of_turn(self.tokenizer))
        return found[0] if chosen.n_results == 1 else found

    def save(self, path: str | Path) -> None:
        """Write the weights and the tokenizer to a directory in the interchange format.

        Raises `InputError` if `path` exists.
        """
        safetensors.write_checkpoint(Path(path), self._checkpoint())

    def settings(self, given: Mapping[str, Any]) -> GenerateConfig:
        """Return settings from those that are given and the checkpoint's; a draft is loaded.

        Raises `InputError` for an unknown or invalid setting, or a draft that does not fit.
        """
        chosen = make_settings(given, self.defaults)
        draft = chosen.draft
        if draft is None:
            return chosen
        if not isinstance(draft, LM):
            path = Path(draft)
            draft = self._drafts[path] = self._drafts.get(path) or self._load_draft(path)
        if type(draft) is not type(self):
            ours, theirs = (type(lm).__module__.partition(".")[0] for lm in (self, draft))
            raise InputError(f"generate.draft: the model is of {theirs}; load it with {ours}.load")
        sizes = draft.config.vocab_size, self.config.vocab_size
        require(
            sizes[0] == sizes[1],
            f"generate.draft has a vocabulary of {sizes[0]} tokens, the model of {sizes[1]}",
        )
        return replace(chosen, draft=draft)

    def check_lengths(self, prompts: list[list[int]], settings: GenerateConfig) -> None:
        """Raise `InputError` for a prompt that is empty, or too long for the model or its draft."""
        pad_prompts(prompts, settings.max_new_tokens, self.config)
        if settings.draft is not None:
            check_draft(prompts, settings.max_new_tokens, settings.draft.config)

    def encode(self, prompt: Prompt) -> list[int]:
        """Return the token ids of a prompt. Raises `InputError` for what is not one."""
        if not isinstance(prompt, str):
            try:
                if any(isinstance(id, (bool, np.bool_)) for id in prompt):
                    raise TypeError("not bool")
                ids = [operator.index(id) for id in prompt]
            except TypeError as error:
                raise InputError(f"a prompt is a text or token ids: {error}") from error
            check_tokens(ids, self.config)
            return ids
        if self.tokenizer is None:
            raise InputError("the checkpoint has no tokenizer; give token ids instead of a text")
        return self.tokenizer.encode(prompt, bos=True)

    def check(self, ids: list[int], settings: GenerateConfig) -> None:
        """Raise the `InputError` with which the generation from a prompt would begin, if any."""
        for adjuster in self.adjusters([ids], settings, self.ends(settings)):
            adjuster.offset()
        self.check_lengths([ids], settings)

    def ends(self, settings: GenerateConfig) -> set[int]:
        """Return the ids of the tokens that end a text, of the checkpoint and the settings."""
        own = set() if self.tokenizer is None else end_ids(self.tokenizer)
        if self._directory is not None:
            own |= named_end_ids(self._directory)
        return own | set(settings.stop_token_ids)

    def _files(self) -> dict[str, Path]:
        """Return the files that `save` writes with the weights: name -> file."""
        files = files_of_tokenizer(self.tokenizer.path) if self.tokenizer else {}
        if self.tokenizer and self.tokenizer.nfc:
            files[TEXT_NORMALIZATION] = NFC_FILE
        return files | (generation_files(self._directory) if self._directory else {})

    def _use_settings_of(self, directory: Path) -> None:
        """Take defaults and end tokens from a checkpoint; check that it has this tokenizer."""
        if self.tokenizer is not None:
            check_tokenizer(directory, self.tokenizer)
        self.defaults, self._directory = generation_defaults(directory), directory
        path = directory / GENERATION_CONFIG
        self.generation_config = path if path.is_file() else None

    def adjusters(
        self, prompts: list[list[int]], settings: GenerateConfig, ends: set[int]
    ) -> list[RowAdjustments]:
        """Return the adjustments of the logits for each row; none if the settings have none."""
        check_token_settings(settings, self.config.vocab_size)
        if not needs_adjustments(settings):
            return []
        words = bad_word_ids(settings.bad_words, self.tokenizer)
        vocab_size = self.config.vocab_size
        rows = ((ids, make_constraint(settings, self.tokenizer, ids, ends)) for ids in prompts)
        return [RowAdjustments(settings, ids, vocab_size, ends, words, one) for ids, one in rows]

    def _complete(
        self,
        prompts: list[list[int]],
        samples: list[int],
        settings: GenerateConfig,
        more_ends: set[int] | None = None,
    ) -> list[Completion]:
        """Generate one completion per row, until all of them have ended."""
        ends = self.ends(settings) | (more_ends or set())
        pairs = zip(prompts, samples, strict=True)
        rows = [Row(self.tokenizer, ids, i, settings, ends, streamed=False) for ids, i in pairs]
        adjusters = self.adjusters(prompts, settings, ends)
        self.check_lengths(prompts, settings)
        if settings.prompt_logprobs:
            known: dict[tuple[int, ...], TokenLogProbs] = {}
            for row in rows:
                key = tuple(row.prompt)
                known[key] = known.get(key) or self._prompt_log_probs(row.prompt, settings)
                row.prompt_log_probs = known[key]
        if not settings.max_new_tokens:
            return [row.completion() for row in rows]
        if settings.num_beams > 1:
            return self._search(rows, settings, ends, adjusters)
        steps = self._all_steps(prompts, samples, settings, adjusters)
        for tokens_B, found in steps:
            for i, (row, token) in enumerate(zip(rows, tokens_B, strict=True)):
                row.push(int(token), found, i)
            if all(row.done for row in rows):
                break
        if isinstance(steps, Speculation):
            return steps.count(rows)
        return [row.completion() for row in rows]

    def _all_steps(
        self,
        prompts: list[list[int]],
        samples: list[int],
        settings: GenerateConfig,
        adjusters: list[RowAdjustments],
    ) -> Iterable[Step]:
        """Return the steps of `_steps`, with a draft model if there is one."""
        if settings.draft is None:
            return self._steps(prompts, samples, settings, adjusters)
        model, draft = (
            lm._cached_model(prompts, settings.max_new_tokens) for lm in (self, settings.draft)
        )
        return Speculation(model, draft, prompts, samples, settings, adjusters)

    def _search(
        self,
        rows: list[Row],
        settings: GenerateConfig,
        ends: set[int],
        adjusters: list[RowAdjustments],
    ) -> list[Completion]:
        """Return the completions of a beam search; `rows` has an empty row for each prompt."""
        prompts = [row.prompt for row in rows]
        model = self._cached_model(prompts, settings.max_new_tokens, settings.num_beams)
        stopped = [row.ends_with for row in rows] if settings.stop or settings.constraint else []
        searches = beam_search(model, prompts, settings, rows[0].ends, adjusters, stopped)
        completions = []
        for first, beams in zip(rows, searches, strict=True):
            for index, beam in enumerate(beams):
                row = Row(self.tokenizer, first.prompt, index, settings, ends, streamed=False)
                row.prompt_log_probs = first.prompt_log_probs
                log_probs = TokenLogProbs(np.array(beam.log_probs))
                for i, token in enumerate(beam.ids):
                    row.push(token, log_probs, i)
                completions.append(replace(row.completion(), score=beam.score))
        return completions

    def _prompt_log_probs(self, ids: list[int], settings: GenerateConfig) -> TokenLogProbs:
        """Return the log-probabilities of the tokens of a prompt after the first one."""
        if len(ids) < 2:
            return TokenLogProbs(np.empty(0), np.empty((0, 0), np.int64), np.empty((0, 0)))
        top = self._most_probable(ids) if settings.top_logprobs else ()
        return TokenLogProbs(self._token_log_probs(ids), *top)

    def _stream(
        self, ids: list[int], settings: GenerateConfig, more_ends: set[int] | None = None
    ) -> Iterator[str]:
        ends = self.ends(settings) | (more_ends or set())
        row = Row(self.tokenizer, ids, 0, settings, ends, streamed=True)
        adjusters = self.adjusters([ids], settings, ends)
        for (token,), found in self._all_steps([ids], [0], settings, adjusters):
            if text := row.push(int(token), found, 0):
                yield text
            if row.done:
                break
        if row.stream is not None and (text := row.stream.finish()):
            yield text


def check_dtype(dtype: str) -> None:
    """Raise `InputError` for an unknown compute dtype."""
    known = get_args(Dtype)
    require(dtype in known, f"dtype {dtype!r} must be one of {', '.join(known)}")


def _as_list(prompt: Any) -> tuple[list[Any], bool]:
    """Return the prompts as a list, and whether a list of prompts was given."""
    is_bytes = isinstance(prompt, (bytes, bytearray, memoryview))
    is_scalar = isinstance(prompt, np.ndarray) and not prompt.ndim
    if is_bytes or is_scalar or not isinstance(prompt, (str, Sequence, np.ndarray)):
        raise InputError(f"a prompt is a text or token ids, not {type(prompt).__name__}")
    is_one = isinstance(prompt, str) or not len(prompt) or isinstance(prompt[0], (int, np.integer))
    return ([prompt], False) if is_one else (list(prompt), True)
