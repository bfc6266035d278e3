"""Types that mypy knows of results: a completion, a list, or either; those at run time."""

from typing import Any, assert_type

import numpy as np
import pytest

from mooshak.generation.completion import Completion
from mooshak.generation.lm import LM, Prompt

Many = Completion | list[Completion]
Any_ = Completion | list[Completion] | list[list[Completion]]


@pytest.mark.slow
def test_types_of_completions(lm: LM) -> None:
    """`mypy` checks this file, too."""
    n: int = 2
    mixed: list[Prompt] = ["a", [1]]
    values: dict[str, Any] = {"max_new_tokens": 1}
    assert isinstance(assert_type(lm.generate("a", max_new_tokens=1), Completion), Completion)
    assert isinstance(
        assert_type(lm.generate([1, 5], max_new_tokens=1, n=1), Completion), Completion
    )
    (one,) = assert_type(lm.generate(["a"], max_new_tokens=1), list[Completion])
    assert isinstance(one, Completion)
    for many in (
        assert_type(lm.generate([[1, 5]], max_new_tokens=1), list[Completion]),
        assert_type(lm.generate(mixed, max_new_tokens=1), list[Completion]),
        assert_type(lm.generate(("a", "b"), max_new_tokens=1), list[Completion]),
        assert_type(lm.generate("a", n=n, max_new_tokens=1), Any_),
        assert_type(lm.generate("a", num_beams=2, num_return_sequences=2, max_new_tokens=1), Any_),
        assert_type(lm.generate(["a"], n=2, max_new_tokens=1), Any_),
    ):
        assert isinstance(many, list)
    assert isinstance(lm.generate("a", **values), Completion)


@pytest.mark.slow
def test_types_of_scores_and_chats(lm: LM) -> None:
    assert isinstance(assert_type(lm.score("a b"), np.ndarray), np.ndarray)
    assert isinstance(assert_type(lm.score([1, 5]), np.ndarray), np.ndarray)
    assert isinstance(assert_type(lm.score(["a b"]), list[np.ndarray]), list)
    messages = [{"role": "user", "content": "a"}]
    assert isinstance(assert_type(lm.chat(messages, max_new_tokens=1), Completion), Completion)
    assert isinstance(assert_type(lm.chat(messages, n=2, max_new_tokens=1), Many), list)
