"""Preference pairs: the right answer to a question about a tale, and one of another tale."""

from collections.abc import Iterator
from typing import Any

from mooshak.corpus.tasks.draw import assistant, user
from mooshak.corpus.tasks.questions import questions


def generate(seed: int, language: str) -> Iterator[dict[str, Any]]:
    """Yield a pair for each question: the rejected answer is that of an earlier, like question."""
    earlier: dict[str, str] = {}
    for asked in questions(seed):
        right, wrong = asked.answer[language], earlier.get(asked.kind)
        if wrong is not None and wrong != right and wrong not in asked.text[language]:
            yield {
                "prompt": user(asked.prompt(language)),
                "chosen": assistant(right),
                "rejected": assistant(wrong),
                "task": "right_answer",
                "language": language,
            }
        earlier[asked.kind] = right
