"""Document offsets of shards: from their tokens, where an older version prepared them."""

from pathlib import Path

import numpy as np
import pytest
from test_shards import contents, make_old, with_data

from mooshak.config.sections import Config
from mooshak.data import manifest, shards
from mooshak.data.shards import TokenShards, prepare
from mooshak.errors import InputError
from mooshak.tokenizer.base import Tokenizer


@pytest.fixture
def config(fresh_config: Config) -> Config:
    return fresh_config


def test_old_shards_stay_valid_without_document_mask(
    config: Config, tiny_tokenizer: Tokenizer, monkeypatch
):
    prepare(config, tiny_tokenizer, progress=False)
    before = contents(config)
    old = make_old(config)
    assert {name for name in before if name not in old} == {
        name for name in before if name.endswith(".offsets.npy")
    }
    monkeypatch.setattr(shards, "_prepare_source", None)
    prepare(config, tiny_tokenizer, progress=False)
    assert contents(config) == old
    assert not TokenShards(Path(config.data.dir) / "hi", "train").has_offsets


def test_old_shards_get_offsets_from_their_tokens(
    config: Config, tiny_tokenizer: Tokenizer, monkeypatch
):
    prepare(config, tiny_tokenizer, progress=False)
    expected = contents(config)
    make_old(config)
    monkeypatch.setattr(shards, "_prepare_source", None)  # No text is read or tokenized.
    prepare(with_data(config, document_mask=True), tiny_tokenizer, progress=False)
    assert contents(config) == expected


def test_ambiguous_old_shards_are_tokenized_again(
    config: Config, tiny_tokenizer: Tokenizer, tmp_path: Path, monkeypatch, capsys
):
    """A text that contains BOS: the tokens do not show where documents start."""
    original, bos = tiny_tokenizer.encode_batch, tiny_tokenizer.bos_id
    monkeypatch.setattr(
        tiny_tokenizer,
        "encode_batch",
        lambda texts, threads: [[*ids[:2], bos, *ids[2:]] for ids in original(texts, threads)],
    )
    prepare(config, tiny_tokenizer, progress=False)
    expected = contents(config)
    make_old(config)
    prepare(with_data(config, document_mask=True), tiny_tokenizer)
    assert "no document offsets, which data.document_mask needs; tok" in capsys.readouterr().err
    assert contents(config) == expected


def test_old_shards_get_offsets_where_bos_is_eos(
    config: Config, tiny_tokenizer: Tokenizer, monkeypatch
):
    """As for Qwen and SmolLM: a document starts and ends with one id."""
    monkeypatch.setattr(tiny_tokenizer, "bos_id", tiny_tokenizer.eos_id)
    prepare(config, tiny_tokenizer, progress=False)
    expected = contents(config)
    make_old(config)
    monkeypatch.setattr(shards, "_prepare_source", None)
    prepare(with_data(config, document_mask=True), tiny_tokenizer, progress=False)
    assert contents(config) == expected


@pytest.mark.parametrize("damaged", [False, True])
def test_shards_stay_while_others_replace_them(
    config: Config, tiny_tokenizer: Tokenizer, monkeypatch, damaged: bool
):
    """Shards whose source text is gone are not deleted."""
    prepare(config, tiny_tokenizer, progress=False)
    old = make_old(config)
    if damaged:
        name = "hi/train-00001.npy"
        (Path(config.data.dir) / name).unlink()
        del old[name]
    else:  # The tokens do not show where documents start.
        monkeypatch.setattr(tiny_tokenizer, "bos_id", tiny_tokenizer.eos_id)

    def gone(*_) -> None:
        raise InputError("there are no files")

    with monkeypatch.context() as patch:
        patch.setattr(shards, "documents", gone)
        with pytest.raises(InputError, match="there are no files"):
            prepare(with_data(config, document_mask=True), tiny_tokenizer, progress=False)
    assert {n: c for n, c in contents(config).items() if "~partial" not in n} == old


def test_old_shard_with_a_flipped_bit_gets_no_offsets(config: Config, tiny_tokenizer: Tokenizer):
    prepare(config, tiny_tokenizer, progress=False)
    expected = contents(config)
    make_old(config)
    path = Path(config.data.dir) / "hi" / "train-00001.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert not manifest.add_offsets(path.parent, tiny_tokenizer.bos_id, tiny_tokenizer.eos_id)
    prepare(with_data(config, document_mask=True), tiny_tokenizer, progress=False)
    assert contents(config) == expected


def test_offsets_are_the_document_starts(config: Config, tiny_tokenizer: Tokenizer):
    for name, found in prepare(config, tiny_tokenizer, progress=False).items():
        directory = Path(config.data.dir) / name
        for shard in found["shards"]:
            offsets = np.load(directory / shard["offsets"]["file"])
            tokens = np.load(directory / shard["file"])
            assert offsets.dtype == np.int64 and len(offsets) == shard["documents"]
            assert offsets[0] == 0 and (tokens[offsets] == tiny_tokenizer.bos_id).all()
            assert (tokens[offsets[1:] - 1] == tiny_tokenizer.eos_id).all()
