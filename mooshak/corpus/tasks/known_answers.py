"""Questions with known answers, for rewards that compare: a prompt without a completion."""

from collections.abc import Iterator
from typing import Any

from mooshak.corpus.tasks.draw import user
from mooshak.corpus.tasks.questions import questions


def generate(seed: int, language: str) -> Iterator[dict[str, Any]]:
    """Yield the question about each tale with the field `answer`."""
    for asked in questions(seed):
        yield {
            "prompt": user(asked.prompt(language)),
            "answer": asked.answer[language],
            "task": "known_answers",
            "language": language,
        }
