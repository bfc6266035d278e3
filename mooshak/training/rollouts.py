"""Rollouts of a run: answers sampled with the current weights, rewarded, and saved.

The first process samples, with an engine of either framework that reads the weights under their
canonical names; the others get its samples as text. The noise of a sample is a pure function of
(seed, number of the prompt, number of the sample).
"""

import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mooshak.checkpoints.base import Checkpoint
from mooshak.checkpoints.formats import Processes
from mooshak.checkpoints.together import fail_together
from mooshak.config.generate import GenerateConfig
from mooshak.config.sections import Config
from mooshak.data.conversations import contents
from mooshak.data.packing import Batch
from mooshak.data.prompt_batches import Prompt, PromptData
from mooshak.data.rollouts import Rollout, parse_rollouts, rollout_lines, with_log_probs
from mooshak.errors import InputError
from mooshak.files import write_atomically
from mooshak.generation.completion import Completion
from mooshak.numerics.grpo import group_advantages
from mooshak.numerics.philox import random_words
from mooshak.serving.scheduler import Scheduler
from mooshak.tokenizer.chat_template import end_of_turn
from mooshak.training.rewards import call_reward, load_reward


class Policy(Protocol):
    """The part of a `Trainer` that rollouts use."""

    framework: str

    @property
    def processes(self) -> Processes: ...

    def gather_weights(self) -> Checkpoint:
        """Return the current weights under their canonical names; complete in the first process.

        A collective.
        """
        ...

    def token_log_probs(self, batch: Batch) -> np.ndarray:
        """Return the log-probability of each label under the current weights, float64 [B, T].

        Every process has the batch in full, and gets the result in full.
        """
        ...


