"""Progress of the tokenization of a source."""

import contextlib
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from mooshak.config.sections import SourceConfig


@contextlib.contextmanager
def progress_bar(source: SourceConfig, show: bool) -> Iterator[Any]:
    """Show documents and tokens on standard error; yield a function that adds to both."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,} documents, {task.fields[tokens]:,} tokens"),
        TimeElapsedColumn(),
    )
    total = source.documents or (1000 if source.kind == "tales" else None)
    with Progress(*columns, console=Console(stderr=True), disable=not show) as bar:
        task = bar.add_task(f"tokenizing {source.name}", total=total, tokens=0)

        def advance(documents: int, tokens: int) -> None:
            tokens += bar.tasks[task].fields["tokens"]
            bar.update(task, advance=documents, tokens=tokens)

        yield advance
