"""Fixtures: a small bilingual corpus, its tokenizer, a configuration and a checkpoint."""

import gc
import json
import os
import random
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

# Before JAX and torch are imported. Models are tiny: threads would only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "jax")
)
# Many tests, and the commands that they start, compile the same programs.
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
# Without the lines of the source in each operation: lowering takes a tenth less.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")

import fork_server
import jax
import pytest

from mooshak.checkpoints import safetensors
from mooshak.config.model import ModelConfig
from mooshak.config.sections import (
    Config,
    DataConfig,
    EvaluateConfig,
    RunConfig,
    SourceConfig,
    TokenizerConfig,
    TrainConfig,
)
from mooshak.tokenizer import train
from mooshak.tokenizer.base import Tokenizer
from mooshak.tokenizer.files import files_of_tokenizer
from tests.drawn_checkpoints import drawn_checkpoint

subprocess.Popen = fork_server.ForkedPopen  # type: ignore[misc]
# Devices are counted once per process, and a mesh takes as many of them as it needs.
jax.config.update("jax_num_cpu_devices", 8)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first: the workers that share them then end together."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="module", autouse=True)
def _frozen_objects() -> Iterator[None]:
    """Keep what a file leaves behind, such as compiled programs, out of garbage collections.

    They took a tenth of the time: there are millions of such objects.
    """
    yield
    gc.freeze()


@pytest.fixture(scope="module")
def compiled_in_haste() -> Iterator[None]:
    """Compile with few of LLVM's optimizations, in half the time; commands that a test starts, too.

    For comparisons to a tolerance, of many programs that each run for a moment. Bits are compared
    in the programs that users run; those, and loss curves of full runs, are compared to a
    tolerance too: training/test_runs.py, parity/test_demo.py, distributed/test_jax_meshes.py.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        jax.config.update("jax_disable_most_optimizations", True)
        yield
        jax.config.update("jax_disable_most_optimizations", False)


HINDI = (
    "एक चालाक चूहा जंगल में रहता था और शेर उसका दोस्त बन गया किसान ने हाथी को पानी दिया क्‍या ज्ञान श्री"
).split()
ENGLISH = (
    "a clever mouse lived in the forest and the lion became its friend; the farmer gave water"
).split()


def sentence(words: list[str], random_: random.Random) -> str:
    """A document of a few lines."""
    lines = (random_.choices(words, k=random_.randint(5, 12)) for _ in range(random_.randint(2, 4)))
    return "\n".join(" ".join(line) + f" {random_.randint(0, 999)}." for line in lines)


@pytest.fixture(scope="session")
def tiny_config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A configuration whose sources are a JSONL file in Hindi and text files in English."""
    root, random_ = tmp_path_factory.mktemp("corpus"), random.Random(0)
    (root / "en").mkdir()
    for number in range(200):
        (root / "en" / f"{number:03}.txt").write_text(sentence(ENGLISH, random_))
    with open(root / "hi.jsonl", "w") as file:
        for _ in range(300):
            text = sentence(HINDI, random_)
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    sources = [
        SourceConfig("hi", kind="jsonl", language="hi", weight=0.6, path=str(root / "hi.jsonl")),
        SourceConfig("en", kind="text", language="en", weight=0.4, path=str(root / "en" / "*.txt")),
    ]
    return Config(
        model=ModelConfig(
            vocab_size=512, dim=32, n_layers=2, n_heads=2, hidden_dim=48, max_seq_len=32
        ),
        tokenizer=TokenizerConfig(path=str(root / "tokenizer.model"), vocab_size=505),
        data=DataConfig(
            dir=str(root / "shards"), sources=sources, validation_fraction=0.2, shard_tokens=2000
        ),
        train=TrainConfig(steps=10, batch_size=8),
        evaluate=EvaluateConfig(every=5, sequences=8, batch_size=4),
        run=RunConfig(dir=str(root / "run"), progress=False, tensorboard=False),
    )


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_config: Config) -> Tokenizer:
    """The tokenizer of `tiny_config`."""
    return train.load_or_train_tokenizer(tiny_config)


TINY_MODEL = ModelConfig(
    architecture="llama",
    vocab_size=512,
    dim=24,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    head_dim=10,
    hidden_dim=36,
    max_seq_len=64,
)


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny_tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in the interchange format: drawn weights, and the tokenizer."""
    files = files_of_tokenizer(tiny_tokenizer.path)
    path = tmp_path_factory.mktemp("checkpoint") / "drawn"
    safetensors.write_checkpoint(path, drawn_checkpoint(TINY_MODEL, 1, tokenizer_files=files))
    return path


@pytest.fixture
def fresh_config(tiny_config: Config, tiny_tokenizer: Tokenizer, tmp_path: Path) -> Config:
    """`tiny_config` with its tokenizer, and nothing prepared yet."""
    return replace(tiny_config, data=replace(tiny_config.data, dir=str(tmp_path / "shards")))
