"""Rewards of sampled answers: functions with TRL's arguments, named as MODULE:FUNCTION."""

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any

from mooshak.data.prompt_batches import Prompt
from mooshak.errors import InputError
from mooshak.evaluation.exact_match import is_match
from mooshak.generation.completion import Completion

Reward = Callable[..., Sequence[float]]
"""Function of prompts, completions, completion_ids and the fields of the records, by keyword."""


def exact_match(completions: Sequence[Any], answer: Sequence[str], **_: Any) -> list[float]:
    """Return 1 for each completion that is its record's `answer`, else 0 (`is_match`)."""
    pairs = zip(map(text_of, completions), answer, strict=True)
    return [float(is_match(text, str(right))) for text, right in pairs]


def text_of(completion: Any) -> str:
    """Return the text of a completion, which is a text or messages."""
    if isinstance(completion, str):
        return completion
    return "".join(message["content"] for message in completion)


def load_reward(name: str) -> Reward:
    """Return the function MODULE:FUNCTION. Raises `InputError` if there is none."""
    module, separator, attribute = name.partition(":")
    if not (module and separator and attribute):
        raise InputError(f"grpo.reward {name!r} is not MODULE:FUNCTION, such as rewards:length")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise InputError(
            f"grpo.reward {name} cannot be imported: {error}; the module must be in the current "
            "directory or on PYTHONPATH"
        ) from error
    if not callable(function):
        raise InputError(f"grpo.reward {name} is not a function")
    reward: Reward = function
    return reward


def call_reward(
    reward: Reward, name: str, prompts: Sequence[Prompt], completions: Sequence[Completion]
) -> list[float]:
    """Return the reward of each completion; prompt i is that of completion i.

    Raises `InputError`, which names the sample, for one that is not a finite number, and if the
    function fails.
    """
    keys = dict.fromkeys(key for prompt in prompts for key in prompt.fields)
    columns: Mapping[str, Any] = {key: [one.fields.get(key) for one in prompts] for key in keys}
    texts = [
        [{"role": "assistant", "content": one.text}] if prompt.is_chat else one.text
        for prompt, one in zip(prompts, completions, strict=True)
    ]
    ids = [one.token_ids for one in completions]
    try:
        found = list(
            reward(
                prompts=[one.text for one in prompts],
                completions=texts,
                completion_ids=ids,
                **columns,
            )
        )
    except Exception as error:
        raise InputError(f"grpo.reward {name} failed: {type(error).__name__}: {error}") from error
    if len(found) != len(completions):
        raise InputError(
            f"grpo.reward {name} returned {len(found)} rewards for {len(completions)} completions"
        )
    for value, prompt, completion in zip(found, prompts, completions, strict=True):
        if not _is_number(value):
            raise InputError(
                f"grpo.reward {name} is {value!r}, not a number, for sample {completion.index} of "
                f"the prompt at {prompt.where}: {completion.text!r:.60}"
            )
    return [float(value) for value in found]


def _is_number(value: Any) -> bool:
    # NumPy's scalars are numbers, tensors of one element are converted.
    if not isinstance(value, Real) and not hasattr(value, "item"):
        return False
    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError, RuntimeError):
        return False
