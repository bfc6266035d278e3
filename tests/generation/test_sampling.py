"""Sampling: the tokens that each setting keeps, its order, penalties, equal draws in both."""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import pytest
import torch
from transformers.generation import logits_process as hf

import mooshak_jax.sampling
import mooshak_torch.sampling
from mooshak.config.generate import GenerateConfig
from mooshak.errors import InputError
from mooshak.generation.adjustments import (
    RowAdjustments,
    bad_word_ids,
    needs_adjustments,
    stack_adjustments,
)
from mooshak.generation.parameters import SamplingParameters
from mooshak.generation.settings import make_settings
from mooshak.tokenizer.base import Tokenizer

FRAMEWORKS = ("torch", "jax")
V = 1000
# Probabilities 0.4, 0.2, 0.2, 0.1, 0.05, 0.05 of tokens 3, 0, 5, 1, 2, 4.
P = {3: 0.4, 0: 0.2, 5: 0.2, 1: 0.1, 2: 0.05, 4: 0.05}
LOGITS = np.log([P[token] for token in range(6)])


@pytest.fixture(autouse=True)
def x64() -> Iterator[None]:
    with jax.enable_x64():
        yield


def filtered(framework: str, logits_BV: np.ndarray, *rows: GenerateConfig) -> np.ndarray:
    parameters = SamplingParameters.of(rows)
    if framework == "torch":
        scores = mooshak_torch.sampling.filter_scores(torch.from_numpy(logits_BV), parameters)
        return scores.numpy()
    return np.asarray(mooshak_jax.sampling.filter_scores(jax.numpy.asarray(logits_BV), parameters))


def kept(framework: str, **settings: Any) -> set[int]:
    scores = filtered(framework, LOGITS[None], GenerateConfig(temperature=1.0, **settings))
    return set(np.flatnonzero(np.isfinite(scores[0])).tolist())


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize(
    ("settings", "tokens"),
    [
        ({}, {0, 1, 2, 3, 4, 5}),
        ({"top_k": 1}, {3}),
        ({"top_k": 2}, {3, 0, 5}),  # Tokens 0 and 5 are equal.
        ({"top_k": 4}, {3, 0, 5, 1}),
        ({"top_k": 99}, {0, 1, 2, 3, 4, 5}),
        ({"top_p": 0.4 - 1e-12}, {3}),
        ({"top_p": 0.41}, {3, 0, 5}),
        ({"top_p": 0.85}, {3, 0, 5, 1}),
        ({"top_p": 0.95}, {0, 1, 2, 3, 4, 5}),
        ({"min_p": 0.3}, {3, 0, 5}),
        ({"min_p": 0.2}, {3, 0, 5, 1}),
        ({"min_p": 1.0}, {3}),
        # Of what top_k leaves (0.4, 0.2, 0.2 of 0.8) token 3 has half.
        ({"top_k": 3, "top_p": 0.5 - 1e-12}, {3}),
        ({"top_k": 4, "top_p": 0.85}, {3, 0, 5}),
        ({"top_p": 0.85, "min_p": 0.3}, {3, 0, 5}),
        # The entropy is 1.54 nats; the surprises are 0.92, 1.61, 2.3 and 3.
        ({"typical_p": 0.3}, {0, 5}),
        ({"typical_p": 0.5}, {0, 5, 3}),
        ({"typical_p": 0.89}, {0, 5, 3, 1}),
        # Of tokens 3, 0, 5, 1 the entropy is 1.27 nats, the surprises 0.81, 1.5 and 2.2.
        ({"top_k": 4, "typical_p": 0.4}, {0, 5}),
        ({"min_p": 0.2, "typical_p": 0.5}, {0, 5, 3}),
    ],
)
def test_settings_keep_these_tokens(
    framework: str, settings: dict[str, Any], tokens: set[int]
) -> None:
    assert kept(framework, **settings) == tokens


WARPERS: dict[str, Callable[[Any], Any]] = {
    "top_k": lambda value: hf.TopKLogitsWarper(value),
    "top_p": lambda value: hf.TopPLogitsWarper(value),
    "min_p": lambda value: hf.MinPLogitsWarper(value),
    "typical_p": lambda value: hf.TypicalLogitsWarper(value),
}


