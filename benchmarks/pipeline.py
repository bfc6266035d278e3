"""Workers of the data pipeline: batches for the training loop, and text to token shards."""

import ast
import contextlib
import json
import sysconfig
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from benchmarks.case import Size
from benchmarks.worker import Repeat, temporary_directory, timed
from mooshak.config.model import ModelConfig
from mooshak.config.sections import Config, DataConfig, SourceConfig, TokenizerConfig, TrainConfig
from mooshak.corpus.tales import documents
from mooshak.data.batches import train_batches
from mooshak.data.packing import Batch
from mooshak.data.shards import prepare
from mooshak.tokenizer import train


def batches(size: Size) -> Repeat:
    """Time our batches: Grain over the windows of all shards, shuffled in every epoch."""
    return _time_steps(our_batches(size), size)


def our_batches(size: Size) -> Iterator[Batch[np.ndarray]]:
    """Return our batches of random tokens."""
    directory = temporary_directory() / "random"
    directory.mkdir()
    tokens = _tokens(size)
    np.save(directory / "train-00000.npy", tokens)
    file = directory / "train-00000.npy"
    shard = {
        "file": file.name,
        "split": "train",
        "tokens": len(tokens),
        "dtype": "uint16",
        "file_bytes": file.stat().st_size,
    }
    (directory / "manifest.json").write_text(json.dumps({"shards": [shard]}), "utf-8")
    T, B = size["sequence_length"], size["batch_size"]
    config = Config(
        model=ModelConfig(vocab_size=64, dim=2, n_layers=1, n_heads=1, max_seq_len=T),
        data=DataConfig(dir=str(directory.parent), sources=[SourceConfig("random")]),
        train=TrainConfig(batch_size=B),
    )
    return train_batches(config)


def dataloader(size: Size) -> Repeat:
    """Time torch's DataLoader with worker processes over shuffled windows of a memory map."""
    import torch
    from torch.utils.data import DataLoader, Dataset

    path, T = temporary_directory() / "tokens.bin", size["sequence_length"]
    _tokens(size).tofile(path)

    class Windows(Dataset):
        def __init__(self) -> None:
            self.tokens = np.memmap(path, np.uint16, "r")

        def __len__(self) -> int:
            return (len(self.tokens) - 1) // T

        def __getitem__(self, index: int) -> torch.Tensor:
            return torch.from_numpy(self.tokens[index * T : index * T + T + 1].astype(np.int64))

    loader = DataLoader(
        Windows(),
        batch_size=size["batch_size"],
        shuffle=True,
        drop_last=True,
        num_workers=size["workers"],
        persistent_workers=True,
    )

    def endless() -> Iterator[Any]:
        while True:
            yield from loader

    return _time_steps(endless(), size)


def tokenize(size: Size) -> Repeat:
    """Time our `python -m mooshak.data prepare`, including checksums and manifest."""
    config = _text(size)
    train.load_or_train_tokenizer(config)
    numbers = iter(range(10**6))

    def work() -> None:
        data = replace(config.data, dir=f"{config.data.dir}/{next(numbers)}")
        # A new tokenizer, whose cache of words is empty.
        prepare(replace(config, data=data), train.load_or_train_tokenizer(config), progress=False)

    return lambda: timed(work)


def sentencepiece_loop(size: Size) -> Repeat:
    """Time a plain script: read a line, encode it, append it; write the array at the end."""
    config = _text(size)
    train.load_or_train_tokenizer(config)
    model = sentencepiece.SentencePieceProcessor(model_file=config.tokenizer.path)
    out = Path(config.data.dir) / "tokens.npy"

    def work() -> None:
        arrays = []
        with open(config.data.sources[0].path, encoding="utf-8") as file:
            for line in file:
                ids = [model.bos_id(), *model.encode(json.loads(line)["text"]), model.eos_id()]
                arrays.append(np.array(ids, np.uint16))
        np.save(out, np.concatenate(arrays))

    return lambda: timed(work)


def _time_steps(batches: Iterator[Any], size: Size) -> Repeat:
    next(batches)
    return lambda: timed(lambda: [None for _ in islice(batches, size["steps"])])


def _text(size: Size) -> Config:
    """Write documents as a JSONL file. Returns the configuration of their tokenizer and data."""
    directory = temporary_directory()
    path, n = directory / "text.jsonl", size["documents"]
    tales = (text for _, text in documents(0, n // 2, ("hi", "en")))
    with path.open("w", encoding="utf-8") as file:
        for text in tales if size["text"] == "tales" else islice(_docstrings(), n):
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    model = ModelConfig(vocab_size=-(-size["vocab_size"] // 64) * 64, dim=2, n_layers=1, n_heads=1)
    sources = [SourceConfig("text", kind="jsonl", path=str(path))]
    return Config(
        model=model,
        tokenizer=TokenizerConfig(
            str(directory / "tokenizer.model"), size["vocab_size"], 1.0, 10**6
        ),
        data=DataConfig(dir=str(directory), sources=sources),
    )


def _docstrings() -> Iterator[str]:
    """Yield the docstrings of modules, classes and functions of Python's standard library."""
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(set(library.rglob("*.py")) - set(library.glob("site-packages/**/*.py"))):
        # Some of the library's test files are invalid Python on purpose.
        with contextlib.suppress(SyntaxError, ValueError):
            for node in ast.walk(ast.parse(path.read_bytes())):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                    yield from filter(None, [ast.get_docstring(node)])


def _tokens(size: Size) -> np.ndarray:
    vocab_size = size.get("vocab_size", 64)
    return np.random.default_rng(0).integers(0, vocab_size, size["tokens"], np.uint16)
