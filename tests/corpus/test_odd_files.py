"""Odd files of text: names, links, compressed and other kinds, line ends, types of Parquet."""

import gzip
import json
import os
from dataclasses import replace
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from mooshak.config.sections import Config, DataConfig, SourceConfig
from mooshak.corpus.readers import documents
from mooshak.errors import InputError


def read(path: object, kind: str = "text", **settings: str) -> list[str]:
    source = SourceConfig("x", kind=kind, path=str(path), **settings)  # type: ignore[arg-type]
    return list(documents(source, Config(data=DataConfig(sources=[source]))))


@pytest.mark.parametrize("name", ["a b.txt", "new\nline.txt", os.fsdecode(b"by\xfft.txt"), "चूहा"])
def test_any_name_of_a_file_is_read(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("one", "utf-8")
    assert read(tmp_path / name) == read(f"{tmp_path}/*") == ["one"]


def test_links_are_followed_and_broken_ones_left_out(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("one")
    (tmp_path / "d").mkdir()
    (tmp_path / "d/link.txt").symlink_to(tmp_path / "real")
    (tmp_path / "d/broken.txt").symlink_to(tmp_path / "none")
    (tmp_path / "d/loop").symlink_to(tmp_path / "d")
    assert set(read(f"{tmp_path}/d/*.txt")) == {"one"}


def test_what_is_no_file_is_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "broken").symlink_to(tmp_path / "none")
    for path in (tmp_path, tmp_path / "pipe", tmp_path / "broken"):
        with pytest.raises(InputError, match=f"{path} is not a file; name the files, such as"):
            read(path)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (gzip.compress(b'{"text": "a"}\n', mtime=0), "gzip"),
        (b"PK\x03\x04\x14\0", "zip"),
        (b"PAR1\x15\0", "Parquet"),
        ("text".encode("utf-16"), "UTF-16"),
    ],
    ids=["gzip", "zip", "Parquet", "UTF-16"],
)
def test_kind_of_a_binary_file_is_named(content: bytes, what: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(content)
    for kind in ("text", "jsonl"):
        with pytest.raises(InputError, match=rf"file is not UTF-8 text \({what}\); convert it"):
            read(tmp_path / "file", kind)


def test_line_ends_are_kept_in_text_and_dropped_between_lines(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\r\n")
    assert read(tmp_path / "a.txt") == ["one\r\ntwo\r\n"]
    lines = '\ufeff{"text": "one"}\r\n\r\n{"text": "two\u2028\x85"}'
    (tmp_path / "b.jsonl").write_text(lines, "utf-8", newline="")
    assert read(tmp_path / "b.jsonl", "jsonl") == ["one", "two\u2028\x85"]


def test_empty_file_among_others_is_no_document(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    (tmp_path / "b").write_text("one")
    assert read(f"{tmp_path}/*") == ["one"]


def test_line_of_megabytes_is_one_document(tmp_path: Path) -> None:
    text = "चूहा " * 500_000
    (tmp_path / "a").write_text(json.dumps({"text": text}, ensure_ascii=False))
    assert read(tmp_path / "a", "jsonl") == [text]


@pytest.mark.parametrize("indent", [None, 1])
def test_json_that_is_one_array_is_named(indent: int | None, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([{"text": "one"}, {"text": "two"}], indent=indent))
    message = r"no line has a text; the last is .*a\.json, line \d: not .* A line is one object"
    with pytest.raises(InputError, match=message):
        read(tmp_path / "a.json", "jsonl")


TEXTS = pyarrow.array(["one", None, "दो"])


@pytest.mark.parametrize(
    "array",
    [TEXTS, TEXTS.cast("large_string"), TEXTS.cast("string_view"), TEXTS.dictionary_encode()],
    ids=["string", "large_string", "string_view", "dictionary"],
)
def test_every_type_of_text_in_parquet_is_read(array: pyarrow.Array, tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"te.xt": array}), tmp_path / "a")
    assert read(tmp_path / "a", "parquet", column="te.xt") == ["one", "दो"]


@pytest.mark.parametrize("compression", ["none", "gzip", "zstd", "brotli", "lz4"])
def test_every_compression_of_parquet_is_read(compression: str, tmp_path: Path) -> None:
    table = pyarrow.table({"text": TEXTS})
    pyarrow.parquet.write_table(table, tmp_path / "a", compression=compression)
    assert read(tmp_path / "a", "parquet") == ["one", "दो"]


@pytest.mark.parametrize(
    ("array", "kind"),
    [
        (TEXTS.cast("binary"), "binary"),
        (pyarrow.nulls(2), "null"),
        (pyarrow.array([["one"]]), "list<element: string>"),
        (pyarrow.array([{"text": "one"}]), "struct<text: string>"),
        (pyarrow.array([1, 2]), "int64"),
    ],
)
def test_other_types_of_parquet_are_named(array: pyarrow.Array, kind: str, tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": array}), tmp_path / "a")
    with pytest.raises(InputError, match=f"is {kind}, not text: set column, or write it as"):
        read(tmp_path / "a", "parquet")


def test_columns_of_one_name_are_named(tmp_path: Path) -> None:
    table = pyarrow.table([TEXTS, TEXTS], names=["text", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "a")
    with pytest.raises(InputError, match="has 2 columns 'text'; rename one"):
        read(tmp_path / "a", "parquet")


def test_source_that_cannot_be_read_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").write_text("one")

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(InputError, match=r"source x: .*a cannot be read: Permission denied$"):
        read(tmp_path / "a")


def test_limit_of_documents_counts_those_that_remain(tmp_path: Path) -> None:
    lines = [{"text": text} for text in ("", "one", "one", "two", "three")]
    (tmp_path / "a").write_text("\n".join(map(json.dumps, lines)))
    source = SourceConfig("x", kind="jsonl", path=str(tmp_path / "a"), documents=2)
    config = Config(data=DataConfig(sources=[source]))
    assert list(documents(source, config)) == ["one", "two"]
    assert len(list(documents(replace(source, documents=None), config))) == 3
