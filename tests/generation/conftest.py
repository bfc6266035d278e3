"""A small model in each framework."""

from importlib import import_module
from pathlib import Path

import pytest

from mooshak.generation.lm import LM

FRAMEWORKS = ("torch", "jax")


@pytest.fixture(scope="module")
def lms(tiny_checkpoint: Path) -> dict[str, LM]:
    return {f: import_module(f"mooshak_{f}").load(tiny_checkpoint) for f in FRAMEWORKS}


@pytest.fixture(params=FRAMEWORKS)
def lm(request: pytest.FixtureRequest, lms: dict[str, LM]) -> LM:
    """The model in each framework."""
    return lms[request.param]
