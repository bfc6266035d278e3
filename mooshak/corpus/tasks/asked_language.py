"""Preference pairs: the answer in the language of the question, and in the other language."""

from collections.abc import Iterator
from typing import Any

from mooshak.corpus.tasks.draw import assistant, user
from mooshak.corpus.tasks.questions import questions


def generate(seed: int, language: str) -> Iterator[dict[str, Any]]:
    """Yield a pair for each question about a tale."""
    other = "en" if language == "hi" else "hi"
    for asked in questions(seed):
        yield {
            "prompt": user(asked.prompt(language)),
            "chosen": assistant(asked.answer[language]),
            "rejected": assistant(asked.answer[other]),
            "task": "asked_language",
            "language": language,
        }
