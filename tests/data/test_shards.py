"""Token shards: complete or absent, resumed to equal bytes, remade for other settings."""

import hashlib
import json
import pickle
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mooshak.config.parse import dump_config
from mooshak.config.sections import Config
from mooshak.corpus.filters import in_validation
from mooshak.corpus.readers import documents
from mooshak.data import manifest, shards
from mooshak.data.__main__ import main
from mooshak.data.manifest import read_manifest, shards_description, totals
from mooshak.data.shards import TokenShards, load_or_prepare_shards, prepare
from mooshak.errors import InputError
from mooshak.tokenizer.base import Tokenizer


@pytest.fixture
def config(fresh_config: Config) -> Config:
    return fresh_config


def contents(config: Config) -> dict[str, bytes]:
    """Every file under the data directory, by its name there."""
    root = Path(config.data.dir)
    files = (path for path in root.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


def with_data(config: Config, **changes) -> Config:
    return replace(config, data=replace(config.data, **changes))


def test_shards_hold_the_documents(config: Config, tiny_tokenizer: Tokenizer):
    manifests = prepare(config, tiny_tokenizer, progress=False)
    for source in config.data.sources:
        texts = list(documents(source, config))
        for split, held_out in (("train", False), ("validation", True)):
            mine = [text for text in texts if in_validation(text, 0.2) == held_out]
            expected = [id for text in mine for id in tiny_tokenizer.encode(text, True, True)]
            tokens = TokenShards(Path(config.data.dir) / source.name, split)
            assert tokens.window(0, len(tokens)).tolist() == expected
            assert totals(manifests[source.name], split) == {
                "tokens": len(expected),
                "documents": len(mine),
                "bytes": sum(len(text.encode()) for text in mine),
            }
        assert sum(shard["split"] == "train" for shard in manifests[source.name]["shards"]) > 2


def test_files_are_plain_arrays(config: Config, tiny_tokenizer: Tokenizer):
    manifests = prepare(config, tiny_tokenizer, progress=False)
    for name, found in manifests.items():
        assert found["tokenizer"] == tiny_tokenizer.fingerprint
        for shard in found["shards"]:
            tokens = np.load(Path(config.data.dir) / name / shard["file"])
            assert tokens.dtype == np.uint16 and tokens.shape == (shard["tokens"],)
            assert tokens[0] == tiny_tokenizer.bos_id and tokens[-1] == tiny_tokenizer.eos_id
    assert {name.split("/")[1] for name in contents(config) if "train" not in name} >= {
        "manifest.json",
        "validation-00000.npy",
    }


def test_large_vocabulary_needs_32_bits(config: Config, tiny_tokenizer: Tokenizer, monkeypatch):
    for size, dtype in ((65_535, "uint16"), (65_536, "uint32")):
        monkeypatch.setattr(tiny_tokenizer, "vocab_size", size)
        monkeypatch.setattr(tiny_tokenizer, "fingerprint", dtype)
        manifests = prepare(config, tiny_tokenizer, progress=False)
        assert {shard["dtype"] for shard in manifests["hi"]["shards"]} == {dtype}
    assert TokenShards(Path(config.data.dir) / "hi", "train").window(0, 1).tolist() == [1]


def test_description_is_of_the_training_shards() -> None:
    entries = [
        {"split": split, "documents": n, "tokens": 10 * n, "bytes": 40 * n, "sha256": f"{n}"}
        for n, split in ((1, "train"), (2, "train"), (4, "validation"))
    ]
    made = {"shards": entries, "shard_tokens": 20}
    checksum = hashlib.sha256(b"12").hexdigest()
    assert shards_description(made) == {
        "documents": 3,
        "tokens": 30,
        "shard_tokens": 20,
        "sha256": checksum,
    }
    assert totals(made, "train", "validation") == {"tokens": 70, "documents": 7, "bytes": 280}


def test_windows_cross_shards(config: Config, tiny_tokenizer: Tokenizer):
    prepare(config, tiny_tokenizer, progress=False)
    tokens = TokenShards(Path(config.data.dir) / "hi", "train")
    whole = tokens.window(0, len(tokens))
    assert whole.dtype == np.int32
    starts = np.random.default_rng(0).integers(0, len(tokens), 200)
    for start in starts:
        for length in (0, 1, 33, 5000):
            if start + length <= len(tokens):
                assert (tokens.window(start, length) == whole[start : start + length]).all()
    for start, length in ((-1, 2), (len(tokens), 1), (0, len(tokens) + 1)):
        with pytest.raises(IndexError):
            tokens.window(start, length)
    copy = pickle.dumps(tokens)
    assert len(copy) < 1000 and (pickle.loads(copy).window(0, len(tokens)) == whole).all()


def test_validation_is_disjoint_from_training(config: Config, tiny_tokenizer: Tokenizer):
    prepare(config, tiny_tokenizer, progress=False)
    for source in config.data.sources:
        found = []
        for split in ("train", "validation"):
            tokens = TokenShards(Path(config.data.dir) / source.name, split)
            ids = tokens.window(0, len(tokens))
            ends = np.flatnonzero(ids == tiny_tokenizer.eos_id) + 1
            found.append({document.tobytes() for document in np.split(ids, ends) if len(document)})
        assert found[0] and found[1] and not found[0] & found[1]


@pytest.mark.parametrize("batch", [shards._BATCH, 1000])
@pytest.mark.parametrize("stop_after", [0, 1, 3, 6])
@pytest.mark.parametrize("stopped_file", [r"\d\.npy", r"\.offsets\.npy"])
def test_resumes_to_the_same_bytes(
    config: Config,
    tiny_tokenizer: Tokenizer,
    tmp_path: Path,
    monkeypatch,
    stop_after,
    batch,
    stopped_file,
):
    uninterrupted = with_data(config, dir=str(tmp_path / "whole"))
    prepare(uninterrupted, tiny_tokenizer, progress=False)
    monkeypatch.setattr(shards, "_BATCH", batch)
    write, written = manifest.write_atomically, []

    def interrupted(path: Path, content: bytes) -> None:
        if re.search(stopped_file, path.name):
            if len(written) == stop_after:
                raise KeyboardInterrupt
            written.append(path.name)
        write(path, content)

    monkeypatch.setattr(manifest, "write_atomically", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(config, tiny_tokenizer, progress=False)
    with pytest.raises(InputError, match=r"manifest\.json is missing; create it with"):
        TokenShards(Path(config.data.dir) / "hi", "train")
    reused = list(written)
    written.clear()
    stop_after = 10**9
    prepare(config, tiny_tokenizer, progress=False)
    assert contents(config) == contents(uninterrupted)
    files = [name for name in contents(config) if re.search(stopped_file, name)]
    assert len(reused) + len(written) == len(files)


def test_damaged_shard_is_not_reused(config: Config, tiny_tokenizer: Tokenizer, tmp_path: Path):
    prepare(config, tiny_tokenizer, progress=False)
    expected = contents(config)
    directory = Path(config.data.dir) / "hi"
    # As if interrupted, and with a bit flipped in the second shard.
    (directory / "manifest.json").rename(directory / "progress.json")
    directory.rename(directory.with_name("hi~partial"))
    path = directory.with_name("hi~partial") / "train-00001.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    prepare(config, tiny_tokenizer, progress=False)
    assert contents(config) == expected


def test_finished_sources_are_reused(config: Config, tiny_tokenizer: Tokenizer, monkeypatch):
    first = load_or_prepare_shards(config, progress=False)
    monkeypatch.setattr(shards, "_prepare_source", None)
    again = load_or_prepare_shards(config, progress=False)
    assert again[1] == first[1] and again[0].fingerprint == first[0].fingerprint
    # Weights, and input that is gone, change nothing.
    sources = [replace(source, weight=9.0, path="gone/*") for source in config.data.sources]
    manifest = first[1]["hi"]
    assert manifest["source"]["path"] == config.data.sources[0].path
    load_or_prepare_shards(
        with_data(config, sources=[replace(config.data.sources[0], weight=9.0)]), progress=False
    )
    with pytest.raises(TypeError):
        load_or_prepare_shards(with_data(config, sources=sources), progress=False)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"deduplicate": False}, "cleaning"),
        ({"validation_fraction": 0.1}, "validation_fraction"),
        ({"shard_tokens": 999}, "shard_tokens"),
    ],
)
def test_other_settings_remake_the_shards(
    config: Config, tiny_tokenizer: Tokenizer, tmp_path: Path, capsys, change, named
):
    prepare(config, tiny_tokenizer, progress=False)
    prepare(with_data(config, **change), tiny_tokenizer)
    assert f"were prepared with another {named}; tokenizing" in capsys.readouterr().err
    fresh = with_data(config, dir=str(tmp_path / "fresh"), **change)
    prepare(fresh, tiny_tokenizer, progress=False)
    assert contents(with_data(config, **change)) == contents(fresh)


