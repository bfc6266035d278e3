"""Choices of the tasks: a hash of a name, which no release of a library changes."""

import hashlib
from collections.abc import Sequence
from typing import Any, TypeVar

T = TypeVar("T")


def pick(choices: Sequence[T], *name: Any) -> T:
    """Return one of the choices, by the name of the draw."""
    digest = hashlib.blake2b(" ".join(map(str, name)).encode(), digest_size=8).digest()
    return choices[int.from_bytes(digest) % len(choices)]


def user(content: str) -> list[dict[str, str]]:
    """Return a prompt of one turn."""
    return [{"role": "user", "content": content}]


def assistant(content: str) -> list[dict[str, str]]:
    """Return an answer of one turn."""
    return [{"role": "assistant", "content": content}]
