"""Corpus readers: cleaned documents of every kind of source in a fixed order; errors name files."""

import json
import sys
import unicodedata
from dataclasses import replace
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mooshak.config.sections import Config, DataConfig, SourceConfig
from mooshak.corpus.filters import in_validation, is_normal
from mooshak.corpus.readers import documents
from mooshak.errors import InputError


def read(source: SourceConfig, **data) -> list[str]:
    """The documents of a source, under a configuration of `data` with these settings."""
    return list(documents(source, Config(data=DataConfig(sources=[source], **data))))


def jsonl(path: Path, *lines: object) -> SourceConfig:
    """A JSONL source of lines; text is written as it is, anything else as JSON."""
    content = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(content) + "\n")
    return SourceConfig("web", kind="jsonl", path=str(path))


def parquet(path: Path, **columns: list) -> SourceConfig:
    """A Parquet source with row groups of two rows."""
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=2)
    return SourceConfig("books", kind="parquet", path=str(path))


def test_text_files_are_documents_sorted_by_name(tmp_path: Path):
    for name in ("b", "a", "c/d"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).with_suffix(".txt").write_text(f"{name}\nशेर ")
    source = SourceConfig("x", kind="text", path=str(tmp_path / "**" / "*.txt"))
    assert read(source) == ["a\nशेर ", "b\nशेर ", "c/d\nशेर "]


def test_file_name_with_glob_characters_is_a_name(tmp_path: Path):
    (tmp_path / "a[1].txt").write_text("one")
    assert read(SourceConfig("x", kind="text", path=str(tmp_path / "a[1].txt"))) == ["one"]


def test_jsonl(tmp_path: Path):
    source = jsonl(tmp_path / "a.jsonl", {"text": "एक"}, "", {"text": "two", "id": 3})
    assert read(source) == ["एक", "two"]
    assert read(replace(jsonl(tmp_path / "b.jsonl", {"body": "x"}), column="body")) == ["x"]


def test_parquet_over_row_groups_and_files(tmp_path: Path):
    parquet(tmp_path / "1.parquet", text=["a", "b", None, "c", "d"], other=[1, 2, 3, 4, 5])
    source = parquet(tmp_path / "2.parquet", text=["e"])
    source = replace(source, path=str(tmp_path / "*.parquet"))
    assert read(source) == ["a", "b", "c", "d", "e"]
    assert read(replace(source, documents=3)) == ["a", "b", "c"]


def test_tales_are_read_by_seed_and_language(monkeypatch):
    def tales(seed, count, languages):
        yield from ((languages[0], f"{languages[0]} {seed} {i}") for i in range(count))

    monkeypatch.setattr("mooshak.corpus.readers.tales.documents", tales)
    source = SourceConfig("t", language="hi", seed=7, documents=2)
    assert read(source) == ["hi 7 0", "hi 7 1"]
    assert len(read(replace(source, documents=None))) == 1000