def test_changed_input_remakes_the_shards(config: Config, tiny_tokenizer: Tokenizer, tmp_path):
    path = tmp_path / "hi.jsonl"
    shutil.copy(config.data.sources[0].path, path)
    config = with_data(config, sources=[replace(config.data.sources[0], path=str(path))])
    before = prepare(config, tiny_tokenizer, progress=False)["hi"]
    with open(path, "a") as file:
        file.write(json.dumps({"text": "एक नया शेर"}) + "\n")
    after = prepare(config, tiny_tokenizer, progress=False)["hi"]
    assert sum(s["documents"] for s in after["shards"]) == 1 + sum(
        s["documents"] for s in before["shards"]
    )
    path.unlink()  # Shards outlive their input.
    assert prepare(config, tiny_tokenizer, progress=False)["hi"] == after


def test_nothing_is_half_replaced(config: Config, tiny_tokenizer: Tokenizer, monkeypatch):
    prepare(config, tiny_tokenizer, progress=False)
    before = contents(config)
    other = with_data(config, validation_fraction=0.1)
    write = manifest.write_atomically

    def interrupted(path: Path, content: bytes) -> None:
        if path.name == "train-00002.npy":
            raise KeyboardInterrupt
        write(path, content)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(manifest, "write_atomically", interrupted)
        prepare(other, tiny_tokenizer, progress=False)
    assert {n: c for n, c in contents(config).items() if "~partial" not in n} == before
    prepare(config, tiny_tokenizer, progress=False)


