"""Metadata of the fields of the configuration: ranges of numbers and paths, with their check.

steps: int = number(1000, at_least=1)
dir: str = path("runs/default")
"""

import math
import os
import re
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from typing import Any, TypeVar, get_args

from mooshak.errors import InputError

T = TypeVar("T")

MAX_INT = 2**31 - 1
"""Largest integer of the fields without another limit: steps and sizes are int32 on devices."""


@dataclass(frozen=True)
class Range:
    """The numbers that a field accepts."""

    lowest: float
    highest: float
    is_open: tuple[bool, bool] = (False, False)
    """True if the lowest and the highest number themselves are excluded."""

    def __contains__(self, value: Any) -> bool:
        above: bool = self.lowest < value if self.is_open[0] else self.lowest <= value
        below: bool = value < self.highest if self.is_open[1] else value <= self.highest
        return above and below

    def __str__(self) -> str:
        if self.lowest <= -(2**63):
            return "an integer of 64 bits"
        parts = [f"{'above' if self.is_open[0] else 'at least'} {self.lowest:.12g}"]
        if self.highest == math.inf:
            parts.append("finite" if self.is_open[1] else "or .inf")
        elif self.highest != MAX_INT:
            parts.append(f"{'below' if self.is_open[1] else 'at most'} {self.highest:.12g}")
        return " and ".join(parts).replace("and or", "or")


def number(
    default: T,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
) -> T:
    """Return a field with a range, whose limits are exclusive for `above` and `below`.

    Without an upper limit, an integer is at most `MAX_INT` and a float is finite.
    """
    low, high = above if at_least is None else at_least, below if at_most is None else at_most
    assert low is not None
    is_open = at_least is None, at_most is None and (high is not None or isinstance(default, float))
    if high is None:
        high = math.inf if isinstance(default, float) else MAX_INT
    result: T = field(default=default, metadata={"range": Range(low, high, is_open)})  # type: ignore[assignment]
    return result


def path(default: str) -> str:
    """Return a field that holds a path, in which `~` is expanded."""
    result: str = field(default=default, metadata={"path": True})  # type: ignore[assignment]
    return result


def check_fields(values: Any, name: str) -> None:
    """Expand the paths and check the numbers of a section; its `__post_init__` calls this.

    `name` is the dotted name of the section. Raises `InputError` with key, value and range.
    """
    for one in fields(values):
        value = getattr(values, one.name)
        if (allowed := one.metadata.get("range")) is not None:
            _check_number(f"{name}.{one.name}", value, allowed, one.type)
        elif one.metadata.get("path"):
            key = f"{name}.{one.name.rstrip('_')}"
            if not value and one.default:
                raise InputError(f"{key} is empty; name a path, or remove the key for its default")
            object.__setattr__(values, one.name, usable_path(key, value))


def _check_number(key: str, value: Any, allowed: Range, kind: Any) -> None:
    kinds = get_args(kind) or (kind,)
    if value is None and type(None) in kinds:
        return
    wanted = Real if float in kinds else Integral
    if not isinstance(value, wanted) or isinstance(value, bool):
        what = "a number" if wanted is Real else "an integer"
        null = " or null" if type(None) in kinds else ""
        shown = "null" if value is None else repr(value)
        raise InputError(f"{key} must be {what}{null}, not {shown}")
    if value not in allowed:
        raise InputError(f"{key} must be {allowed}, not {value}")


def usable_path(key: str, value: str) -> str:
    """Return a path with `~` or `~USER` replaced.

    Raises `InputError` if there is no such home, and for what no path of a file is.
    """
    if "\0" in value:
        raise InputError(f"{key} {value!r} contains a NUL character; remove it")
    if re.match(r"\$\{?\w", value):
        raise InputError(f"{key} {value}: variables are not replaced here; write the full path")
    result = os.path.expanduser(value)
    if result.startswith("~"):
        raise InputError(f"{key} {value}: the home directory of ~ is unknown; give the full path")
    return result
