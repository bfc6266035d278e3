"""Part `equality`: the lines of `parity.check` with both frameworks on their devices."""

import math
from collections.abc import Iterator

from mooshak.config.model import ModelConfig
from parity.accelerator.rows import Row, Setup
from parity.checker import COMPARISONS, check, random_checkpoint

MODEL = ModelConfig(
    vocab_size=2048, dim=192, n_layers=4, n_heads=6, hidden_dim=512, max_seq_len=256
)
"""The model of configs/demo.yaml."""
SMALL = ModelConfig(vocab_size=256, dim=48, n_layers=1, n_heads=6, hidden_dim=80, max_seq_len=256)


def equality(setup: Setup) -> Iterator[Row]:
    """Yield the lines of the check: float32 and bfloat16 from float64 on the CPU first."""
    devices = setup.torch_device, setup.jax_device
    model = SMALL if setup.small else MODEL
    size = {"batch": 2, "time": 24, "decode": 8} if setup.small else {}
    # Packed documents alone have a shape, and so a compilation, for each length.
    parts = [part for part in ("precision", *COMPARISONS) if part != "packing" or not setup.small]
    for line in check(
        random_checkpoint(model),
        **size,  # type: ignore[arg-type]
        parts=parts,
        controls=False,
        floors=False,
        devices=devices,
    ):
        value = line.measured if math.isfinite(line.measured) else None
        name = f"{line.name}, {line.dtype}" if line.dtype else line.name
        note = "" if line.passed else line.where
        yield Row(name, value, "", line.allowed, line.passed, note)
