"""Tasks about the tales: conversations, preference pairs and questions with known answers.

A task is a pure function of (seed, number, language), in Hindi and in English.
"""

from collections.abc import Callable, Iterator
from itertools import cycle
from typing import Any

from mooshak.config.sections import SourceConfig
from mooshak.corpus.tales import LANGUAGES
from mooshak.corpus.tasks import (
    asked_language,
    continuation,
    known_answers,
    questions,
    right_answer,
    translation,
)
from mooshak.errors import InputError, did_you_mean

TASKS: dict[str, Callable[[int, str], Iterator[dict[str, Any]]]] = {
    "questions": questions.generate,
    "translation": translation.generate,
    "continuation": continuation.generate,
    "right_answer": right_answer.generate,
    "asked_language": asked_language.generate,
    "known_answers": known_answers.generate,
}
"""Name -> generator of endless records: (seed, language)."""

DEFAULT = "questions,translation,continuation"
COUNT = 1000


def task_records(source: SourceConfig) -> Iterator[dict[str, Any]]:
    """Yield the records of a source of kind tasks, those of its tasks in turn.

    Raises `InputError` for an unknown task or language.
    """
    names = [name.strip() for name in (source.path or DEFAULT).split(",")]
    for name in names:
        if name not in TASKS:
            raise InputError(
                f"source {source.name}: there is no task {name!r}{did_you_mean(name, TASKS)}"
            )
    if source.language not in LANGUAGES:
        raise InputError(
            f"source {source.name}: there are no tasks in {source.language!r}; use hi or en"
        )
    streams = cycle([TASKS[name](source.seed, source.language) for name in names])
    return (next(next(streams)) for _ in range(source.documents or COUNT))
