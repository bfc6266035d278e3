"""Translations of a part of a tale between Hindi and English."""

from collections.abc import Iterator
from itertools import count
from typing import Any

from mooshak.corpus.tales import tale
from mooshak.corpus.tasks.draw import assistant, pick, user

ASK = {"hi": "हिंदी में अनुवाद करो", "en": "Translate into English"}
"""Language of the answer -> the instruction, in that language."""

PARTS = ("title", "opening", "wish", "moral")


def generate(seed: int, language: str) -> Iterator[dict[str, Any]]:
    """Yield a part of each tale in the other language, to be translated into `language`."""
    other = "en" if language == "hi" else "hi"
    for index in count():
        part = tale(seed, index).sections[pick(PARTS, "translation", seed, index)]
        yield {
            "prompt": user(f"{ASK[language]}: {part[other]}"),
            "completion": assistant(part[language]),
            "task": "translation",
            "language": language,
        }
