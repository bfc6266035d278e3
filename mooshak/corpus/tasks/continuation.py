"""Continuations: what happens after the beginning of a tale."""

from collections.abc import Iterator
from itertools import count
from typing import Any

from mooshak.corpus.tales import tale
from mooshak.corpus.tasks.draw import assistant, user

ASK = {"hi": "कहानी आगे सुनाओ", "en": "Continue the tale"}


def generate(seed: int, language: str) -> Iterator[dict[str, Any]]:
    """Yield the opening of each tale as the prompt, and the wish that follows as the answer."""
    for index in count():
        sections = tale(seed, index, (language,)).sections
        yield {
            "prompt": user(f"{ASK[language]}: {sections['opening'][language]}"),
            "completion": assistant(sections["wish"][language]),
            "task": "continuation",
            "language": language,
        }
