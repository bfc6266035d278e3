"""Strategies of decoding through the Python API: the same in both frameworks, defaults, ends."""

import json
import shutil
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from mooshak.errors import InputError
from mooshak.generation.lm import LM

pytestmark = pytest.mark.usefixtures("compiled_in_haste")

HINDI, ENGLISH = "एक चालाक चूहा", "a clever mouse"


def load(framework: str, path: Path) -> LM:
    lm: LM = import_module(f"mooshak_{framework}").load(path)
    return lm


STRATEGIES: list[dict[str, Any]] = [
    {"temperature": 1.2, "top_k": 30, "seed": 1},
    {"temperature": 1.0, "min_p": 0.02, "typical_p": 0.9, "seed": 2},
    {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
    {"temperature": 1.0, "presence_penalty": 1.0, "frequency_penalty": 0.5, "seed": 3},
    {"allowed_tokens": (5, 6, 7, 8), "temperature": 1.0},
    {"logit_bias": {9: 100.0}, "min_new_tokens": 12},
    {"bad_words": ("चूहा", "the"), "temperature": 1.5, "seed": 5},
]


@pytest.mark.slow
@pytest.mark.parametrize("settings", STRATEGIES, ids=lambda settings: next(iter(settings)))
def test_strategies_generate_the_same_in_both(settings: dict[str, Any], lms: dict[str, LM]) -> None:
    prompts = [HINDI, ENGLISH, [1, 5, 300]]
    found, theirs = (
        lm.generate(prompts, max_new_tokens=12, n=2, **settings) for lm in lms.values()
    )
    assert found == theirs
    # A prompt of a list is a request of its own.
    assert lms["torch"].generate(prompts[1], max_new_tokens=12, n=2, **settings) == found[1]
    tokens = [token for samples in found for sample in samples for token in sample.token_ids]
    if "allowed_tokens" in settings:
        assert set(tokens) <= {5, 6, 7, 8}
    if "logit_bias" in settings:
        assert set(tokens) == {9} and len(tokens) == 72


@pytest.mark.slow
def test_ngrams_are_not_repeated_in_the_output(lm: LM) -> None:
    done = lm.generate([1, 5, 6, 5], max_new_tokens=30, no_repeat_ngram_size=2, ignore_eos=True)
    ids = done.prompt_token_ids + done.token_ids
    assert len({*pairwise(ids)}) == len(ids) - 1


@pytest.mark.slow
def test_stop_token_ends_the_text_also_with_ignore_eos(lm: LM) -> None:
    full = lm.generate([1, 5], max_new_tokens=8, ignore_eos=True).token_ids
    end = full[3]
    done = lm.generate([1, 5], max_new_tokens=8, ignore_eos=True, stop_token_ids=(end,))
    assert done.token_ids == full[: full.index(end)] and done.finish_reason == "stop"


def test_end_token_does_not_come_before_the_minimum(lm: LM) -> None:
    assert lm.tokenizer is not None
    bias = {lm.tokenizer.eos_id: 100.0}
    assert lm.generate([1, 5], max_new_tokens=9, logit_bias=bias).token_ids == []
    done = lm.generate([1, 5], max_new_tokens=9, min_new_tokens=4, logit_bias=bias)
    assert len(done.token_ids) == 4 and done.finish_reason == "stop"


@pytest.mark.slow
def test_end_of_a_turn_does_not_come_before_the_minimum(lm: LM) -> None:
    assert lm.tokenizer is not None
    bias = {lm.tokenizer.id_of("<|end|>"): 100.0}
    messages = [{"role": "user", "content": ENGLISH}]
    assert lm.chat(messages, max_new_tokens=9, logit_bias=bias).token_ids == []
    done = lm.chat(messages, max_new_tokens=9, min_new_tokens=4, logit_bias=bias)
    assert len(done.token_ids) == 4 and done.finish_reason == "stop"


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_settings_that_leave_no_token_are_refused(temperature: float, lm: LM) -> None:
    """Token 0 would come out of logits that are all minus infinity."""
    settings = {"max_new_tokens": 4, "allowed_tokens": (7,), "temperature": temperature}
    assert lm.generate([1], **settings).token_ids == [7] * 4
    message = "no token may follow the 1 generated ones: relax generate.allowed_tokens or"
    with pytest.raises(InputError, match=message):
        lm.generate([1], **settings, no_repeat_ngram_size=1)


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_end_tokens_hold_with_another_tokenizer(
    framework: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    free = load(framework, tiny_checkpoint).generate([1, 5], max_new_tokens=8, ignore_eos=True)
    end = free.token_ids[3]
    expected = free.token_ids[: free.token_ids.index(end)]
    shutil.copytree(tiny_checkpoint, tmp_path / "c")
    values = {"eos_token_id": [2, end], "repetition_penalty": 1.0}
    (tmp_path / "c/generation_config.json").write_text(json.dumps(values))
    tokenizer = tiny_checkpoint / "tokenizer.model"
    lm = import_module(f"mooshak_{framework}").load(tmp_path / "c", tokenizer=tokenizer)
    assert lm.generate([1, 5], max_new_tokens=8).token_ids == expected
    lm.save(tmp_path / "saved")
    saved = load(framework, tmp_path / "saved")
    assert saved.defaults == {"repetition_penalty": 1.0}
    assert saved.generate([1, 5], max_new_tokens=8).token_ids == expected
    # Without any tokenizer.
    (tmp_path / "saved/tokenizer.model").unlink()
    alone = load(framework, tmp_path / "saved")
    assert alone.generate([1, 5], max_new_tokens=8).token_ids == expected


@pytest.mark.slow
@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_defaults_come_from_generation_config(
    framework: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_checkpoint, tmp_path / "c")
    values = {"do_sample": True, "top_k": 9, "temperature": None, "min_new_tokens": 20}
    (tmp_path / "c/generation_config.json").write_text(json.dumps(values))
    lm = load(framework, tmp_path / "c")
    assert lm.defaults == {"temperature": 1.0, "top_k": 9, "min_new_tokens": 20}
    settings = {"max_new_tokens": 8, "ignore_eos": True, "seed": 1}
    expected = load(framework, tiny_checkpoint)
    sampled = {"temperature": 1.0, "top_k": 9, "min_new_tokens": 8}
    assert lm.generate(HINDI, **settings) == expected.generate(HINDI, **settings, **sampled)
    greedy = expected.generate(HINDI, **settings)
    given = {"temperature": 0.0, "min_new_tokens": 0}
    assert lm.generate(HINDI, **settings, **given).token_ids == greedy.token_ids
    # Without do_sample, transformers ignores the settings of sampling.
    (tmp_path / "c/generation_config.json").write_text(json.dumps({"temperature": 0.6, "top_p": 2}))
    assert load(framework, tmp_path / "c").defaults == {}
    (tmp_path / "c/generation_config.json").write_text(json.dumps({"do_sample": True, "top_p": 2}))
    with pytest.raises(InputError, match=r"generation_config.json: generate.top_p 2 must be in"):
        load(framework, tmp_path / "c")