@pytest.mark.slow
@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("scale", [0.2, 1.0, 4.0], ids=["flat", "normal", "peaked"])
@pytest.mark.parametrize(
    "settings",
    [
        {"top_k": 50},
        {"top_k": 400},
        {"top_p": 0.9},
        {"top_p": 0.3},
        {"min_p": 0.05},
        {"typical_p": 0.7},
        {"top_k": 300, "top_p": 0.8},
        {"top_k": 40, "min_p": 0.1, "typical_p": 0.5},
        {"top_p": 0.95, "typical_p": 0.9},
    ],
    ids=str,
)
def test_filters_are_those_of_transformers(
    framework: str, scale: float, settings: dict[str, Any]
) -> None:
    logits_BV = np.random.default_rng(1).normal(size=(3, V)) * scale
    scores_BV = torch.from_numpy(logits_BV) / 0.7
    for name in ("top_k", "top_p", "min_p", "typical_p"):
        if name in settings:
            scores_BV = WARPERS[name](settings[name])(None, scores_BV)
    rows = [GenerateConfig(temperature=0.7, **settings)] * 3
    found_BV = filtered(framework, logits_BV, *rows)
    np.testing.assert_array_equal(np.isfinite(found_BV), np.isfinite(scores_BV.numpy()))
    finite = np.isfinite(found_BV)
    np.testing.assert_allclose(found_BV[finite], scores_BV.numpy()[finite], rtol=1e-15)


@pytest.mark.slow
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_rows_of_a_batch_have_their_own_settings(framework: str) -> None:
    rows = [
        GenerateConfig(temperature=1.0),
        GenerateConfig(temperature=0.5, top_k=7),
        GenerateConfig(temperature=2.0, top_p=0.6, min_p=0.01),
        GenerateConfig(temperature=1.0, typical_p=0.4),
    ]
    logits_BV = np.random.default_rng(2).normal(size=(4, V)) * 2
    together = filtered(framework, logits_BV, *rows)
    for row, alone in enumerate(rows):
        np.testing.assert_array_equal(
            together[row], filtered(framework, logits_BV[row : row + 1], alone)[0]
        )


