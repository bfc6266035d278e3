"""Fixture of the tests of plans: JAX as a command starts."""

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture(autouse=True)
def _as_a_command_starts() -> Iterator[None]:
    """Other tests compute in float64, and a program is another one then."""
    cached = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    with jax.enable_x64(False):
        yield
    jax.config.update("jax_enable_compilation_cache", cached)
