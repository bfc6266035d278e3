"""Log-probabilities of tokens and prompts: of generate, score and the engine, equal in both."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mooshak.config.generate import GenerateConfig
from mooshak.errors import InputError
from mooshak.generation.lm import LM
from mooshak_torch.sampling import most_probable
from tests.serving.conftest import load, make_scheduler

pytestmark = pytest.mark.usefixtures("compiled_in_haste")

PROMPT = [1, 5, 300, 7, 9]


def full_logits(lm: LM, ids: list[int]) -> np.ndarray:
    """Return the logits after each token, float64 [T, V]."""
    if hasattr(lm, "graphdef"):
        return np.asarray(lm.model(np.array([ids])), np.float64)[0]
    return lm.model(torch.tensor([ids])).detach().double().numpy()[0]


def log_softmax(x_TV: np.ndarray) -> np.ndarray:
    x_TV = x_TV - x_TV.max(-1, keepdims=True)
    found: np.ndarray = x_TV - np.log(np.exp(x_TV).sum(-1, keepdims=True))
    return found


@pytest.mark.slow
def test_prompt_and_top_log_probs_are_the_model_s(lm: LM) -> None:
    settings: dict[str, Any] = {"prompt_logprobs": True, "logprobs": True, "top_logprobs": 3}
    done = lm.generate(PROMPT, max_new_tokens=6, temperature=1.2, ignore_eos=True, **settings)
    ids = PROMPT + done.token_ids
    expected_TV = log_softmax(full_logits(lm, ids))
    assert done.prompt_logprobs is not None and done.prompt_top_logprobs is not None
    assert done.prompt_logprobs[0] is None and done.prompt_top_logprobs[0] is None
    found = [*done.prompt_logprobs[1:], *(done.logprobs or [])]
    tops = [*done.prompt_top_logprobs[1:], *(done.top_logprobs or [])]
    assert len(found) == len(tops) == len(ids) - 1
    for t, (log_prob, top) in enumerate(zip(found, tops, strict=True)):
        assert log_prob == pytest.approx(expected_TV[t, ids[t + 1]], abs=2e-5)
        order = np.argsort(-expected_TV[t], kind="stable")[:3]
        assert top is not None and list(top) == order.tolist()
        assert list(top.values()) == pytest.approx(expected_TV[t, order], abs=2e-5)
    # Only the prompt is scored.
    scored = lm.generate(PROMPT, max_new_tokens=0, prompt_logprobs=True)
    assert scored.token_ids == [] and scored.logprobs is None and scored.text == ""
    assert scored.prompt_logprobs == [None, *lm.score(PROMPT)]
    alone = lm.generate([1], max_new_tokens=0, prompt_logprobs=True, top_logprobs=2)
    assert (alone.prompt_logprobs, alone.prompt_top_logprobs) == ([None], [None])


@pytest.mark.slow
def test_engine_returns_the_log_probs_of_generate(tiny_checkpoint: Path) -> None:
    for framework in ("torch", "jax"):
        lm = load(framework, tiny_checkpoint)
        common: dict[str, Any] = {"logprobs": True, "prompt_logprobs": True, "top_logprobs": 4}
        every = [
            common | {"max_new_tokens": 6, "temperature": 1.3, "top_k": 5, "ignore_eos": True},
            common | {"max_new_tokens": 0},
            {"max_new_tokens": 6, "logprobs": True, "processed_logprobs": True, "min_p": 0.01}
            | {"temperature": 1.0, "ignore_eos": True, "repetition_penalty": 1.5},
        ]
        scheduler = make_scheduler(framework, lm, chunk=4)
        prompts = [PROMPT, list(range(3, 20)), PROMPT]
        found = scheduler.generate(prompts, [GenerateConfig(**one) for one in every])
        for prompt, settings, (mine,) in zip(prompts, every, found, strict=True):
            plain = lm.generate(prompt, **settings)
            assert mine.token_ids == plain.token_ids
            for name in ("logprobs", "prompt_logprobs"):
                a, b = getattr(mine, name), getattr(plain, name)
                assert (a is None) == (b is None)
                if a is not None:
                    assert a[-1:] == pytest.approx(b[-1:], abs=2e-5)
                    assert a[1:] == pytest.approx(b[1:], abs=2e-5) and len(a) == len(b)
            for name in ("top_logprobs", "prompt_top_logprobs"):
                a, b = getattr(mine, name), getattr(plain, name)
                assert (a is None) == (b is None)
                for one, other in zip(a or (), b or (), strict=True):
                    assert (one is None) == (other is None)
                    assert one is None or list(one) == list(other)


@pytest.mark.slow
def test_processed_log_probs_are_those_of_the_draw(lm: LM) -> None:
    settings: dict[str, Any] = {"temperature": 0.7, "top_k": 4, "logit_bias": {9: 2.0}}
    done = lm.generate(
        PROMPT, max_new_tokens=6, logprobs=True, processed_logprobs=True, top_logprobs=9,
        ignore_eos=True, **settings,
    )  # fmt: skip
    logits_TV = full_logits(lm, PROMPT + done.token_ids)[len(PROMPT) - 1 :]
    logits_TV[:, 9] += 2
    assert done.logprobs is not None and done.top_logprobs is not None
    for t, token in enumerate(done.token_ids):
        scores = logits_TV[t] / 0.7
        kept = np.argsort(-scores, kind="stable")[:4]
        expected = log_softmax(scores[kept])
        assert list(done.top_logprobs[t]) == kept.tolist()  # Others have no probability.
        assert list(done.top_logprobs[t].values()) == pytest.approx(expected, abs=5e-5)
        assert done.logprobs[t] == pytest.approx(expected[list(kept).index(token)], abs=5e-5)


def test_equal_probabilities_are_in_the_order_of_ids() -> None:
    logits_BV = torch.zeros(1, 400)
    logits_BV[0, [7, 390]] = 1.0
    top_BN, _ = most_probable(logits_BV)
    assert top_BN[0, :2].tolist() == [7, 390]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens 0 must be at least 1"),
        ({"max_new_tokens": -1, "prompt_logprobs": True}, "max_new_tokens -1 must be at least 0"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs 21 is not in 0 .. 20"),
        ({"top_logprobs": 2}, "top_logprobs 2 needs generate.logprobs"),
        ({"processed_logprobs": True}, "processed_logprobs needs generate.logprobs"),
    ],
)
def test_settings_of_log_probs_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        GenerateConfig(**settings)


@pytest.mark.parametrize("settings", [{"max_new_tokens": 999}, {"bad_words": ("x",), "n": 2}])
def test_stream_raises_errors_when_it_is_called(settings: dict[str, Any], lm: LM) -> None:
    with pytest.raises(InputError):
        lm.stream(PROMPT, **settings)


def test_abandoned_stream_leaves_the_gradient_mode(tiny_checkpoint: Path) -> None:
    parts = load("torch", tiny_checkpoint).stream(PROMPT, max_new_tokens=20, ignore_eos=True)
    next(parts)
    assert torch.is_grad_enabled()
    del parts
    assert torch.is_grad_enabled()
