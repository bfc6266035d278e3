"""Speculative decoding: the text with a draft model is the text without one."""

from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from mooshak.checkpoints import safetensors
from mooshak.errors import InputError
from mooshak.generation.completion import Completion
from mooshak.generation.lm import LM
from mooshak.generation.speculative import count_accepted
from tests.drawn_checkpoints import drawn_checkpoint
from tests.serving.conftest import MODELS

pytestmark = pytest.mark.usefixtures("compiled_in_haste")

PROMPTS = [[1, 5, 300, 7, 9], [1], list(range(3, 30))]


@pytest.fixture(scope="module", params=list(product(("torch", "jax"), MODELS)), ids="-".join)
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[LM, Path]:
    """A model in float64, and the checkpoint of one with nearly the same weights."""
    framework, name = request.param
    path = tmp_path_factory.mktemp("speculative")
    for part, scale in (("target", 3.0), ("draft", 2.7)):
        drawn = drawn_checkpoint(MODELS[name], 5, scale=scale)
        safetensors.write_checkpoint(path / part, drawn)
    return import_module(f"mooshak_{framework}").load(path / "target", "float64"), path / "draft"


def compare(found: Any, plain: Any) -> tuple[int, int]:
    """Assert that both are the same but for the counts; return drafted and accepted tokens."""
    if isinstance(found, list):
        counts = [compare(one, other) for one, other in zip(found, plain, strict=True)]
        return sum(a for a, _ in counts), sum(b for _, b in counts)
    assert isinstance(found, Completion) and (plain.n_drafted, plain.n_accepted) == (None, None)
    assert found.token_ids == plain.token_ids and found.finish_reason == plain.finish_reason
    for name in ("logprobs", "prompt_logprobs"):
        ours, theirs = getattr(found, name), getattr(plain, name)
        assert (ours is None) == (theirs is None)
        if ours is not None:
            first = int(name == "prompt_logprobs")
            assert ours[first:] == pytest.approx(theirs[first:], abs=1e-12)
    if plain.top_logprobs is not None:
        for ours, theirs in zip(found.top_logprobs or (), plain.top_logprobs, strict=True):
            assert list(ours) == list(theirs) and ours == pytest.approx(theirs, abs=1e-12)
    assert found.n_drafted is not None and found.n_accepted is not None
    assert 0 <= found.n_accepted <= min(found.n_drafted, len(found.token_ids) + 1)
    return found.n_drafted, found.n_accepted


SETTINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0, "seed": 3, "n": 2, "logprobs": True, "top_logprobs": 3},
    {"temperature": 0.7, "top_p": 0.9, "top_k": 50, "draft_tokens": 1, "prompt_logprobs": True},
    {"temperature": 1.0, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "draft_tokens": 7},
    {"min_new_tokens": 6, "frequency_penalty": 0.5, "logprobs": True, "processed_logprobs": True}
    | {"temperature": 1.0, "min_p": 0.001},
]


@pytest.mark.slow
@pytest.mark.parametrize("settings", SETTINGS, ids=range(len(SETTINGS)))
def test_text_with_a_draft_is_the_text_without(
    settings: dict[str, Any], pair: tuple[LM, Path]
) -> None:
    lm, draft = pair
    common = {"max_new_tokens": 17, "stop_token_ids": tuple(range(100, 130)), **settings}
    plain = lm.generate(PROMPTS, **common)
    drafted, accepted = compare(lm.generate(PROMPTS, draft=draft, **common), plain)
    assert 0 < accepted < drafted  # Rejected tokens are rolled back, accepted ones are used.


@pytest.mark.slow
def test_a_model_that_drafts_for_itself_is_always_accepted(pair: tuple[LM, Path]) -> None:
    lm, _ = pair
    settings = {"max_new_tokens": 16, "temperature": 1.0, "draft_tokens": 3}
    found = lm.generate(PROMPTS[0], draft=lm, **settings)
    # Of the 16 tokens one is drawn after the prompt, then 3 of 4 are drafted; at the end 2.
    assert (found.n_drafted, found.n_accepted) == (11, 11)
    compare(found, lm.generate(PROMPTS[0], **settings))