@pytest.fixture
def fake_hub(tmp_path: Path, monkeypatch) -> Path:
    """A dataset directory without configurations, laid out like ai4bharat/sangraha."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    directory = tmp_path / "hub" / "verified" / "hin"
    directory.mkdir(parents=True)
    parquet(directory / "data-0.parquet", text=["एक", "दो"])
    (tmp_path / "hub" / "verified" / "eng").mkdir()
    parquet(tmp_path / "hub" / "verified" / "eng" / "data-0.parquet", text=["one"])
    return tmp_path / "hub"


def test_huggingface_subset_is_a_directory(fake_hub: Path):
    source = SourceConfig("h", kind="huggingface", path=str(fake_hub), subset="verified/hin")
    assert read(source) == ["एक", "दो"]


def test_huggingface_subset_is_a_configuration(fake_hub: Path):
    (fake_hub / "README.md").write_text(
        "---\nconfigs:\n- config_name: english\n  data_files: verified/eng/*.parquet\n---\n"
    )
    source = SourceConfig("h", kind="huggingface", path=str(fake_hub), subset="english")
    assert read(source) == ["one"]


def test_huggingface_errors(fake_hub: Path, monkeypatch):
    source = SourceConfig("h", kind="huggingface", path=str(fake_hub), subset="verified/hin")
    with pytest.raises(InputError, match="no column 'body'; it has text"):
        read(replace(source, column="body"))
    with pytest.raises(InputError, match="source h: cannot read"):
        read(replace(source, path=str(fake_hub / "nowhere")))
    with pytest.raises(InputError, match="source h: cannot read"):
        read(replace(source, split="no-such-split"))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"mooshak\[hf\]"):
        read(source)


def test_cleaning(tmp_path: Path):
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    joiners = "क्\u200dष क्\u200cष"
    texts = [decomposed, "", " \n\u200b\u200d", composed, joiners, "x", "x"]
    source = jsonl(tmp_path / "a.jsonl", *({"text": text} for text in texts))
    assert read(source) == [composed, joiners, "x"]
    assert read(source, normalize_nfc=False) == [decomposed, composed, joiners, "x"]
    assert read(source, drop_empty=False)[:3] == [composed, "", " \n\u200b\u200d"]
    assert read(source, deduplicate=False) == [composed, composed, joiners, "x", "x"]
    off = {"normalize_nfc": False, "drop_empty": False, "deduplicate": False}
    assert read(source, **off) == texts


@given(st.text("कखगजडढफनरळऩड़\u093c\u0abc\u094d\u0334\u0301ािe\xe9\u1100\u1161 "))
def test_normal_text_is_seen(text: str):
    assert is_normal(text) == unicodedata.is_normalized("NFC", text)
    assert is_normal(unicodedata.normalize("NFC", text))


def test_missing_or_empty_files_are_named(tmp_path: Path):
    (tmp_path / "empty.txt").touch()
    for kind in ("text", "jsonl", "parquet"):
        with pytest.raises(InputError, match=r"source x: no file matches .*\*\.md"):
            read(SourceConfig("x", kind=kind, path=str(tmp_path / "*.md")))
        with pytest.raises(InputError, match=r"files of .*empty\.txt are empty"):
            read(SourceConfig("x", kind=kind, path=str(tmp_path / "empty.txt")))


@pytest.mark.parametrize("content", [b"PNG\0\0", b"\xff\xfea", "text".encode("utf-16")])
def test_binary_text_file(tmp_path: Path, content: bytes):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(InputError, match=r"a\.txt is not UTF-8 text .*; convert it"):
        read(SourceConfig("x", kind="text", path=str(tmp_path / "a.txt")))


def test_byte_order_mark_is_dropped(tmp_path: Path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfa")
    assert read(SourceConfig("x", kind="text", path=str(tmp_path / "a.txt"))) == ["a"]


BROKEN = [
    ("{", "not JSON"),
    ({"body": "x"}, "no field 'text'"),
    ({"text": 3}, "not an object with a text field 'text'"),
    ({"text": None}, "not an object with a text field"),
    ([1], "not an object with a text field"),
    ('"text"', "not an object with a text field"),
    ('{"text": "\\ud800"}', "has a lone surrogate"),
    ("[" * 100_000, "not an object|not JSON"),
]


@pytest.mark.parametrize(("line", "reason"), BROKEN)
def test_broken_lines_are_skipped_and_counted(tmp_path: Path, capsys, line, reason):
    source = jsonl(tmp_path / "a.jsonl", {"text": "a"}, line, {"text": "b"}, line)
    assert read(source, max_broken_lines=2) == ["a", "b"]
    assert "2 invalid lines skipped" in capsys.readouterr().err
    with pytest.raises(InputError, match=rf"a\.jsonl, line 4: .*({reason}).*max_broken_lines 1"):
        read(source, max_broken_lines=1)


def test_jsonl_that_is_not_text(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n\xff\xff\n')
    source = SourceConfig("x", kind="jsonl", path=str(path))
    assert read(source) == ["a"]
    with pytest.raises(InputError, match=r"line 2: not UTF-8"):
        read(source, max_broken_lines=0)
    path.write_bytes(b'{"text": "a"}\n\0\0\n')
    with pytest.raises(InputError, match=r"a\.jsonl is not UTF-8 text \(a NUL byte in line 2\)"):
        read(source)


def test_bad_parquet(tmp_path: Path):
    source = parquet(tmp_path / "a.parquet", text=["a"] * 100, number=list(range(100)))
    with pytest.raises(InputError, match="has no column 'body'; it has text, number"):
        read(replace(source, column="body"))
    with pytest.raises(InputError, match=r"column 'number' of .* is int64, not text"):
        read(replace(source, column="number"))
    whole = (tmp_path / "a.parquet").read_bytes()
    for content in (whole[:-20], b"hello", b"PAR1" + bytes(100) + whole[104:]):
        (tmp_path / "a.parquet").write_bytes(content)
        with pytest.raises(InputError, match=r"a\.parquet is not a complete Parquet file"):
            read(source)


def test_validation_share():
    texts = [f"document {i}" for i in range(5000)]
    assert not any(in_validation(text, 0.0) for text in texts)
    assert 0.08 < sum(in_validation(text, 0.1) for text in texts) / len(texts) < 0.12
    # A larger fraction only adds to a smaller one.
    assert all(in_validation(text, 0.2) for text in texts if in_validation(text, 0.1))
