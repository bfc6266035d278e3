"""Rewards for tests of the grpo commands."""

from collections.abc import Sequence
from typing import Any


def odd(
    prompts: Sequence[str],
    completions: Sequence[str],
    completion_ids: Sequence[Sequence[int]],
    n: Sequence[int],
    **_: Any,
) -> list[float]:
    """Return the share of odd tokens: most groups have a signal."""
    assert len(prompts) == len(completions) == len(n)
    return [sum(id % 2 for id in ids) / (1 + len(ids)) for ids in completion_ids]


def equal(completions: Sequence[str], **_: Any) -> list[float]:
    return [0.25] * len(completions)


def nan(completions: Sequence[str], **_: Any) -> list[float]:
    return [float("nan")] * len(completions)
