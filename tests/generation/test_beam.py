"""Beam search: equal to exhaustive search, to transformers, and in both frameworks."""

import itertools
import os
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # Before transformers is imported.

import torch
import transformers

from mooshak.checkpoints import safetensors
from mooshak.errors import InputError
from mooshak.generation.completion import Completion
from mooshak.generation.lm import LM
from tests.drawn_checkpoints import drawn_checkpoint
from tests.serving.conftest import MODELS

pytestmark = pytest.mark.usefixtures("compiled_in_haste")

FRAMEWORKS = ("torch", "jax")
PROMPT = [1, 5, 300, 7, 9]
ALLOWED = (2, 11, 12, 13)


@pytest.fixture(scope="module", params=MODELS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[LM]:
    """A model of each architecture in float64, in torch and JAX, without a tokenizer."""
    path = tmp_path_factory.mktemp("beams") / "drawn"
    safetensors.write_checkpoint(path, drawn_checkpoint(MODELS[request.param], 3, scale=3.0))
    return [import_module(f"mooshak_{name}").load(path, "float64") for name in FRAMEWORKS]


def total(lm: LM, prompt: list[int], ids: list[int]) -> float:
    """Return the log-probability of a continuation, from `score`."""
    return float(lm.score([*prompt, *ids])[len(prompt) - 1 :].sum())


@pytest.mark.slow
@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 1.0, 2.5])
def test_beams_equal_exhaustive_search(length_penalty: float, pair: list[LM]) -> None:
    """Four tokens, three steps, of which one token ends a text: 40 texts in all."""
    n, end, others = 3, ALLOWED[0], ALLOWED[1:]
    texts = [(*head, end) for k in range(n) for head in itertools.product(others, repeat=k)]
    texts += itertools.product(others, repeat=n)
    for lm in pair:
        scores = [total(lm, PROMPT, list(text)) / len(text) ** length_penalty for text in texts]
        order = np.argsort([-score for score in scores])[:10]
        found = lm.generate(
            PROMPT,
            max_new_tokens=n,
            num_beams=64,
            num_return_sequences=10,
            early_stopping="never",
            length_penalty=length_penalty,
            allowed_tokens=ALLOWED,
            stop_token_ids=(end,),
            logprobs=True,
        )
        for completion, i in zip(found, order, strict=True):
            ended = texts[i][-1] == end
            assert completion.token_ids == list(texts[i][: -1 if ended else None])
            assert completion.finish_reason == ("stop" if ended else "length")
            assert completion.score == pytest.approx(scores[i], abs=1e-12)
            expected = lm.score([*PROMPT, *completion.token_ids])[len(PROMPT) - 1 :]
            assert completion.logprobs == pytest.approx(expected.tolist(), abs=1e-12)


SETTINGS: list[dict[str, Any]] = [
    {"num_beams": 4},
    {"num_beams": 3, "num_return_sequences": 3, "length_penalty": 0.3, "early_stopping": True},
    {"num_beams": 2, "length_penalty": -1.0, "early_stopping": "never", "repetition_penalty": 1.4},
    {"num_beams": 5, "num_return_sequences": 2, "no_repeat_ngram_size": 2, "min_new_tokens": 4},
]


