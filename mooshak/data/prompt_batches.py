"""Prompts of a policy optimization, and batches of the answers that the model samples to them.

Which prompts a rollout has, and which of its samples a step trains on, are pure functions of (seed,
step, configuration); the samples themselves come from a `Sampler`.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mooshak.config.sections import Config
from mooshak.corpus.filters import in_validation
from mooshak.corpus.records import Record, records
from mooshak.data.conversation_batches import row_lengths, shuffled
from mooshak.data.conversations import contents, normalize, parse_text
from mooshak.data.packing import Batch
from mooshak.data.rollouts import Rollout, make_policy_rows
from mooshak.data.samples import Text
from mooshak.errors import InputError, require
from mooshak.numerics.grpo import token_weights
from mooshak.tokenizer.chat_template import encode_chat
from mooshak.tokenizer.train import load_or_train_tokenizer


@dataclass(frozen=True)
class Prompt:
    """A prompt, and what the reward is told about it."""

    where: str
    """File and line, for messages."""
    text: Text
    ids: list[int]
    """Token ids, of messages up to the start of the assistant's turn."""
    fields: Mapping[str, Any]
    """The other fields of the record, such as `answer`."""
    language: str

    @property
    def is_chat(self) -> bool:
        """True for messages."""
        return not isinstance(self.text, str)


class Sampler(Protocol):
    """Source of sampled answers, with the weights of a step."""

    def sample(self, number: int) -> Sequence[Rollout]:
        """Return the samples of a rollout, all of them in every process; a collective."""
        ...

    def validate(self) -> dict[str, float]:
        """Return metrics of answers to the held-out prompts; a collective."""
        ...


class PromptData:
    """The prompts of a configuration; implements `mooshak.data.training_data.TrainingData`.

    Raises `InputError` for records without a prompt, and where more than `grpo.max_skipped` of them
    are too long.
    """

    sampler: Sampler
    """Set before the first batch: it needs the weights."""

    def __init__(self, config: Config) -> None:
        _check(config)
        self.config, self.tokenizer = config, load_or_train_tokenizer(config)
        self.n_skipped = 0
        self.prompts: list[Prompt] = []
        """Those that are trained on."""
        self.held_out: dict[str, list[Prompt]] = {}
        """Language -> prompts for validation, at most `evaluate.sequences` (0: all)."""
        self.description = {
            source.name: self._read(records(source, config), source.language)
            for source in config.data.sources
        }
        if not self.prompts:
            raise InputError("the sources have no prompt to train on; check their paths")
        self.metrics: dict[str, float] = {}
        """Of the samples of the latest rollout, under TRL's names."""

    @property
    def summary(self) -> str:
        """The counts of the prompts, in one line."""
        config, n_held_out = self.config, sum(map(len, self.held_out.values()))
        held_out = f"{n_held_out} more held out, " if n_held_out else ""
        skipped = f"{self.n_skipped} skipped, " if self.n_skipped else ""
        steps = len(self.prompts) / self.n_prompts * config.grpo.updates_per_rollout
        return (
            f"{len(self.prompts)} prompts, {held_out}{skipped}{self.n_prompts} with "
            f"{config.grpo.num_generations} samples each a rollout; an epoch is {steps:.1f} steps"
        )

    @property
    def n_prompts(self) -> int:
        """Number of prompts of a rollout."""
        grpo = self.config.grpo
        return self.config.train.batch_size * grpo.steps_per_generation // grpo.num_generations

    def prompts_of(self, rollout: int) -> list[tuple[int, Prompt]]:
        """Return the prompts of a rollout, each with its number in the endless list of all."""
        first, n = rollout * self.n_prompts, len(self.prompts)
        result = []
        for number in range(first, first + self.n_prompts):
            order = shuffled(n, f"prompts {self.config.run.seed} {number // n}")
            result.append((number, self.prompts[order[number % n]]))
        return result

    def batches(self, rows: Sequence[int], first: int) -> Iterator[Batch[np.ndarray]]:
        """Return these rows of the global batches from step `first` on, one sample a row.

        At the first step of a rollout the sampler is called, by all processes.
        """
        grpo, step, known = self.config.grpo, first, -1
        while True:
            rollout, update = divmod(step, grpo.updates_per_rollout)
            if rollout != known:
                samples, known = self.sampler.sample(rollout), rollout
                self.metrics = sample_metrics(samples, grpo.num_generations)
            B, part = self.config.train.batch_size, update % grpo.steps_per_generation
            yield self.rows(samples[part * B : (part + 1) * B]).rows(list(rows))
            step += 1

    def rows(self, samples: Sequence[Rollout]) -> Batch[np.ndarray]:
        """Return the global batch of the samples of a step."""
        grpo, T = self.config.grpo, self.row_length(samples)
        weights_N = token_weights([len(one.completion_ids) for one in samples], grpo)
        return make_policy_rows([[one] for one in samples], [[weight] for weight in weights_N], T)

    def row_length(self, samples: Sequence[Rollout]) -> int:
        """Return the length of the rows for samples, of few lengths: JAX compiles each."""
        T = self.config.T
        if self.config.parallel.sequence_parallel:  # It divides the sequence.
            return T
        longest = max(one.sample.size for one in samples)
        return next(length for length in row_lengths(T) if length >= longest)

    def validation(self) -> dict[str, Batch[np.ndarray]]:
        """Return nothing: validation samples answers to `held_out`."""
        return {}

    def _read(self, found: Iterator[Record], language: str) -> dict[str, Any]:
        """Tokenize the prompts of a source; return the description of those that are trained."""
        grpo, limit = self.config.grpo, self.config.evaluate.sequences
        sizes = grpo.num_generations, grpo.steps_per_generation, grpo.num_iterations
        digest, first = hashlib.sha256(repr(sizes).encode()), len(self.prompts)
        for where, record in found:
            prompt = self._parse(where, record, language)
            if reason := self._too_long(prompt):
                self._skip(where, reason)
            elif in_validation(contents(prompt.text), self.config.data.validation_fraction):
                same = self.held_out.setdefault(prompt.language, [])
                same += [prompt] if not limit or len(same) < limit else []
            else:
                self.prompts.append(prompt)
                digest.update(json.dumps([prompt.ids, prompt.fields], default=str).encode())
        mine = self.prompts[first:]
        return {
            "documents": len(mine),
            "tokens": sum(len(prompt.ids) for prompt in mine),
            "shard_tokens": None,
            "sha256": digest.hexdigest(),
        }

    def _parse(self, where: str, record: dict[str, Any], language: str) -> Prompt:
        if self.config.data.normalize_nfc:
            record = normalize(record)
        if not record.get("prompt"):
            raise InputError(
                f"{where}: the record has no prompt; grpo needs the field prompt, a text or "
                "messages, and those that the reward reads"
            )
        text = parse_text(where, "prompt", record["prompt"])
        try:
            if isinstance(text, str):
                ids = self.tokenizer.encode(text, bos=True)
            else:
                ids = encode_chat(self.tokenizer, text)
        except InputError as error:
            raise InputError(f"{where}: {error}") from error
        fields = {key: value for key, value in record.items() if key != "prompt"}
        return Prompt(where, text, ids, fields, str(record.get("language") or language))

    def _too_long(self, prompt: Prompt) -> str:
        """Return why a prompt does not fit, or an empty text."""
        T, longest = self.config.T, self.config.grpo.max_completion_length
        if len(prompt.ids) + longest <= T:
            return ""
        return (
            f"the prompt has {len(prompt.ids)} tokens, and with grpo.max_completion_length "
            f"{longest} more than train.sequence_length {T}"
        )

    def _skip(self, where: str, reason: str) -> None:
        self.n_skipped += 1
        allowed = self.config.grpo.max_skipped
        if self.n_skipped > allowed:
            raise InputError(
                f"{where}: {reason} (prompts left out: {self.n_skipped}, grpo.max_skipped is "
                f"{allowed})"
            )