@pytest.mark.slow
def test_a_draft_fills_the_model_s_positions(pair: tuple[LM, Path]) -> None:
    lm, draft = pair
    settings = {"max_new_tokens": 90, "temperature": 1.0, "draft_tokens": 8, "ignore_eos": True}
    prompt = list(range(3, 9))
    compare(lm.generate(prompt, draft=draft, **settings), lm.generate(prompt, **settings))
    with pytest.raises(InputError, match="97 tokens"):
        lm.generate([*prompt, 9], draft=draft, **settings)


@pytest.mark.slow
def test_draft_stops_where_no_token_may_follow(pair: tuple[LM, Path]) -> None:
    """The settings permit three tokens, each once: the fourth is an error, also while drafting."""
    lm, draft = pair
    settings = {"allowed_tokens": (7, 8, 9), "no_repeat_ngram_size": 1}
    plain = lm.generate([1], max_new_tokens=3, **settings)
    compare(lm.generate([1], max_new_tokens=3, draft=draft, **settings), plain)
    with pytest.raises(InputError, match="no token may follow the 3 generated ones"):
        lm.generate([1], max_new_tokens=8, draft=draft, **settings)
    ended = {**settings, "stop_token_ids": (plain.token_ids[2],), "max_new_tokens": 8}
    compare(lm.generate([1], draft=draft, **ended), lm.generate([1], **ended))


@pytest.mark.slow
def test_stream_and_stop_texts_with_a_draft(lm: LM, tiny_checkpoint: Path) -> None:
    for settings in ({"temperature": 1.0, "seed": 4}, {}):
        plain = lm.generate("एक चूहा", max_new_tokens=20, **settings)
        assert plain.text is not None
        found = lm.generate("एक चूहा", max_new_tokens=20, draft=str(tiny_checkpoint), **settings)
        assert found.text == plain.text
        chunks = list(lm.stream("एक चूहा", max_new_tokens=20, draft=tiny_checkpoint, **settings))
        assert "".join(chunks) == plain.text
        stop = plain.text[5:8]
        for k in (2, 3):
            options = {"max_new_tokens": 20, "draft": lm, "draft_tokens": k, **settings}
            ended = lm.generate("एक चूहा", stop=stop, **options)
            assert ended.text == plain.text[: plain.text.index(stop)]
            # One token is drawn after the prompt, and one after every k that are accepted.
            accepted = [i for i in range(len(ended.token_ids)) if i % (k + 1)]
            assert ended.n_accepted == len(accepted)


@pytest.mark.slow
def test_drafts_that_do_not_fit_are_refused(
    lm: LM, lms: dict[str, LM], pair: tuple[LM, Path], tmp_path: Path
) -> None:
    _, other = pair
    for draft, message in (
        (tmp_path / "none", "none"),
        (7, "must be a checkpoint or a loaded model"),
        ("", "must be a checkpoint or a loaded model"),
        (next(one for one in lms.values() if one is not lm), r"load it with mooshak_\w+\.load"),
    ):
        with pytest.raises(InputError, match=message):
            lm.generate([1, 5], max_new_tokens=4, draft=draft)
    small = drawn_checkpoint(MODELS["mooshak"].__class__(vocab_size=64, dim=32, n_heads=2))
    safetensors.write_checkpoint(tmp_path / "small", small)
    with pytest.raises(InputError, match="draft has a vocabulary of 64 tokens, the model of 512"):
        lm.generate([1, 5], max_new_tokens=4, draft=tmp_path / "small")
    with pytest.raises(InputError, match=r"generate\.draft_tokens 0 must be at least 1"):
        lm.generate([1, 5], max_new_tokens=4, draft=other, draft_tokens=0)


def test_accepted_tokens_are_counted_up_to_the_first_other_one() -> None:
    assert count_accepted([1, 2, 3], [1, 2, 3, 4]) == 3
    assert count_accepted([1, 2, 3], [1, 5, 3, 4]) == 1
    assert count_accepted([1, 2, 3], [4, 2, 3, 4]) == 0
    assert count_accepted([], [4]) == 0
