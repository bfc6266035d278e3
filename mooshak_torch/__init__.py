"""Mooshak in PyTorch, the canonical implementation; imports neither mooshak_jax nor JAX.

lm = mooshak_torch.load("runs/demo/torch/checkpoints/600")
print(lm.generate("एक समय", max_new_tokens=32))
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mooshak_torch.lm import LM, load

__all__ = ["LM", "load"]


def __getattr__(name: str) -> Any:
    # Imported on first use: a command parses its arguments before it imports the framework.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from mooshak_torch import lm

    return getattr(lm, name)
