"""Both frameworks behind one interface: the same calls, with canonical arrays in and out."""

from parity.backends.base import (
    Arrays,
    Backend,
    CacheCall,
    FixedDtype,
    ForwardBackward,
    Step,
)
from parity.backends.jax import JaxBackend, canonical
from parity.backends.torch import TorchBackend

__all__ = [
    "Arrays",
    "Backend",
    "CacheCall",
    "FixedDtype",
    "ForwardBackward",
    "JaxBackend",
    "Step",
    "TorchBackend",
    "canonical",
]
