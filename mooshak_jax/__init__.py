"""Mooshak in Flax NNX, the mirror of mooshak_torch; imports neither mooshak_torch nor torch.

lm = mooshak_jax.load("runs/demo/jax/checkpoints/1200")
print(lm.generate("एक समय", max_new_tokens=32))
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mooshak_jax.lm import LM, load

__all__ = ["LM", "load"]


def __getattr__(name: str) -> Any:
    # Imported on first use: a command parses its arguments before it imports the framework.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from mooshak_jax import lm

    return getattr(lm, name)