def damage_missing(path: Path) -> None:
    path.unlink()


def damage_cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-30])


def damage_header(path: Path) -> None:
    path.write_bytes(b"not an array" + path.read_bytes()[12:])


def damage_other(path: Path) -> None:
    np.save(path, np.load(path)[:-5])


def damage_longer(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"xx")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (damage_missing, "is missing"),
        (damage_cut, "is truncated"),
        (damage_header, "not an .npy file"),
        (damage_other, "is not the one in the manifest"),
        (damage_longer, "does not have the size"),
    ],
)
@pytest.mark.parametrize("file", ["train-00001.npy", "train-00001.offsets.npy"])
def test_damaged_shards_are_named_and_mended(
    config: Config, tiny_tokenizer: Tokenizer, capsys, file, damage, reason
):
    prepare(config, tiny_tokenizer, progress=False)
    expected = contents(config)
    damage(Path(config.data.dir) / "en" / file)
    with pytest.raises(InputError, match=rf"{re.escape(file)} .*{reason}.*; run `python"):
        TokenShards(Path(config.data.dir) / "en", "train")
    prepare(config, tiny_tokenizer)
    assert reason in capsys.readouterr().err
    assert contents(config) == expected


def test_damaged_manifest(config: Config, tiny_tokenizer: Tokenizer):
    prepare(config, tiny_tokenizer, progress=False)
    expected = contents(config)
    (Path(config.data.dir) / "en" / "manifest.json").write_text('{"shards": [')
    with pytest.raises(InputError, match=r"manifest\.json is not JSON"):
        TokenShards(Path(config.data.dir) / "en", "train")
    prepare(config, tiny_tokenizer, progress=False)
    assert contents(config) == expected


def make_old(config: Config) -> dict[str, bytes]:
    """Take the document offsets away, as if an older version had prepared; return the rest."""
    for source in config.data.sources:
        directory = Path(config.data.dir) / source.name
        found = read_manifest(directory)
        for shard in found["shards"]:
            (directory / shard.pop("offsets")["file"]).unlink()
        manifest.write_json(directory / "manifest.json", found)
    return contents(config)


def test_source_without_documents_is_named(
    config: Config, tiny_tokenizer: Tokenizer, tmp_path: Path
):
    (tmp_path / "blank.jsonl").write_text('{"text": " "}\n')
    source = replace(config.data.sources[0], path=str(tmp_path / "blank.jsonl"))
    with pytest.raises(InputError, match="source hi has no documents"):
        prepare(with_data(config, sources=[source]), tiny_tokenizer, progress=False)


@pytest.mark.slow
def test_command_line(config: Config, tmp_path: Path, capsys):
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config))
    with pytest.raises(SystemExit) as stopped:
        main(["describe", "--config", str(path)])
    assert stopped.value.code == 2 and "manifest.json is missing" in capsys.readouterr().err
    main(["prepare", "--config", str(path)])
    assert "tokenizing" in capsys.readouterr().err
    main(["describe", "--config", str(path)])
    shown = capsys.readouterr().out
    found = totals(read_manifest(Path(config.data.dir) / "hi"), "train")
    assert "60.0%" in shown
    assert f"{found['tokens'] / found['documents']:,.1f}" in shown
    make_old(config)
    main(["describe", "--config", str(path)])
    assert f"{found['tokens'] / found['documents']:,.1f}" not in capsys.readouterr().out
