"""Rollouts: ratios of 1 whatever the sampling, end tokens with labels, seeds, rewards, files."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from mooshak.config.generate import GenerateConfig
from mooshak.config.grpo import GRPOConfig
from mooshak.config.sections import Config, DataConfig, SourceConfig
from mooshak.data.packing import IGNORE_INDEX, Batch
from mooshak.data.prompt_batches import PromptData
from mooshak.data.rollouts import Rollout, parse_rollouts, rollout_lines
from mooshak.errors import InputError
from mooshak.tokenizer.base import Tokenizer
from mooshak.training.rewards import exact_match, load_reward
from mooshak.training.rollouts import Rollouts, sample_seed
from mooshak_jax import step as jax_step
from mooshak_torch import rollouts as torch_rollouts
from mooshak_torch import step as torch_step

SAMPLINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "cold": {"temperature": 0.6},
    "hot": {"temperature": 1.7, "top_p": 0.8},
    "filtered": {"top_k": 5, "top_p": 0.9},
}


@pytest.fixture(autouse=True, scope="module")
def environment() -> Iterator[None]:
    with jax.enable_x64():
        yield


@pytest.fixture
def config(tiny_config: Config, tiny_tokenizer: Tokenizer, tmp_path: Path) -> Config:
    """Samples of a model with random weights, in float64."""
    sources = [
        SourceConfig("q", kind="tasks", path="known_answers", language="en", documents=8, seed=5)
    ]
    model = replace(tiny_config.model, max_seq_len=160)
    return replace(
        tiny_config,
        model=model,
        data=DataConfig(format="prompts", sources=sources, validation_fraction=0.0),
        grpo=GRPOConfig(
            reward="tests.training.test_rollouts:length",
            num_generations=4,
            max_completion_length=12,
            rollout_batch_size=4,
            max_skipped=8,
        ),
        train=replace(
            tiny_config.train,
            batch_size=8,
            sequence_length=160,
            dtype="float64",
            gradient_accumulation_steps=2,
        ),
        run=replace(tiny_config.run, dir=str(tmp_path / "run")),
    )


def length(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [sum(ids) % 7 for ids in completion_ids]


def start(config: Config, module: Any) -> tuple[Any, PromptData, Rollouts]:
    """A trainer before its first step, with its data and their sampler."""
    trainer, data = module.Trainer(config), PromptData(config)
    trainer.initialize(data.tokenizer)
    data.sampler = Rollouts(config, trainer, data, 0)
    return trainer, data, data.sampler


def first_batch(data: PromptData) -> Batch:
    return next(data.batches(range(8), 0))


def expected_loss(batch: Batch) -> float:
    """The loss where all ratios are 1."""
    assert batch.advantages is not None
    counts = (batch.labels != IGNORE_INDEX).sum(1)
    return float(-(batch.advantages[:, 0] * counts).sum() / counts.sum())


@pytest.mark.parametrize("name", SAMPLINGS)
def test_first_ratio_is_1(name: str, config: Config) -> None:
    config = replace(config, grpo=replace(config.grpo, **SAMPLINGS[name]))
    trainer, data, _ = start(config, torch_step)
    batch = first_batch(data)
    again = trainer.token_log_probs(batch)
    assert np.abs(np.exp(again - batch.old_log_probs) - 1).max() < 1e-12
    metrics, _ = trainer.step(batch, 1e-2, lambda: False)
    truth = expected_loss(batch)
    assert abs(truth) > 1e-4 and abs(metrics["loss"] - truth) < 1e-12
    moved = trainer.token_log_probs(batch)
    assert np.abs(moved - again).max() > 1e-3


@pytest.mark.slow
def test_jax_samples_the_same_with_the_same_ratios(config: Config) -> None:
    config = replace(config, grpo=replace(config.grpo, **SAMPLINGS["hot"]))
    (_, ours, _), (trainer, theirs, _) = start(config, torch_step), start(config, jax_step)
    ours_batch, batch = first_batch(ours), first_batch(theirs)
    np.testing.assert_array_equal(batch.tokens, ours_batch.tokens)
    np.testing.assert_allclose(batch.old_log_probs, ours_batch.old_log_probs, rtol=1e-12)
    metrics, _ = trainer.step(batch, 1e-2, lambda: False)
    assert abs(metrics["loss"] - expected_loss(batch)) < 1e-12


def test_log_probabilities_are_those_of_the_engine(config: Config) -> None:
    config = replace(config, grpo=replace(config.grpo, temperature=1.7))
    trainer, data, rollouts = start(config, torch_step)
    samples = rollouts.sample(0)
    scheduler = torch_rollouts.make_scheduler(trainer.gather_weights(), config, data.tokenizer, 99)
    numbered = data.prompts_of(0)
    settings = [
        GenerateConfig(
            max_new_tokens=12,
            temperature=1.7,
            n=4,
            seed=sample_seed(config.run.seed, number),
            stop_token_ids=(data.tokenizer.id_of("<|end|>"),),
            logprobs=True,
            processed_logprobs=True,
        )
        for number, _ in numbered
    ]
    found = scheduler.generate([prompt.ids for _, prompt in numbered], settings)
    answers = [answer for group in found for answer in group]
    assert [
        one.completion_ids[: len(a.token_ids)] for one, a in zip(samples, answers, strict=True)
    ] == [a.token_ids for a in answers]
    for one, answer in zip(samples, answers, strict=True):
        theirs = np.array(answer.logprobs)
        np.testing.assert_allclose(one.old_log_probs[: len(theirs)], theirs, atol=1e-12)


def test_samples_end_in_a_trained_end_token(config: Config, tiny_tokenizer: Tokenizer) -> None:
    """A prompt's samples differ; those that end have a label on the end token."""
    config = replace(config, grpo=replace(config.grpo, max_completion_length=60, temperature=4.0))
    _, data, rollouts = start(config, torch_step)
    samples = rollouts.sample(0)
    ends = {tiny_tokenizer.eos_id, tiny_tokenizer.id_of("<|end|>")}
    assert len({tuple(one.completion_ids) for one in samples}) == 8
    ended = [one for one in samples if not one.is_truncated]
    assert ended and all(one.completion_ids[-1] in ends for one in ended)
    assert not any(ends & set(one.completion_ids[:-1]) for one in samples)
    assert all(len(one.completion_ids) == 60 for one in samples if one.is_truncated)
    batch = data.rows(samples)
    for row, one in enumerate(samples):
        labels = batch.labels[row][batch.labels[row] != IGNORE_INDEX]
        assert labels.tolist() == one.completion_ids
    assert (
        batch.labels.shape[1] in (80, 160) and parse_rollouts(rollout_lines(samples), "") == samples
    )