def sample_metrics(samples: Sequence[Rollout], group: int) -> dict[str, float]:
    """Return the metrics of a rollout, in groups of this size, under TRL's names.

    `reward_std` is the mean over the groups, `frac_reward_zero_std` the share of groups whose
    rewards are equal and give no gradient, `completions/clipped_ratio` that of truncated samples.
    """
    rewards_N = np.array([one.reward for one in samples])
    lengths_N = np.array([len(one.completion_ids) for one in samples])
    rewards_PG = rewards_N.reshape(-1, group)
    return {
        "reward": float(rewards_N.mean()),
        "reward_std": float(rewards_PG.std(1, ddof=1).mean()),
        "frac_reward_zero_std": float(np.mean(np.ptp(rewards_PG, axis=1) == 0)),
        "completions/mean_length": float(lengths_N.mean()),
        "completions/clipped_ratio": float(np.mean([one.is_truncated for one in samples])),
    }


def _check(config: Config) -> None:
    """Raise `InputError` for settings that do not fit together."""
    path, grpo = Path(config.tokenizer.path), config.grpo
    require(path.exists(), f"tokenizer {path} is missing; train a checkpoint with --init.from")
    require(
        len({source.weight for source in config.data.sources}) == 1,
        "data.sources weight: an epoch has each prompt once, whatever its source; repeat or limit "
        "(documents) a source instead",
    )
    n_samples = config.train.batch_size * grpo.steps_per_generation
    require(
        n_samples % grpo.num_generations == 0,
        f"train.batch_size {config.train.batch_size} x grpo.steps_per_generation "
        f"{grpo.steps_per_generation} is not divisible by grpo.num_generations "
        f"{grpo.num_generations}",
    )
