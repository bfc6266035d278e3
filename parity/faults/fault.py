"""The record of one mistake that the check must find."""

from collections.abc import Callable
from dataclasses import dataclass

from mooshak.checkpoints.base import Checkpoint
from parity.faults.model import Patch


@dataclass(frozen=True)
class Fault:
    """One mistake: in the code of each framework, or in how a checkpoint is read."""

    part: str
    """The part of the check that must find the fault."""
    place: str
    """Regular expression of the place that the check must report."""
    torch: Callable[[], list[Patch]] | None = None
    jax: Callable[[], list[Patch]] | None = None
    read: Callable[[Checkpoint], Checkpoint] | None = None
    """The checkpoint as the faulty framework reads it."""
    architecture: str = "mooshak"
    """An architecture that has the operation."""