@pytest.fixture(scope="module")
def from_transformers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama, whose texts end often: 40 of 256 tokens do."""
    torch.manual_seed(7)
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        eos_token_id=list(range(200, 240)),
        pad_token_id=0,
        initializer_range=0.4,
    )
    path = tmp_path_factory.mktemp("beams") / "llama"
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: str(settings["num_beams"]))
def test_beams_equal_those_of_transformers(
    settings: dict[str, Any], from_transformers: Path
) -> None:
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        from_transformers, dtype=torch.float64
    )
    prompts = [[1, 5, 30], [7, 9, 11]]
    known = theirs.generate(
        torch.tensor(prompts),
        do_sample=False,
        max_new_tokens=12,
        return_dict_in_generate=True,
        output_scores=True,
        **settings,
    )
    ends = set(range(200, 240))
    n = settings.get("num_return_sequences", 1)
    for framework in FRAMEWORKS:
        lm: LM = import_module(f"mooshak_{framework}").load(from_transformers, "float64")
        found = lm.generate(prompts, max_new_tokens=12, **settings)
        flat = [one for group in found for one in (group if n > 1 else [group])]
        for i, completion in enumerate(flat):
            ids = known.sequences[i, 3:].tolist()
            first_end = next((t for t, id in enumerate(ids) if id in ends), None)
            assert completion.token_ids == ids[:first_end]
            assert completion.index == i % n
            # transformers computes the log-probabilities of beams in float32.
            assert completion.score == pytest.approx(known.sequences_scores[i].item(), rel=1e-6)


def groups(found: Any) -> list[list[Completion]]:
    return [group if isinstance(group, list) else [group] for group in found]


@pytest.mark.slow
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: str(settings["num_beams"]))
def test_beams_are_the_same_in_both_and_in_a_batch(
    settings: dict[str, Any], pair: list[LM]
) -> None:
    prompts = [PROMPT, [1], list(range(3, 30))]
    common = {"max_new_tokens": 10, "stop_token_ids": tuple(range(100, 160)), **settings}
    ours, theirs = (groups(lm.generate(prompts, **common)) for lm in pair)
    for mine, other in zip(itertools.chain(*ours), itertools.chain(*theirs), strict=True):
        assert mine.token_ids == other.token_ids and mine.finish_reason == other.finish_reason
        assert mine.score == pytest.approx(other.score, abs=1e-12)
    for prompt, group in zip(prompts, ours, strict=True):
        (alone,) = groups([pair[0].generate(prompt, **common)])
        assert [one.token_ids for one in alone] == [one.token_ids for one in group]


@pytest.mark.slow
def test_a_single_beam_is_greedy_and_more_score_better(pair: list[LM]) -> None:
    for lm in pair:
        greedy = lm.generate(PROMPT, max_new_tokens=8)
        assert lm.generate(PROMPT, max_new_tokens=8, num_beams=1) == greedy
        beams = lm.generate(PROMPT, max_new_tokens=8, num_beams=8)
        assert beams.score * 8 > total(lm, PROMPT, greedy.token_ids) - 1e-9


@pytest.mark.slow
def test_a_stop_text_ends_a_beam(lm: LM) -> None:
    free = lm.generate("एक चूहा", max_new_tokens=8, num_beams=3)
    stop = free.text[2:4]
    found = lm.generate(
        "एक चूहा", max_new_tokens=8, num_beams=3, num_return_sequences=3, stop=(stop,)
    )
    assert all(stop not in one.text for one in found)
    assert {one.finish_reason for one in found} <= {"stop", "length"}
    assert [one.index for one in found] == [0, 1, 2]
    scores = [one.score for one in found]
    assert scores == sorted(scores, reverse=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 0}, "generate.num_beams 0 must be at least 1"),
        ({"num_beams": 2, "num_return_sequences": 3}, "num_return_sequences 3 is more than"),
        ({"num_return_sequences": 2}, "num_return_sequences 2 is more than"),
        ({"num_beams": 2, "temperature": 1.0}, "a beam search does not sample"),
        ({"num_beams": 2, "n": 2}, "generate.num_return_sequences in place of generate.n"),
        ({"num_beams": 2, "top_logprobs": 2, "logprobs": True}, "does not return"),
        ({"num_beams": 2, "draft": "x"}, "a beam search has no draft"),
        ({"num_beams": 2, "early_stopping": "always"}, "must be true, false or never"),
        ({"num_beams": 2, "length_penalty": 11.0}, "length_penalty 11.0 must be in"),
        ({"num_beams": 2, "length_penalty": float("nan")}, "length_penalty nan must be in"),
        ({"num_beams": 4, "num_return_sequences": 4, "allowed_tokens": (7,)}, "found only 1 texts"),
    ],
)
def test_settings_of_beams_that_cannot_be_are_named(
    settings: dict[str, Any], message: str, lm: LM
) -> None:
    with pytest.raises(InputError, match=message):
        lm.generate(PROMPT, max_new_tokens=4, **settings)


def test_beams_have_no_stream(lm: LM) -> None:
    with pytest.raises(InputError, match="beams have no stream; set num_beams to 1"):
        lm.stream("एक", num_beams=2)
