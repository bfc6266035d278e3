"""Checkpoints of tests: drawn weights, with random gains around one."""

from pathlib import Path
from typing import Any

import numpy as np

from mooshak.checkpoints.base import FULL_SLICE, Checkpoint
from mooshak.config.model import ModelConfig
from mooshak.numerics.init_weights import initial_weight


def drawn_checkpoint(
    model: ModelConfig,
    seed: int = 0,
    scale: float = 1.0,
    state: dict[str, Any] | None = None,
    tokenizer_files: dict[str, Path] | None = None,
) -> Checkpoint:
    """Return a checkpoint in float32, open for reading; its weights are multiplied by `scale`."""
    tensors = {
        name: (np.dtype(np.float32), shape) for name, shape in model.parameter_shapes().items()
    }

    def read(name: str, rows: slice = FULL_SLICE) -> np.ndarray:
        return initial_weight(model, seed, name, rows, gain_std=0.2) * np.float32(scale)

    files = tokenizer_files or {}
    return Checkpoint(Path("drawn"), "drawn", model, state, tensors, read, tokenizer_files=files)
