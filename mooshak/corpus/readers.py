"""Readers of text sources: an iterator of cleaned documents for each kind.

| kind        | path              | document                                |
|-------------|-------------------|-----------------------------------------|
| tales       |                   | a tale, written by `mooshak.corpus.tales` |
| text        | glob              | a UTF-8 file                            |
| jsonl       | glob              | the field `column` of a line            |
| parquet     | glob              | a value of the column `column`          |
| huggingface | name of a dataset | the field `column` of an example        |

The order is fixed (files sorted by name), and so are the tokens.
"""

import glob
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any, BinaryIO

from mooshak.config.sections import Config, SourceConfig
from mooshak.corpus import tales
from mooshak.corpus.filters import clean
from mooshak.errors import InputError


def documents(source: SourceConfig, config: Config) -> Iterator[str]:
    """Return the documents of a source, cleaned by `config.data`, at most `source.documents`."""
    return islice(clean(READERS[source.kind](source, config), config), source.documents)


def input_state(source: SourceConfig) -> dict[str, Any] | None:
    """Return what reveals a change of a source: size, time and content of its files.

    For the tales it is their version. None for Hugging Face datasets, and if there are no files.
    """
    if source.kind in ("tales", "tasks"):
        return {"version": tales.version()}
    if source.kind not in ("text", "jsonl", "parquet"):
        return None
    files = _matches(source)
    if not files:
        return None
    return _sizes(files) | {"times": _digest(files, _time), "contents": _digest(files, _content)}


def same_input(source: SourceConfig, past: Mapping[str, Any] | None) -> bool:
    """Return whether the files of a source are those of an earlier `input_state`.

    They are read only if their size is the same and their time is not. True if there are none: the
    files of prepared text may have been removed.
    """
    if source.kind in ("tales", "tasks"):
        return past == input_state(source)
    files = _matches(source) if source.kind in ("text", "jsonl", "parquet") else []
    if not files:
        return True
    if past is None or _sizes(files) != {key: past.get(key) for key in ("files", "bytes")}:
        return False
    # Older versions recorded sizes only.
    if "contents" not in past or past.get("times") == _digest(files, _time):
        return True
    return bool(past["contents"] == _digest(files, _content))


def _sizes(files: list[str]) -> dict[str, int]:
    return {"files": len(files), "bytes": sum(map(os.path.getsize, files))}


def _digest(files: list[str], describe: Callable[[str], str]) -> str:
    """Return a hash of the descriptions of files."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{describe(file)}\n".encode())
    return digest.hexdigest()


def _time(file: str) -> str:
    return str(os.stat(file).st_mtime_ns)


def _content(file: str) -> str:
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _tales(source: SourceConfig, config: Config) -> Iterator[str]:
    written = tales.documents(source.seed, source.documents or 1000, (source.language,))
    return (text for _, text in written)


def _text(source: SourceConfig, config: Config) -> Iterator[str]:
    for name in files_of(source):
        with open_file(source, name) as file:
            content = file.read()
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            what = _binary_kind(content) or f"byte {error.start}"
            raise not_text(source, name, what) from None
        if "\0" in text:
            raise not_text(source, name, _binary_kind(content) or "a NUL byte")
        yield text


def _jsonl(source: SourceConfig, config: Config) -> Iterator[str]:
    broken, texts = 0, 0
    for name in files_of(source):
        with open_file(source, name) as file:
            for number, line in enumerate(file, 1):
                kind = _binary_kind(line) if number == 1 else ""
                if kind or b"\0" in line:
                    raise not_text(source, name, kind or f"a NUL byte in line {number}")
                if not line.strip():
                    continue
                try:
                    text = json.loads(line.decode("utf-8-sig"))[source.column]
                    text.encode()  # Fails on a lone surrogate, which JSON can escape.
                except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                    broken += 1
                    where = f"{name}, line {number}: {_reason(error, source.column)}"
                    if broken > config.data.max_broken_lines:
                        raise InputError(
                            f"source {source.name}: {where}; {broken} invalid lines are more than "
                            f"data.max_broken_lines {config.data.max_broken_lines}: "
                            "repair the file, or raise the limit"
                        ) from None
                    last = where
                else:
                    texts += 1
                    yield text
    if broken and not texts:
        raise InputError(
            f"source {source.name}: no line has a text; the last is {last}. A line is one object, "
            f'such as {{"{source.column}": "..."}}'
        )
    if broken:
        print(f"source {source.name}: {broken} invalid lines skipped, the last: {last}",
              file=sys.stderr)  # fmt: skip


def _reason(error: Exception, column: str) -> str:
    if isinstance(error, UnicodeDecodeError):
        return "not UTF-8"
    if isinstance(error, UnicodeEncodeError):
        return f"the field {column!r} has a lone surrogate"
    if isinstance(error, KeyError):
        return f"no field {column!r}"
    if isinstance(error, ValueError):
        return f"not JSON ({error})"
    return f"not an object with a text field {column!r}"


def _parquet(source: SourceConfig, config: Config) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    for name in files_of(source):
        try:
            with pyarrow.parquet.ParquetFile(name) as file:
                kind = _column_type(source, name, file.schema_arrow)
                if not _is_text(kind):
                    raise InputError(
                        f"source {source.name}: column {source.column!r} of {name} is {kind}, "
                        "not text: set column, or write it as strings"
                    )
                # One row group after the other, a slice of it at a time.
                for batch in file.iter_batches(batch_size=1024, columns=[source.column]):
                    yield from (text for text in batch.column(0).to_pylist() if text is not None)
        except (pyarrow.ArrowInvalid, OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"source {source.name}: {name} is not a complete Parquet file ({error}); "
                "replace it, or set kind"
            ) from error


def _column_type(source: SourceConfig, name: str, schema: Any) -> Any:
    """Return the Arrow type of the column that holds the text."""
    if (count := schema.names.count(source.column)) > 1:
        raise InputError(
            f"source {source.name}: {name} has {count} columns {source.column!r}; rename one"
        )
    if count == 0:
        raise InputError(
            f"source {source.name}: {name} has no column {source.column!r}; "
            f"it has {', '.join(schema.names)}: set column"
        )
    return schema.field(source.column).type


def _is_text(kind: Any) -> bool:
    """Return whether an Arrow type is text; pandas' categories are dictionaries of texts."""
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type
    return any(
        test(kind) for test in (types.is_string, types.is_large_string, types.is_string_view)
    )


