"""Conversations: every shape of records in every kind of file; one error line for the others."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from mooshak.config.parse import dump_config
from mooshak.config.sections import Config, SourceConfig
from mooshak.data.__main__ import main
from mooshak.data.conversations import Conversation, conversations
from mooshak.data.samples import encode_sample, truncate
from mooshak.errors import InputError
from mooshak.tokenizer.base import Tokenizer

USER, BOT = {"role": "user", "content": "क?"}, {"role": "assistant", "content": "ख"}
OTHER = {"role": "assistant", "content": "ग"}
PARTS = [[{"type": "text", "text": text}] for text in ("क?", "ख")]
RECORDS: dict[str, tuple[dict[str, Any], tuple]] = {
    "messages": ({"messages": [USER, BOT]}, ("messages", [], ([USER, BOT],), None)),
    "ShareGPT": (
        {"conversations": [{"from": "human", "value": "क?"}, {"from": "gpt", "value": "ख"}]},
        ("messages", [], ([USER, BOT],), None),
    ),
    "text parts": (
        {
            "messages": [
                {"role": "user", "content": PARTS[0]},
                {"role": "assistant", "content": PARTS[1]},
            ]
        },
        ("messages", [], ([USER, BOT],), None),
    ),
    "alpaca": (
        {"instruction": "जोड़ो", "input": "1, 2", "output": "3"},
        (
            "alpaca",
            [{"role": "user", "content": "जोड़ो\n\n1, 2"}],
            ([{"role": "assistant", "content": "3"}],),
            None,
        ),
    ),
    "texts": ({"prompt": "क", "completion": "ख"}, ("prompt_completion", "क", ("ख",), None)),
    "prompt of messages": (
        {"prompt": [USER], "completion": [BOT]},
        ("prompt_completion", [USER], ([BOT],), None),
    ),
    "preference": (
        {"prompt": "क", "chosen": "ख", "rejected": "ग"},
        ("preference", "क", ("ख", "ग"), None),
    ),
    "preference without prompt": (
        {"chosen": [USER, BOT], "rejected": [USER, OTHER]},
        ("preference", [USER], ([BOT], [OTHER]), None),
    ),
    "unpaired": (
        {"prompt": "क", "completion": "ख", "label": False},
        ("unpaired", "क", ("ख",), False),
    ),
}


def read(config: Config, path: Path, *records: dict[str, Any]) -> list[Conversation]:
    """Write records to a file and return its conversations."""
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(records)), path)
    else:
        path.write_text("\n".join(json.dumps(record) for record in records))
    kind = "parquet" if path.suffix == ".parquet" else "jsonl"
    source = SourceConfig("s", kind=kind, language="hi", path=str(path))
    return list(conversations(source, config))


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("name", RECORDS)
def test_shape_is_detected(name: str, suffix: str, tiny_config: Config, tmp_path: Path) -> None:
    record, expected = RECORDS[name]
    path = tmp_path / f"a.{suffix}"
    first, second = read(
        tiny_config, path, record | {"language": None}, record | {"language": "en"}
    )
    assert (first.shape, first.prompt, first.answers, first.label) == expected
    assert first.where == f"{path}, {'row' if suffix == 'parquet' else 'line'} 1"
    assert (first.language, second.language) == ("hi", "en")


def test_texts_are_normalized_as_documents_are(tiny_config: Config, tmp_path: Path) -> None:
    record = {"messages": [USER, {"role": "assistant", "content": "\u0958"}]}
    (one,) = read(tiny_config, tmp_path / "a.jsonl", record)
    assert one.answers[0][1]["content"] == "\u0915\u093c"
    raw = replace(tiny_config, data=replace(tiny_config.data, normalize_nfc=False))
    (one,) = read(raw, tmp_path / "a.jsonl", record)
    assert one.answers[0][1]["content"] == "\u0958"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "a"}, "line 2: the fields text are no known shape"),
        ({"prompt": "a", "completion": "b"}, "has the shape prompt_completion, those before it"),
        ({"messages": [{"role": "boss", "content": "a"}]}, "message 1 .*role 'boss' is unknown"),
        ({"messages": [{"role": "user", "content": 3}]}, "content must be a text, not 3"),
        ({"messages": "hello"}, "messages must be a list of messages, not 'hello'"),
        ({"messages": ["hello"]}, "message 1 of messages is not an object"),
    ],
)
def test_wrong_record_is_named(
    record: dict[str, Any], message: str, tiny_config: Config, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        read(tiny_config, tmp_path / "a.jsonl", RECORDS["messages"][0], record)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "chosen equals rejected"),
        ({"prompt": "a", "chosen": "b", "rejected": [BOT]}, "all texts, or all messages"),
        ({"chosen": "b", "rejected": "c"}, "no field prompt"),
        ({"prompt": "a", "completion": "b", "label": "yes"}, "label must be true or false"),
        ({"instruction": "a", "output": 3}, "output must be a text, not 3"),
    ],
)
def test_wrong_pair_or_label_is_named(
    record: dict[str, Any], message: str, tiny_config: Config, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=f"line 1: .*{message}"):
        read(tiny_config, tmp_path / "a.jsonl", record)


def test_describe_counts_what_is_read_and_trained(
    tiny_config: Config, tiny_tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    pairs = [{"prompt": "a", "completion": text} for text in ("lion", "the lion " * 30, " ")]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    source = SourceConfig("pairs", kind="jsonl", path=str(tmp_path / "a.jsonl"))
    of_data = replace(tiny_config.data, sources=[source], format="conversations")
    (tmp_path / "c.yaml").write_text(dump_config(replace(tiny_config, data=of_data)))
    main(["describe", "--config", str(tmp_path / "c.yaml")])
    printed, said = capsys.readouterr()
    (row,) = [line for line in printed.splitlines() if "prompt_completion" in line]
    samples = [encode_sample(tiny_tokenizer, "a", one["completion"]) for one in pairs[:2]]
    short, cut = samples[0], truncate(samples[1], tiny_config.T)
    counts = [3, 2, len(short.tokens) + len(cut.tokens), short.n_labels + cut.n_labels]
    counts += [len(samples[1].tokens), 1, 1]
    assert [cell.strip() for cell in row.split("│")[3:-1]] == list(map(str, counts))
    assert said == f"{tmp_path}/a.jsonl, line 3: the answer is empty\n"


def test_source_without_conversations_is_named(tiny_config: Config, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="source s: kind tales has documents, not conversations"):
        next(conversations(SourceConfig("s"), tiny_config))
    (tmp_path / "a.jsonl").write_text('[1]\n{"messages": []}\n')
    source = SourceConfig("s", kind="jsonl", path=str(tmp_path / "a.jsonl"))
    strict = replace(tiny_config, data=replace(tiny_config.data, max_broken_lines=0))
    with pytest.raises(InputError, match="line 1: not a JSON object"):
        next(conversations(source, strict))
