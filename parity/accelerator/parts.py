"""The parts of the accelerator report, what would be missed most first."""

from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

from parity.accelerator.rows import Part


@dataclass(frozen=True)
class PartSpec:
    """One part: a process that measures rows within its time."""

    name: str
    title: str
    entry: str
    """module:function of this package."""
    seconds: float
    """Its share of 8 minutes; what earlier parts leave is added."""
    arguments: tuple[Any, ...] = ()

    def load(self) -> Part:
        """Return the function that measures the rows."""
        module, function = self.entry.split(":")
        found: Any = getattr(import_module(f"parity.accelerator.{module}"), function)
        return partial(found, *self.arguments) if self.arguments else found


PARTS = (
    PartSpec("machine", "Machine, versions and flags", "machine:machine", 30),
    PartSpec("equality", "Both frameworks from float64", "equality:equality", 110),
    PartSpec("train-torch-125m", "Step of 125M in PyTorch", "training:train_torch", 45, ("125m",)),
    PartSpec("train-jax-125m", "Step of 125M in JAX", "training:train_jax", 40, ("125m",)),
    PartSpec("train-torch-2b", "Step of 2B in PyTorch", "training:train_torch", 50, ("2b",)),
    PartSpec("train-jax-2b", "Step of 2B in JAX", "training:train_jax", 40, ("2b",)),
    PartSpec("curve", "Loss curves", "curve:curve", 80),
    PartSpec(
        "transformers-125m", "transformers, 125M", "training:train_transformers", 45, ("125m",)
    ),
    PartSpec("decode-torch", "Decoding in PyTorch, 125M", "decoding:decode_torch", 30),
    PartSpec("decode-jax", "Decoding in JAX, 125M", "decoding:decode_jax", 30),
    PartSpec("checkpoints", "Checkpoints", "checkpoints:checkpoints", 25),
    PartSpec("transformers-2b", "transformers, 2B", "training:train_transformers", 45, ("2b",)),
)