def _huggingface(source: SourceConfig, config: Config) -> Iterator[str]:
    for example in load_examples(source):
        if source.column not in example:
            raise InputError(
                f"source {source.name}: {source.path} has no column {source.column!r}; "
                f"it has {', '.join(example)}: set column"
            )
        if isinstance(text := example[source.column], str):
            yield text


def load_examples(source: SourceConfig) -> Iterator[dict[str, Any]]:
    """Yield the examples of a Hugging Face dataset. Raises `InputError` if it cannot be read."""
    try:
        import datasets
    except ImportError:
        raise InputError(
            f"source {source.name}: kind huggingface needs the package `datasets`; "
            "install it with `pip install 'mooshak[hf]'`"
        ) from None

    def load(**which: str | None) -> Iterator[dict]:
        return datasets.load_dataset(source.path, split=source.split, streaming=True, **which)

    try:
        try:
            examples = load(name=source.subset)
        except ValueError:
            # A directory, not a configuration: such as verified/hin of ai4bharat/sangraha.
            examples = load(data_dir=source.subset)
        yield from examples
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
        raise InputError(
            f"source {source.name}: cannot read {source.path}, subset {source.subset}, split "
            f"{source.split}, with `datasets`: {error}; check the names and the network"
        ) from error


def _tasks(source: SourceConfig, config: Config) -> Iterator[str]:
    raise InputError(
        f"source {source.name}: kind tasks has conversations, not text; set data.format "
        "conversations, and train with the command sft"
    )


READERS = {
    "tales": _tales,
    "tasks": _tasks,
    "text": _text,
    "jsonl": _jsonl,
    "parquet": _parquet,
    "huggingface": _huggingface,
}


def files_of(source: SourceConfig) -> list[str]:
    """Return the files of a source. Raises `InputError` if there are none, or all are empty."""
    files = _matches(source)
    if not files and os.path.lexists(source.path):
        raise InputError(
            f"source {source.name}: {source.path} is not a file; name the files, such as "
            "DIRECTORY/*.txt"
        )
    if not files:
        raise InputError(f"source {source.name}: no file matches {source.path}; set path")
    if not any(map(os.path.getsize, files)):
        raise InputError(f"source {source.name}: the files of {source.path} are empty; set path")
    return files


@contextmanager
def open_file(source: SourceConfig, name: str) -> Iterator[BinaryIO]:
    """Open a file of a source. Raises `InputError` where it cannot be opened or read."""
    try:
        with open(name, "rb") as file:
            yield file
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"source {source.name}: {name} cannot be read: {reason}") from error


def _matches(source: SourceConfig) -> list[str]:
    if os.path.isfile(source.path):
        return [source.path]
    return sorted(filter(os.path.isfile, glob.glob(source.path, recursive=True)))


BINARY_KINDS = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\xfd7zXZ": "xz",
    b"BZh": "bzip2",
    b"PK\x03\x04": "zip",
    b"PAR1": "Parquet",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
    b"%PDF": "PDF",
}
"""First bytes of a file -> its kind."""


def _binary_kind(content: bytes) -> str:
    """Return the kind of a file that begins so, empty if it may be text."""
    return next((kind for start, kind in BINARY_KINDS.items() if content.startswith(start)), "")


def not_text(source: SourceConfig, name: str, what: str) -> InputError:
    return InputError(
        f"source {source.name}: {name} is not UTF-8 text ({what}); convert it or leave it out"
    )
