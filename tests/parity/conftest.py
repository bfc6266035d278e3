"""JAX with eight CPU devices and float64, set before a device is used; hasty compilation."""

import os
from collections.abc import Iterator

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_enable_x64", True)


@pytest.fixture(scope="module")
def compiled_in_haste() -> Iterator[None]:
    """Compile with few optimizations, which halves the time; commands that a test starts, too.

    For files that compile many programs, of which each runs for a moment. The same comparisons of
    optimized programs are those of test_demo.py, and test_layouts.py, test_curve.py.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        jax.config.update("jax_disable_most_optimizations", True)
        yield
        jax.config.update("jax_disable_most_optimizations", False)
