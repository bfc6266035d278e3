"""Tables on the terminal."""

import sys
from collections.abc import Mapping

from rich.console import Console
from rich.table import Table

MAX_ROWS = 20
"""Operations that `print_times` shows."""


def print_table(table: Table, width: int = 120) -> None:
    """Print a table as wide as the terminal, or `width` columns wide to a file or pipe."""
    Console(width=None if sys.stdout.isatty() else width).print(table)


def print_times(seconds: Mapping[str, float], counts: Mapping[str, int]) -> None:
    """Print the slowest operations, with their share of the total time."""
    total = sum(seconds.values())
    table = Table(title=f"time by operation: {total:.3f} s over all threads")
    for title in ("operation", "calls", "seconds", "share"):
        table.add_column(title, justify="left" if title == "operation" else "right")
    for name in sorted(seconds, key=lambda name: -seconds[name])[:MAX_ROWS]:
        share = seconds[name] / total
        table.add_row(name[:70], str(counts[name]), f"{seconds[name]:.4f}", f"{share:.1%}")
    print_table(table)
