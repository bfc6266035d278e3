"""A row of the accelerator report, and what the parts that measure rows are given."""

import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Row:
    """One measurement, or the reason why there is none."""

    name: str
    value: float | str | None = None
    unit: str = ""
    allowed: float | None = None
    passed: bool | None = None
    """None for a figure without a bound."""
    note: str = ""


@dataclass(frozen=True)
class Setup:
    """The machine that the parts measure, and how."""

    out: Path
    """Directory of the report; the parts write their runs there."""
    torch_device: str
    jax_device: str
    """cpu, cuda or tpu."""
    small: bool
    """True for the sizes of a test on a CPU."""


Part = Callable[[Setup], Iterable[Row]]


def attempt(name: str, measure: Callable[[], Iterable[Row]]) -> Iterator[Row]:
    """Yield the rows of a measurement; if it fails, a row with the reason instead."""
    try:
        yield from measure()
    except Exception as error:
        traceback.print_exc()
        yield Row(name, reason(error), passed=False)


def reason(error: BaseException) -> str:
    """Return the type and the first line of an error."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"
