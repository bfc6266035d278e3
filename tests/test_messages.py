"""Messages of wrong input side by side in golden_messages.txt, each by really causing it.

`MOOSHAK_WRITE_MESSAGES=1 pytest tests/test_messages.py` writes the file; read its difference.

Longer than 400 lines: it is a list of cases.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from safetensors.numpy import load_file, save_file

from mooshak.checkpoints import formats, resume, safetensors
from mooshak.checkpoints.hf_config import model_from_hf
from mooshak.config.model import ModelConfig
from mooshak.config.parse import config_parser, parse_config
from mooshak.config.sections import Config, DataConfig, SourceConfig
from mooshak.corpus.readers import documents
from mooshak.data.batches import PackedSequences, train_batches
from mooshak.data.shards import TokenShards, open_shards, prepare
from mooshak.errors import InputError, os_error_text
from mooshak.files import atomic_directory, read_object, write_atomically
from mooshak.generation.command import generate_parser
from mooshak.generation.constraints import make_constraint
from mooshak.generation.requests import read_requests
from mooshak.generation.settings import make_settings
from mooshak.generation.text import pad_prompts
from mooshak.mesh import mesh_sizes
from mooshak.tokenizer import train
from mooshak.tokenizer.base import Tokenizer
from mooshak.tokenizer.chat_template import encode_chat
from mooshak.tokenizer.load import open_tokenizer
from parity.convert import convert

GOLDEN = Path(__file__).with_name("golden_messages.txt")
HEADER = """\
Messages of wrong input, written by tests/test_messages.py. DIR is a temporary directory.
Each is read as a user would: what is wrong, where, and what to do.
"""
NOTHING = "(nothing was wrong)"
Case = tuple[str, Callable[[], Any]]


@pytest.fixture
def here(
    tmp_path: Path, tiny_config: Config, tiny_tokenizer: Tokenizer, tiny_checkpoint: Path
) -> SimpleNamespace:
    """A directory, the small configuration, its tokenizer, and a checkpoint."""
    data = replace(tiny_config.data, dir=str(tmp_path / "shards"))
    run = replace(tiny_config.run, dir=str(tmp_path / "run"))
    return SimpleNamespace(
        path=tmp_path,
        config=replace(tiny_config, data=data, run=run),
        tokenizer=tiny_tokenizer,
        checkpoint=tiny_checkpoint,
    )


def yaml_files(here: SimpleNamespace) -> Iterator[Case]:
    parser, path = config_parser(""), here.path / "mine.yaml"

    def load(text: str) -> None:
        path.write_text(text, "utf-8")
        parse_config(parser, ["--config", str(path)])[0].config()

    for text in (
        "train: [3",
        "\x00",
        "- train",
        "train: 3",
        "train: {steps: 3}\ntrain: {steps: 4}",
        "train: {stepz: 3}",
        "trian: {steps: 3}",
        "train: {accumulation: 3}",
        "train: {steps: null}",
        "train: {steps: 010}",
        "train: {steps: 1:30}",
        "train: {steps: 1e3}",
        "train: {steps: 0}",
        "train: {dtype: bf16}",
        "run: {progress: 1}",
        "run: {dir: ''}",
        "run: {dir: $HOME/run}",
        "run: {dir: ~nobody-here/run}",
        "optimizer: {learning_rate: .nan}",
        "optimizer: {beta2: 1.0}",
        "optimizer: {weight_decay: -1}",
        "checkpoint: {keep: 0}",
        "data: {sources: []}",
        "data: {sources: {name: a}}",
        "data: {sources: [a]}",
        "data: {sources: [{name: a, language: no}]}",
        "data: {sources: [{name: a, kind: csv}]}",
        "data: {sources: [{name: a, wieght: 2}]}",
        "data: {sources: [{name: a, weight: 0}]}",
        "data: {sources: [{name: a/b}]}",
        "data: {sources: [{name: a}, {name: a}]}",
        "data: {sources: [{name: a, kind: text}]}",
        "train: {batch_size: 6, gradient_accumulation_steps: 4}",
        "train: {sequence_length: 100000}",
        "parallel: {coordinator_address: host}",
        "model: {n_heads: 7}",
        "model: {architecture: gpt}",
        "model: {head_dim: 7, architecture: llama}",
        "model: {rope_scaling: {rope_type: linear, factor: 2}}",
        "model: {architecture: llama, rope_scaling: {rope_type: yarn, factor: 2}}",
    ):
        yield text, lambda text=text: load(text)


def options(here: SimpleNamespace) -> Iterator[Case]:
    parser = config_parser("")
    for words in (
        "--config none.yaml",
        "--config .",
        "--config",
        "--train.stepz 3",
        "--train.steps",
        "--train.steps x",
        "--train.st 3",
        "--optimizer.clip_norm 1",
    ):
        yield words, lambda words=words: parse_config(parser, words.split())[0].config()
    for mesh in ("date=2", "data=-1,fsdp=-1", "data=3"):
        yield f"--mesh {mesh}, 8 devices", lambda mesh=mesh: mesh_sizes(mesh, 8)


def sources(here: SimpleNamespace) -> Iterator[Case]:
    files: dict[str, bytes] = {
        "empty.txt": b"",
        "image.txt": b"\x89PNG\r\n\x1a\n\0",
        "latin.txt": "caf\xe9".encode("latin-1"),
        "utf16.txt": "text".encode("utf-16"),
        "packed.jsonl": b"\x1f\x8b\x08",
        "array.jsonl": b'[{"text": "a"}]\n',
        "broken.jsonl": b'{"text": "a"}\n{"text": \n',
        "other.jsonl": b'{"text": "a"}\n{"body": "b"}\n',
        "number.jsonl": b'{"text": "a"}\n{"text": 3}\n',
        "surrogate.jsonl": b'{"text": "a"}\n{"text": "\\ud800"}\n',
        "short.parquet": b"PAR1",
    }
    for name, content in files.items():
        (here.path / name).write_bytes(content)
    table = pyarrow.table({"number": [1], "body": ["a"]})
    pyarrow.parquet.write_table(table, here.path / "table.parquet")
    (here.path / "directory").mkdir()

    def read(name: str, column: str = "text") -> list[str]:
        kinds = {".txt": "text", ".jsonl": "jsonl", ".parquet": "parquet"}
        kind: Any = kinds.get(Path(name).suffix, "text")
        source = SourceConfig("x", kind=kind, path=str(here.path / name), column=column)
        return list(
            documents(source, Config(data=DataConfig(sources=[source], max_broken_lines=0)))
        )

    for name in ("none.txt", "directory", *files, "table.parquet"):
        yield name, lambda name=name: read(name)
    yield "table.parquet, column number", lambda: read("table.parquet", "number")


def shards(here: SimpleNamespace) -> Iterator[Case]:
    config: Config = here.config
    yield (
        "evaluate, no tokenizer",
        lambda: open_shards(
            replace(config, tokenizer=replace(config.tokenizer, path=str(here.path / "t.model")))
        ),
    )
    source = Path(config.data.dir) / "hi"
    yield "not prepared", lambda: TokenShards(source, "train")
    empty = SourceConfig("none", kind="jsonl", path=str(here.path / "e.jsonl"))
    (here.path / "e.jsonl").write_text("\n")
    yield (
        "no documents",
        lambda: prepare(
            replace(config, data=replace(config.data, sources=[empty])), here.tokenizer, False
        ),
    )
    prepare(config, here.tokenizer, progress=False)
    sequences = TokenShards(source, "train")
    yield "long sequences", lambda: PackedSequences(sequences, len(sequences))
    yield "processes", lambda: train_batches(config, 0, 0, 3)
    other = replace(config, data=replace(config.data, shard_tokens=777))
    yield "evaluate, other settings", lambda: open_shards(other)
    file = sorted(source.glob("train-*0.npy"))[0]

    def damaged() -> None:
        os.truncate(file, 100)
        TokenShards(source, "train")

    yield "truncated shard", damaged

    def broken() -> None:
        (source / "manifest.json").write_text("{")
        TokenShards(source, "train")

    yield "broken manifest", broken


def tokenizers(here: SimpleNamespace) -> Iterator[Case]:
    (here.path / "bad.model").write_bytes(b"hello")
    (here.path / "json").mkdir()
    (here.path / "json/tokenizer.json").write_text("{")
    yield "missing", lambda: open_tokenizer(here.path / "no.model")
    yield "a directory", lambda: open_tokenizer(here.path)
    yield "not a model", lambda: open_tokenizer(here.path / "bad.model")
    yield "not JSON", lambda: open_tokenizer(here.path / "json/tokenizer.json")
    yield "token id", lambda: here.tokenizer.decode([99_999])
    yield "surrogate", lambda: here.tokenizer.encode("\ud800")
    config = here.config
    larger = replace(config, model=replace(config.model, vocab_size=640))
    yield "other vocabulary", lambda: train.load_or_train_tokenizer(larger)
    path = str(here.path / "new.model")
    huge = replace(config, tokenizer=replace(config.tokenizer, path=path, vocab_size=500_000))
    yield "too large", lambda: train.train(huge)
    small = replace(config, tokenizer=replace(config.tokenizer, path=path, vocab_size=100))
    yield "too small", lambda: train.train(small)
    yield "chat without roles", lambda: encode_chat(here.tokenizer, [{"content": "a"}])


def checkpoints(here: SimpleNamespace) -> Iterator[Case]:
    copy = here.path / "copy"
    shutil.copytree(here.checkpoint, copy)
    yield "no directory", lambda: formats.detect_format(here.path / "none")
    (here.path / "empty").mkdir()
    yield "no checkpoint", lambda: formats.detect_format(here.path / "empty")
    yield "destination exists", lambda: convert(copy, here.path / "empty", "safetensors")
    yield (
        "weights only",
        lambda: resume.check_resume(
            replace(here.config, model=safetensors.open_checkpoint(copy).model),
            safetensors.open_checkpoint(copy),
            "",
        ),
    )
    yield (
        "other model",
        lambda: resume.check_resume(here.config, safetensors.open_checkpoint(copy), ""),
    )
    tensors = load_file(copy / "model.safetensors")

    def changed(name: str, tensor: np.ndarray | None) -> Callable[[], None]:
        def open_changed() -> None:
            values = {**tensors, name: tensor}
            kept = {key: value for key, value in values.items() if value is not None}
            save_file(kept, copy / "model.safetensors")
            source = safetensors.open_checkpoint(copy)
            source.read("norm.weight")

        return open_changed

    yield "missing tensor", changed("norm.weight", None)
    yield "tensor too many", changed("extra.weight", np.zeros(3, np.float32))
    yield "other shape", changed("norm.weight", np.zeros(3, np.float32))
    yield "integer tensor", changed("norm.weight", np.zeros(24, np.int32))

    def truncated() -> None:
        os.truncate(copy / "model.safetensors", 1000)
        safetensors.open_checkpoint(copy)

    yield "truncated file", truncated
    known = json.loads((copy / "config.json").read_text("utf-8"))
    for name, text in (
        ("config.json is not JSON", "{"),
        ("config.json is a list", "[]"),
        ("config.json without keys", "{}"),
        ("config.json with a wrong value", json.dumps(known | {"dim": "x"})),
        ("config.json of a later version", json.dumps(known | {"experts": 8})),
    ):

        def described(text: str = text) -> None:
            (copy / "config.json").write_text(text)
            formats.model_of(copy)

        yield name, described


def hugging_face(here: SimpleNamespace) -> Iterator[Case]:
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 36, "vocab_size": 512, "max_position_embeddings": 64}
    for change in (
        {"model_type": "mamba"},
        {"hidden_size": None},
        {"hidden_size": "x"},
        {"hidden_act": "gelu"},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        {"quantization_config": {"bits": 4}},
        {"logit_soft_cap": 30.0},
        {"num_attention_heads": 5},
    ):
        config = {"model_type": "llama", **sizes, **change}
        yield (
            json.dumps(change),
            lambda config=config: model_from_hf(config, f"{here.path}/config.json"),
        )


def generation(here: SimpleNamespace) -> Iterator[Case]:
    for settings in (
        {"max_new_tokens": 0},
        {"temperature": -1},
        {"temperature": 1e-9},
        {"temperature": "hot"},
        {"top_p": 0},
        {"top_p": 2},
        {"top_k": -1},
        {"min_p": 1.5},
        {"n": 0},
        {"stop": [""]},
        {"repetition_penalty": 0},
        {"num_beams": 2, "temperature": 1.0},
        {"regex": "a", "choice": ["a"]},
        {"json_schema": "{"},
        {"top_logprobs": 3},
        {"temprature": 1},
    ):
        yield json.dumps(settings), lambda settings=settings: make_settings(settings)
    model = ModelConfig(vocab_size=64, dim=16, n_layers=1, n_heads=2, max_seq_len=8)
    yield "empty prompt", lambda: pad_prompts([[]], 1, model)
    yield "long prompt", lambda: pad_prompts([[1] * 8], 1, model)
    yield "unknown token", lambda: pad_prompts([[99]], 1, model)
    tokenizer = here.tokenizer
    for setting in ({"regex": "("}, {"grammar": "start: ("}, {"json_schema": {"type": "text"}}):
        settings = make_settings(setting)
        yield (
            json.dumps(setting),
            lambda settings=settings: make_constraint(settings, tokenizer, [1], [2]),
        )
    lines = here.path / "lines.jsonl"

    def requests(*words: str) -> list[Any]:
        parser = generate_parser("mooshak_torch.generate", "Generate.")
        return read_requests(parser.parse_args([str(here.checkpoint), *words]))

    yield "no prompt", requests
    for text in (b"{", b"[]", b"{}", b'{"prompt": 3}', b'{"prompt": "a", "top_p": 2}', b"\xff"):

        def read(text: bytes = text) -> None:
            lines.write_bytes(text)
            requests("--jsonl", str(lines))

        yield f"--jsonl {text!r}", read
    yield "no file", lambda: requests("--prompts", str(here.path / "none"))


def files(here: SimpleNamespace) -> Iterator[Case]:
    (here.path / "file").write_text("{")
    yield "not a directory", lambda: write_atomically(here.path / "file/x", "")
    yield "is a directory", lambda: write_atomically(here.path, "")
    yield "name too long", lambda: write_atomically(here.path / ("x" * 256), "")
    yield "not JSON", lambda: read_object(here.path / "file")

    def enter(n_bytes: int, name: str) -> None:
        with atomic_directory(here.path / name, n_bytes):
            pass

    yield "exists", lambda: enter(0, "file")

    def full() -> None:
        with open("/dev/full", "wb", buffering=0) as file:
            file.write(b"x")

    yield "full disk", full


SECTIONS = (
    yaml_files,
    options,
    sources,
    shards,
    tokenizers,
    checkpoints,
    hugging_face,
    generation,
    files,
)


def message(cause: Callable[[], Any], directories: dict[str, str]) -> str:
    """Return what a command would print, with placeholders for directories."""
    try:
        cause()
    except InputError as error:
        text = str(error)
    except OSError as error:
        text = os_error_text(error)
    else:
        return NOTHING
    text = " ".join(text.split())
    for directory, name in directories.items():
        text = text.replace(directory, name)
    return text


def test_messages_are_those_of_the_golden_file(
    here: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(here.path)
    directories = {
        str(here.path): "DIR",
        str(here.checkpoint): "CHECKPOINT",
        str(here.tokenizer.path): "TOKENIZER",
    }
    parts = [HEADER]
    for section in SECTIONS:
        parts.append(f"\n# {section.__name__.replace('_', ' ')}\n")
        for name, cause in section(here):
            parts.append(f"\n{name!r}\n    {message(cause, directories)}\n")
    found = "".join(parts)
    assert NOTHING not in found or os.environ.get("MOOSHAK_WRITE_MESSAGES"), found
    if os.environ.get("MOOSHAK_WRITE_MESSAGES"):
        GOLDEN.write_text(found, "utf-8")
    assert found.splitlines() == GOLDEN.read_text("utf-8").splitlines()