@pytest.mark.slow
@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("settings", [{"top_k": 3}, {"top_p": 0.5}, {"top_k": 5, "top_p": 0.9}])
def test_few_candidates_decide_as_a_full_sort(
    framework: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with equal logits, of which some are not among the candidates."""
    random = np.random.default_rng(3)
    logits_BV = np.round(random.normal(size=(6, V)) * 3)
    logits_BV[3:] += 1e-9 * random.normal(size=(3, V))  # Equal in float32.
    rows = [GenerateConfig(temperature=1.0, **settings)] * 6
    module = {"torch": mooshak_torch.sampling, "jax": mooshak_jax.sampling}[framework]
    expected = filtered(framework, logits_BV, *rows)
    monkeypatch.setattr(module, "CANDIDATES", V)
    jax.clear_caches()
    np.testing.assert_array_equal(filtered(framework, logits_BV, *rows), expected)
    monkeypatch.setattr(module, "CANDIDATES", 16)
    jax.clear_caches()
    np.testing.assert_array_equal(filtered(framework, logits_BV, *rows), expected)
    jax.clear_caches()


def draw(framework: str, logits_BV: np.ndarray, uniform_B: np.ndarray, *rows: Any) -> np.ndarray:
    parameters = SamplingParameters.of(rows)
    if framework == "torch":
        arrays = torch.from_numpy(logits_BV), torch.from_numpy(uniform_B)
        return mooshak_torch.sampling.sample(*arrays, parameters).numpy()
    found = mooshak_jax.sampling.sample(
        jax.numpy.asarray(logits_BV), jax.numpy.asarray(uniform_B), parameters
    )
    return np.asarray(found)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_draws_follow_the_distribution(framework: str) -> None:
    """At evenly spaced numbers each token is drawn as often as its probability says."""
    n = 2000
    uniform_B = (np.arange(n) + 0.5) / n
    rows = [GenerateConfig(temperature=1.0)] * n
    found = Counter(draw(framework, np.tile(LOGITS, (n, 1)), uniform_B, *rows).tolist())
    assert found == {token: round(p * n) for token, p in P.items()}
    rows = [GenerateConfig(temperature=1.0, top_k=1)] * n
    assert set(draw(framework, np.tile(LOGITS, (n, 1)), uniform_B, *rows)) == {3}


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_temperature_divides_the_logits(framework: str) -> None:
    for temperature in (0.5, 2.0):
        found = filtered(framework, LOGITS[None], GenerateConfig(temperature=temperature))
        np.testing.assert_array_equal(found, LOGITS[None] / temperature)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_token_is_the_first_whose_sum_exceeds_the_share(framework: str) -> None:
    uniform_B = np.array([0.0, 0.25, 0.5, 0.75, 0.75 - 2.0**-53])
    rows = [GenerateConfig(temperature=1.0)] * 5
    logits_BV = np.full((5, 4), 500.0)  # exp(1000) would be infinite.
    assert draw(framework, logits_BV, uniform_B, *rows).tolist() == [0, 1, 2, 3, 2]


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_log_probabilities_are_these_numbers(framework: str) -> None:
    array: Any = torch.from_numpy if framework == "torch" else jax.numpy.asarray
    module = mooshak_torch.sampling if framework == "torch" else mooshak_jax.sampling
    logits_BV = array(np.stack([LOGITS, LOGITS[::-1].copy() + 3.0]))
    top_BN, log_p_BN = map(np.asarray, module.most_probable(logits_BV))
    # Equal ones by id.
    assert top_BN.tolist() == [[3, 0, 5, 1, 2, 4], [2, 0, 5, 4, 1, 3]]
    sorted_N = np.log([0.4, 0.2, 0.2, 0.1, 0.05, 0.05])
    np.testing.assert_allclose(log_p_BN, np.stack([sorted_N, sorted_N]), rtol=1e-14)
    found_B = np.asarray(module.token_log_prob(logits_BV, array(np.array([1, 1]))))
    np.testing.assert_allclose(found_B, np.log([0.1, 0.05]), rtol=1e-14)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_greedy_token_is_the_first_of_the_largest(framework: str) -> None:
    logits_BV = np.array([[0.0, 2.0, 2.0, 1.0], [3.0, 0.0, -1.0, 3.0], [-9.0, -9.0, -9.0, -8.0]])
    found = draw(framework, logits_BV, np.zeros(3), *[GenerateConfig(temperature=0.0)] * 3)
    assert found.tolist() == [1, 0, 3]


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_greedy_and_sampled_rows_share_a_batch(framework: str) -> None:
    rows = GenerateConfig(), GenerateConfig(temperature=1.0), GenerateConfig(temperature=1.0)
    uniform_B = np.array([0.9999999, 0.0, 1 - 2.0**-53])
    found = draw(framework, np.tile(LOGITS, (3, 1)), uniform_B, *rows)
    assert found.tolist() == [3, 0, 5]


@pytest.mark.slow
def test_both_frameworks_draw_the_same_tokens() -> None:
    random = np.random.default_rng(4)
    logits_BV = random.normal(size=(64, V)) * random.uniform(0.1, 5, (64, 1))
    rows = [
        GenerateConfig(
            temperature=float(random.choice([0.0, 0.3, 1.0, 2.0])),
            top_k=int(random.choice([0, 1, 40, 500])),
            top_p=float(random.choice([1.0, 0.9, 0.2])),
            min_p=float(random.choice([0.0, 0.1])),
            typical_p=float(random.choice([1.0, 0.5])),
        )
        for _ in range(64)
    ]
    for _ in range(20):
        uniform_B = random.random(64)
        found, theirs = (draw(framework, logits_BV, uniform_B, *rows) for framework in FRAMEWORKS)
        np.testing.assert_array_equal(found, theirs)


def adjusted(framework: str, logits_V: np.ndarray, row: RowAdjustments) -> np.ndarray:
    adjustments = stack_adjustments([row])
    if framework == "torch":
        logits = torch.from_numpy(logits_V[None])
        return mooshak_torch.sampling.adjust(logits, adjustments).numpy()[0]
    logits = jax.numpy.asarray(logits_V[None])
    return np.asarray(mooshak_jax.sampling.adjust(logits, adjustments))[0]


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_penalties_are_these_numbers(framework: str) -> None:
    settings = GenerateConfig(
        repetition_penalty=2.0,
        presence_penalty=0.5,
        frequency_penalty=0.25,
        logit_bias={1: 1.0, 5: -3.0},
    )
    row = RowAdjustments(settings, [0, 1], 6)
    for token in (2, 2, 3):
        row.push(token)
    logits_V = np.array([4.0, 2.0, 3.0, -1.0, 1.0, 1.0])
    # Halved or doubled in prompt and output; less 0.5 and 0.25 for each time in the output.
    expected = [2.0, 1.5, 1.5 - 0.5 - 0.5, -2.0 - 0.5 - 0.25, 1.0, -2.0]
    np.testing.assert_array_equal(adjusted(framework, logits_V, row), expected)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_adjustments_are_those_of_transformers(framework: str) -> None:
    random = np.random.default_rng(5)
    ids = random.integers(0, 12, 40).tolist()
    ids[-2:] = ids[3:5]  # ids[5] would repeat an n-gram.
    settings = GenerateConfig(
        repetition_penalty=1.3,
        no_repeat_ngram_size=3,
        min_new_tokens=16,
        max_new_tokens=40,
        logit_bias={3: 1.5, 900: -2.0},
    )
    bad_words = [[7], [1, 2], [4, 4, 4]]
    row = RowAdjustments(settings, ids[:25], V, ends=[2, 11], bad_words=bad_words)
    for token in ids[25:]:
        row.push(token)
    logits_V = random.normal(size=V)
    ids_1T, scores_1V = torch.tensor([ids]), torch.from_numpy(logits_V[None])
    for processor in (
        hf.SequenceBiasLogitsProcessor([[[3], 1.5], [[900], -2.0]]),
        hf.RepetitionPenaltyLogitsProcessor(1.3),
        hf.NoRepeatNGramLogitsProcessor(3),
        hf.NoBadWordsLogitsProcessor(bad_words),
        hf.MinNewTokensLengthLogitsProcessor(25, 16, [2, 11]),
    ):
        scores_1V = processor(ids_1T, scores_1V)
    found_V = adjusted(framework, logits_V, row)
    np.testing.assert_allclose(found_V, scores_1V.numpy()[0], rtol=1e-15)
    assert np.isneginf(found_V).sum() >= 4  # 2, 7, 11 and ids[5].


def test_end_tokens_are_allowed_after_the_minimum() -> None:
    row = RowAdjustments(GenerateConfig(min_new_tokens=2), [1], 6, ends=[2])
    banned = []
    for _ in range(3):
        banned.append(row.banned())
        row.push(4)
    assert banned == [[2], [2], []]


def test_ngrams_of_one_and_of_the_prompt_are_not_repeated() -> None:
    row = RowAdjustments(GenerateConfig(no_repeat_ngram_size=1), [1, 3], 6)
    assert sorted(row.banned()) == [1, 3]
    row = RowAdjustments(GenerateConfig(no_repeat_ngram_size=2), [1, 3, 1], 6)
    assert row.banned() == [3]
    row.push(4)
    assert row.banned() == []
    row.push(1)
    assert sorted(row.banned()) == [3, 4]
    # Shorter than the n-gram.
    assert RowAdjustments(GenerateConfig(no_repeat_ngram_size=4), [1], 6).banned() == []


def test_only_allowed_tokens_remain() -> None:
    row = RowAdjustments(GenerateConfig(allowed_tokens=(1, 4)), [0], 6)
    assert np.flatnonzero(np.isfinite(row.offset())).tolist() == [1, 4]


def test_bad_words_are_banned_at_the_start_and_after_a_space(tiny_tokenizer: Tokenizer) -> None:
    found = bad_word_ids(["चूहा", "a mouse"], tiny_tokenizer)
    assert tiny_tokenizer.encode("चूहा") in found and tiny_tokenizer.encode(" a mouse") in found
    with pytest.raises(InputError, match=r"bad_words needs a tokenizer"):
        bad_word_ids(["x"], None)


def test_neutral_settings_need_no_adjustments() -> None:
    assert not needs_adjustments(GenerateConfig(temperature=1.0, top_k=5, stop=("x",), n=3))
    assert needs_adjustments(GenerateConfig(frequency_penalty=0.1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_k": -1}, "generate.top_k -1 must not be negative"),
        ({"top_k": 1.5}, "generate.top_k 1.5 must be an integer"),
        ({"min_p": 1.1}, r"generate.min_p 1.1 must be in \[0, 1\]"),
        ({"typical_p": 0.0}, r"generate.typical_p 0.0 must be in \(0, 1\]"),
        ({"repetition_penalty": 0.0}, "repetition_penalty 0.0 must be positive"),
        ({"presence_penalty": 3.0}, r"presence_penalty 3.0 must be in \[-2, 2\]"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty nan must be in"),
        ({"min_new_tokens": 9, "max_new_tokens": 8}, "min_new_tokens 9 is more than"),
        ({"no_repeat_ngram_size": -2}, "no_repeat_ngram_size -2 must not be negative"),
        ({"logit_bias": {3: float("inf")}}, "logit_bias: inf of token 3"),
        ({"logit_bias": {3: 1e308}}, "logit_bias: 1e.308 of token 3 must be in"),
        ({"temperature": 1e-309}, r"temperature 1e-309 must be 0 \(greedy\) or at least 1e-06"),
        ({"top_k": 2**70}, "top_k 1180591620717411303424 is more than"),
        ({"logit_bias": {"a": 1.0}}, "logit_bias .* must be token ids with numbers"),
        ({"allowed_tokens": "abc"}, "allowed_tokens 'abc' must be a list of token ids"),
        ({"bad_words": ("a", "")}, "bad_words contains an empty text"),
    ],
)
def test_setting_out_of_range_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_settings(settings)


@pytest.mark.parametrize("name", ["logit_bias", "allowed_tokens", "stop_token_ids"])
def test_token_outside_of_the_vocabulary_is_refused(name: str) -> None:
    value: Any = {6: 1.0} if name == "logit_bias" else (6,)
    with pytest.raises(InputError, match=f"generate.{name}: token 6 is outside of the vocabulary"):
        RowAdjustments(GenerateConfig(**{name: value}), [1], 6)
