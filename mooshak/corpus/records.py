"""Records of a source: the objects of JSONL, Parquet and Hugging Face datasets, or of the tasks.

Each comes with the place where it stands, for messages.
"""

import json
import sys
from collections.abc import Iterator
from itertools import islice
from typing import Any

from mooshak.config.sections import Config, SourceConfig
from mooshak.corpus.readers import files_of, load_examples, not_text, open_file
from mooshak.corpus.tasks import task_records
from mooshak.errors import InputError

Record = tuple[str, dict[str, Any]]
"""Place and fields."""


def records(source: SourceConfig, config: Config) -> Iterator[Record]:
    """Return the records of a source in a fixed order, at most `source.documents`.

    Raises `InputError` if the source cannot be read, or its kind has no records.
    """
    if source.kind not in READERS:
        raise InputError(
            f"source {source.name}: kind {source.kind} has documents, not conversations; set kind "
            f"to one of {', '.join(READERS)}, or data.format text"
        )
    return islice(READERS[source.kind](source, config), source.documents)


def _tasks(source: SourceConfig, config: Config) -> Iterator[Record]:
    for number, record in enumerate(task_records(source), 1):
        yield f"source {source.name}, task {number}", record


def _jsonl(source: SourceConfig, config: Config) -> Iterator[Record]:
    broken, last = 0, ""
    for name in files_of(source):
        with open_file(source, name) as file:
            for number, line in enumerate(file, 1):
                if b"\0" in line:
                    raise not_text(source, name, f"a NUL byte in line {number}")
                if not line.strip():
                    continue
                try:
                    record = json.loads(line.decode("utf-8-sig"))
                    json.dumps(record, ensure_ascii=False).encode()  # Fails on a lone surrogate.
                    if not isinstance(record, dict):
                        raise ValueError("not an object")
                except (ValueError, RecursionError) as error:
                    broken, last = broken + 1, f"{name}, line {number}: not a JSON object ({error})"
                    if broken > config.data.max_broken_lines:
                        raise InputError(
                            f"source {source.name}: {last}; {broken} invalid lines are more than "
                            f"data.max_broken_lines {config.data.max_broken_lines}: repair the "
                            "file, or raise the limit"
                        ) from None
                    continue
                yield f"{name}, line {number}", record
    if broken:
        print(f"source {source.name}: {broken} invalid lines skipped, the last: {last}",
              file=sys.stderr)  # fmt: skip


def _parquet(source: SourceConfig, config: Config) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    for name in files_of(source):
        try:
            with pyarrow.parquet.ParquetFile(name) as file:
                number = 0
                for batch in file.iter_batches(batch_size=1024):
                    for record in batch.to_pylist():
                        number += 1
                        yield f"{name}, row {number}", record
        except (pyarrow.ArrowInvalid, OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"source {source.name}: {name} is not a complete Parquet file ({error}); "
                "replace it, or set kind"
            ) from error


def _huggingface(source: SourceConfig, config: Config) -> Iterator[Record]:
    for number, example in enumerate(load_examples(source), 1):
        yield f"{source.path}, split {source.split}, example {number}", dict(example)


READERS = {"tasks": _tasks, "jsonl": _jsonl, "parquet": _parquet, "huggingface": _huggingface}
