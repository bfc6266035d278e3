"""Tables for people."""

import sys

from rich.console import Console
from rich.table import Table


def print_table(table: Table, width: int = 120) -> None:
    """Print a table, as wide as the terminal.

    A file or a pipe has no width that numbers would have to be folded to: `width` columns there.
    """
    Console(width=None if sys.stdout.isatty() else width).print(table)