def test_saved_samples_are_those_of_the_run(config: Config) -> None:
    config = replace(config, grpo=replace(config.grpo, num_iterations=2))
    trainer, data, rollouts = start(config, torch_step)
    samples = rollouts.sample(0)
    assert Rollouts(config, trainer, data, 1).sample(0) == samples
    other = replace(config, run=replace(config.run, seed=7))
    with pytest.raises(InputError, match="has samples of other prompts than this run"):
        Rollouts(other, trainer, PromptData(other), 1).sample(0)
    (Path(config.run.dir) / "rollouts" / "0.jsonl").unlink()
    with pytest.raises(InputError, match="is missing: the run resumes among the updates"):
        Rollouts(config, trainer, data, 1).sample(0)


def test_prompts_are_seen_once_an_epoch(config: Config) -> None:
    data = PromptData(config)
    n = len(data.prompts)
    seen = [prompt.where for r in range(n) for _, prompt in data.prompts_of(r)]
    assert len(seen) == 2 * n
    assert len(set(seen[:n])) == n and sorted(seen[:n]) == sorted(seen[n:]) and seen[:n] != seen[n:]


def test_exact_match_ignores_form_and_edges() -> None:
    chat = [{"role": "assistant", "content": " क\u093cलम\n"}]
    assert exact_match([chat, "a b", "a  b"], ["\u0958लम", "a b", "a b"]) == [1.0, 1.0, 0.0]


@pytest.mark.parametrize(
    "name, message",
    [
        ("rewards", "is not MODULE:FUNCTION"),
        ("tests.training.absent:f", "cannot be imported"),
        ("tests.training.test_rollouts:absent", "cannot be imported"),
        ("tests.training.test_rollouts:SAMPLINGS", "is not a function"),
    ],
)
def test_wrong_name_of_a_reward_is_named(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_reward(name)


@pytest.mark.parametrize(
    "reward, message",
    [
        ("text", "is 'good', not a number, for sample 0 of the prompt at source q, task"),
        ("short", "returned 1 rewards for 8 completions"),
        ("raises", "failed: KeyError: 'absent'"),
    ],
)
def test_wrong_reward_is_named(reward: str, message: str, config: Config) -> None:
    name = f"tests.training.test_rollouts:{reward}"
    _, _, rollouts = start(replace(config, grpo=replace(config.grpo, reward=name)), torch_step)
    with pytest.raises(InputError, match=message):
        rollouts.sample(0)


def text(completions: list[Any], **_: Any) -> list[Any]:
    return ["good"] * len(completions)


def short(**_: Any) -> list[float]:
    return [1.0]


def raises(**fields: Any) -> list[float]:
    return fields["absent"]  # type: ignore[no-any-return]


def test_truncated_file_of_samples_is_named(tmp_path: Path) -> None:
    one = Rollout("a", 0, "q", "x\u2028y", 1.0, 0.1 + 0.2, False, [1], [2], [-0.1])
    assert parse_rollouts(rollout_lines([one, one]), "") == [one, one]
    with pytest.raises(InputError, match=r"0\.jsonl is not a file of sampled answers"):
        parse_rollouts(rollout_lines([one])[:-20], tmp_path / "0.jsonl")
