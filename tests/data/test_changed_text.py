"""Text that changes after it was prepared is seen, also where its size is the same."""

import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mooshak.config.sections import Config, SourceConfig
from mooshak.data.shards import TokenShards, open_shards, prepare
from mooshak.errors import InputError
from mooshak.tokenizer.base import Tokenizer


@pytest.fixture
def config(fresh_config: Config, tmp_path: Path) -> Config:
    """A source with three files."""
    (tmp_path / "text").mkdir()
    for number in range(3):
        (tmp_path / "text" / f"{number}.txt").write_text(f"the mouse {number} lived in the forest")
    source = SourceConfig("mine", kind="text", path=str(tmp_path / "text" / "*.txt"))
    data = replace(fresh_config.data, sources=[source], validation_fraction=0.0)
    return replace(fresh_config, data=data)


def text_of(config: Config, tokenizer: Tokenizer) -> str:
    shards = TokenShards(Path(config.data.dir) / "mine", "train")
    return tokenizer.decode(shards.window(0, len(shards)).tolist())


def test_edit_of_the_same_size_is_seen(
    config: Config,
    tiny_tokenizer: Tokenizer,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    prepare(config, tiny_tokenizer)
    capsys.readouterr()
    file = tmp_path / "text" / "1.txt"
    file.write_text(file.read_text().replace("mouse", "tiger"))
    assert "tiger" not in text_of(config, tiny_tokenizer)
    prepare(config, tiny_tokenizer)
    assert "tiger 1" in text_of(config, tiny_tokenizer)
    told = capsys.readouterr().err
    assert re.search(r"source mine: the text of \S+ has changed since it was prepared", told)


def test_touched_files_are_not_tokenized_again(
    config: Config, tiny_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    prepare(config, tiny_tokenizer, progress=False)
    manifest = Path(config.data.dir) / "mine" / "manifest.json"
    before = manifest.stat().st_mtime_ns
    os.utime(tmp_path / "text" / "1.txt", (5, 5))
    prepare(config, tiny_tokenizer, progress=False)
    assert manifest.stat().st_mtime_ns == before
    # An older version recorded sizes only: shards of its runs stay valid.
    content: dict[str, Any] = json.loads(manifest.read_text())
    content["input"] = {key: content["input"][key] for key in ("files", "bytes")}
    manifest.write_text(json.dumps(content))
    before = manifest.stat().st_mtime_ns
    prepare(config, tiny_tokenizer, progress=False)
    assert manifest.stat().st_mtime_ns == before
    (tmp_path / "text" / "3.txt").write_text("one more")
    prepare(config, tiny_tokenizer, progress=False)
    assert "one more" in text_of(config, tiny_tokenizer)


def test_reading_command_changes_nothing(
    config: Config, tiny_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """`evaluate` trains no tokenizer and rewrites no shards; absent ones it prepares."""
    assert open_shards(config).fingerprint == tiny_tokenizer.fingerprint
    directory = Path(config.data.dir) / "mine"
    before = {path: path.read_bytes() for path in directory.iterdir()}
    gone = replace(config, tokenizer=replace(config.tokenizer, path=str(tmp_path / "t.model")))
    with pytest.raises(InputError, match=r"tokenizer \S+t.model is missing; name the tokenizer"):
        open_shards(gone)
    other = replace(config, data=replace(config.data, deduplicate=False))
    with pytest.raises(InputError, match="prepared with another cleaning; run `python -m"):
        open_shards(other)
    file = tmp_path / "text" / "1.txt"
    file.write_text(file.read_text().replace("mouse", "tiger"))
    with pytest.raises(InputError, match="has changed since it was prepared; run `python -m"):
        open_shards(config)
    assert {path: path.read_bytes() for path in directory.iterdir()} == before
    assert not (tmp_path / "t.model").exists() and np.load(directory / "train-00000.npy").size
