"""Small models of both architectures, on engines of both frameworks."""

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from mooshak.checkpoints import safetensors
from mooshak.config.model import ModelConfig
from mooshak.generation.lm import LM
from mooshak.serving.engine import Engine
from mooshak.serving.scheduler import Scheduler
from mooshak.tokenizer.base import Tokenizer
from mooshak.tokenizer.files import files_of_tokenizer
from tests.drawn_checkpoints import drawn_checkpoint

MODELS = {
    "mooshak": ModelConfig(
        vocab_size=512, dim=32, n_layers=2, n_heads=2, hidden_dim=48, max_seq_len=96
    ),
    "llama": ModelConfig(
        architecture="llama",
        vocab_size=512,
        dim=48,
        n_layers=2,
        n_heads=6,
        n_kv_heads=2,
        hidden_dim=64,
        max_seq_len=96,
        sliding_window=20,
        tie_embeddings=True,
        qkv_bias=True,
    ),
}


@pytest.fixture(scope="session")
def checkpoints(
    tiny_tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Checkpoints of `MODELS` with drawn weights."""
    found = {}
    for name, model in MODELS.items():
        files = files_of_tokenizer(tiny_tokenizer.path)
        drawn = drawn_checkpoint(model, 1, scale=3.0, tokenizer_files=files)
        found[name] = tmp_path_factory.mktemp("serving") / name
        safetensors.write_checkpoint(found[name], drawn)
    return found


def load(framework: str, path: Path, dtype: str = "float32", **options: Any) -> LM:
    lm: LM = import_module(f"mooshak_{framework}").load(path, dtype, **options)
    return lm


def make_scheduler(framework: str, lm: LM, **options: Any) -> Scheduler:
    module = import_module(f"mooshak_{framework}.engine")
    engine: Engine = module.Engine(lm, **({"n_slots": 4, "chunk": 16} | options))
    return Scheduler(lm, engine)