class Rollouts:
    """The samples of a run, by rollout; RUN/rollouts/STEP.jsonl has those of STEP and later steps.

    `first` is the number of steps that are done. Raises `InputError` for a reward that cannot be
    imported, a framework that is not installed, or a file that a resumed run has lost.
    """

    def __init__(self, config: Config, policy: Policy, data: PromptData, first: int) -> None:
        self.config, self.policy, self.data, self.first = config, policy, data, first
        chosen = config.grpo.rollout_framework
        framework = policy.framework if chosen == "same" else chosen
        with fail_together(policy.processes):
            self.reward = load_reward(config.grpo.reward)
            self.sampler = _sampler(framework)

    def sample(self, number: int) -> list[Rollout]:
        """Return the samples of a rollout, drawn now, or saved before the run was resumed."""
        grpo, processes = self.config.grpo, self.policy.processes
        step = number * grpo.updates_per_rollout
        path, text = Path(self.config.run.dir) / "rollouts" / f"{step}.jsonl", ""
        if step < self.first:
            with fail_together(processes):
                text = self._saved(path, number) if processes.is_main else ""
            return parse_rollouts(processes.broadcast(text), path)
        samples = self._with_log_probs(self._draw(number))
        with fail_together(processes):
            if processes.is_main:
                write_atomically(path, rollout_lines(samples))
        return samples

    def validate(self) -> dict[str, float]:
        """Return `validation_reward`, the mean reward of greedy answers to the held-out prompts.

        Also by language; empty without such prompts.
        """
        processes, held_out = self.policy.processes, self.data.held_out
        prompts = [prompt for one in held_out.values() for prompt in one]
        if not prompts:
            return {}
        weights, text = self.policy.gather_weights(), ""
        with fail_together(processes):
            if processes.is_main:
                settings = [self._settings(prompt, temperature=0.0) for prompt in prompts]
                answers = [one for (one,) in self._complete(weights, prompts, settings)]
                found = call_reward(self.reward, self.config.grpo.reward, prompts, answers)
                text = json.dumps(found)
        rewards = np.array(json.loads(processes.broadcast(text)))
        languages = np.array([prompt.language for prompt in prompts])
        by_language = {
            f"validation_reward_{name}": float(rewards[languages == name].mean())
            for name in held_out
        }
        return {"validation_reward": float(rewards.mean()), **by_language}

    def _saved(self, path: Path, number: int) -> str:
        if not path.is_file():
            raise InputError(
                f"{path} is missing: the run resumes among the updates on its samples; copy it "
                "from the run that wrote the checkpoint, or resume from an earlier one"
            )
        text = path.read_text("utf-8")
        wanted = [one.ids for _, one in self.data.prompts_of(number)]
        found = [one.prompt_ids for one in parse_rollouts(text, path)]
        if found != [ids for ids in wanted for _ in range(self.config.grpo.num_generations)]:
            raise InputError(f"{path} has samples of other prompts than this run; start a new run")
        return text

    def _draw(self, number: int) -> list[Rollout]:
        """Sample with the current weights, in the first process; return the rewarded samples."""
        processes = self.policy.processes
        weights, text = self.policy.gather_weights(), ""
        with fail_together(processes):
            if processes.is_main:
                text = rollout_lines(self._rewarded(self.data.prompts_of(number), weights))
        return parse_rollouts(processes.broadcast(text), "the broadcast text")

    def _rewarded(
        self, numbered: Sequence[tuple[int, Prompt]], weights: Checkpoint
    ) -> list[Rollout]:
        grpo, prompts = self.config.grpo, [prompt for _, prompt in numbered]
        G = grpo.num_generations
        sampling = {"temperature": grpo.temperature, "top_k": grpo.top_k, "top_p": grpo.top_p}
        settings = [
            self._settings(one, n=G, seed=sample_seed(self.config.run.seed, number), **sampling)
            for number, one in numbered
        ]
        groups = self._complete(weights, prompts, settings)
        both = zip(prompts, groups, strict=True)
        pairs = [(prompt, answer) for prompt, group in both for answer in group]
        rewards = call_reward(self.reward, grpo.reward, *zip(*pairs, strict=True))
        advantages = group_advantages(np.array(rewards).reshape(-1, G), grpo).ravel().tolist()
        rows = zip(pairs, rewards, advantages, strict=True)
        return [_rollout(*pair, reward, advantage) for pair, reward, advantage in rows]

    def _complete(
        self, weights: Checkpoint, prompts: Sequence[Prompt], settings: Sequence[GenerateConfig]
    ) -> list[list[Completion]]:
        n_samples = sum(one.n for one in settings)
        scheduler: Scheduler = self.sampler.make_scheduler(
            weights, self.config, self.data.tokenizer, max_waiting=n_samples
        )
        return scheduler.generate([prompt.ids for prompt in prompts], settings)

    def _settings(self, prompt: Prompt, **sampling: Any) -> GenerateConfig:
        ends = end_of_turn(self.data.tokenizer) if prompt.is_chat else ()
        return GenerateConfig(
            max_new_tokens=self.config.grpo.max_completion_length,
            stop_token_ids=tuple(ends),
            **sampling,
        )

    def _with_log_probs(self, samples: list[Rollout]) -> list[Rollout]:
        """Return the samples with their log-probabilities under the current weights.

        They come from the forward pass of training, so that the first ratio is 1.
        """
        train, result = self.config.train, list[Rollout]()
        B, n_rows = train.batch_size, train.batch_size // train.gradient_accumulation_steps
        for start in range(0, len(samples), B):
            here = samples[start : start + B]
            batch = self.data.rows(here)
            parts = [batch.rows(slice(i, i + n_rows)) for i in range(0, B, n_rows)]
            found_BT = np.concatenate([self.policy.token_log_probs(part) for part in parts])
            result += with_log_probs(here, batch.labels, found_BT)
        return result


def sample_seed(seed: int, number: int) -> int:
    """Return the seed of the samples of a prompt, by its number in the run."""
    return int(random_words(f"rollout {seed}", number, 1)[0] >> np.uint64(1))


def _sampler(framework: str) -> Any:
    """Return the module `rollouts` of a framework.

    By name: neither framework imports the other, but for this setting, which the user chooses.
    """
    try:
        return importlib.import_module(f"mooshak_{framework}.rollouts")
    except ImportError as error:
        raise InputError(f"grpo.rollout_framework {framework} is not installed: {error}") from error


def _rollout(prompt: Prompt, answer: Completion, reward: float, advantage: float) -> Rollout:
    end = [] if answer.end_token_id is None else [answer.end_token_id]
    ids = [*answer.token_ids, *end]
    return Rollout(
        where=prompt.where,
        index=answer.index,
        prompt=contents(prompt.text),
        completion=answer.text or "",
        reward=reward,
        advantage=advantage,
        is_truncated=not end,
        prompt_ids=prompt.ids,
        completion_ids=ids,
        old_log_probs=[0.0] * len(ids),
    )
