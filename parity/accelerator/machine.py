"""Part `machine`: versions, devices, and the flags and the arithmetic of matrix products."""

import os
import platform
import subprocess
from collections.abc import Iterator
from importlib import metadata

import numpy as np

from mooshak.device import NAMES
from parity.accelerator.rows import Row, Setup, attempt

PACKAGES = (
    "torch",
    "triton",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "transformers",
    "numpy",
)
FLOAT32_PRODUCT = 2e-6
"""Relative error allowed for a float32 product; TF32 has 3e-4."""
BFLOAT16_SUM = 2.0**-8
"""Relative error allowed for a long bfloat16 sum of positive products: one rounding of the result.
Partial sums in bfloat16 would be rounded each."""


def machine(setup: Setup) -> Iterator[Row]:
    """Yield versions, devices, flags, and the errors of products on each device."""
    yield Row("Python", platform.python_version())
    for package in PACKAGES:
        try:
            yield Row(package, metadata.version(package))
        except metadata.PackageNotFoundError:
            yield Row(package, "not installed")
    yield Row("processors", str(os.cpu_count()))
    yield from attempt("nvidia-smi", _driver)
    yield from attempt("PyTorch", lambda: _torch(setup))
    yield from attempt("JAX", lambda: _jax(setup))


def find_devices(wanted: str | None) -> tuple[str, str]:
    """Return the devices of PyTorch and of JAX: `wanted` where it is there, else the best found.

    Raises `InputError` if neither framework has the wanted device.
    """
    from mooshak.errors import InputError

    found, problems = [], []
    for find in (_torch_device, _jax_device):
        try:
            found.append(find(wanted))
        except (InputError, ImportError) as error:
            problems.append(str(error))
            found.append("cpu")
    if len(problems) == 2:
        raise InputError("; ".join(problems))
    return found[0], found[1]


def _torch_device(wanted: str | None) -> str:
    from mooshak_torch.device import find_device

    return find_device(wanted).type


def _jax_device(wanted: str | None) -> str:
    from mooshak_jax.device import find_devices as find

    platform_ = find(wanted)[0].platform
    return {"gpu": "cuda"}.get(platform_, platform_ if platform_ in NAMES else "cpu")


def _driver() -> Iterator[Row]:
    query = "name,driver_version,memory.total,power.limit,clocks.max.sm"
    words = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    try:
        done = subprocess.run(
            words, capture_output=True, encoding="utf-8", errors="replace", timeout=20
        )
    except FileNotFoundError:
        return
    for i, line in enumerate(done.stdout.strip().splitlines()):
        yield Row(f"GPU {i} (name, driver, memory, power limit, SM clock)", line)


def _torch(setup: Setup) -> Iterator[Row]:
    import torch

    from mooshak_torch.ops.matmul import linear
    from mooshak_torch.step import set_matmul_precision

    device = torch.device(setup.torch_device)
    if device.type == "cuda":
        yield Row("PyTorch: device", torch.cuda.get_device_name())
        yield Row("PyTorch: CUDA, cuDNN", f"{torch.version.cuda}, {torch.backends.cudnn.version()}")
    else:
        yield Row("PyTorch: device", "CPU")
    set_matmul_precision()
    flags = {
        "float32 products in TF32": torch.backends.cuda.matmul.allow_tf32,
        "convolutions in TF32": torch.backends.cudnn.allow_tf32,
        "partial sums in bfloat16": (
            torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
        ),
        "partial sums in float16": (
            torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction
        ),
    }
    for name, value in flags.items():
        yield Row(f"PyTorch: {name}", str(value), passed=value is False)

    def product(a: np.ndarray, b: np.ndarray, dtype: str) -> np.ndarray:
        x, w = (torch.from_numpy(m).to(device, getattr(torch, dtype)) for m in (a, b))
        return linear(x, w).float().cpu().numpy()

    yield from _products("PyTorch", product)


def _jax(setup: Setup) -> Iterator[Row]:
    import jax
    import jax.numpy as jnp

    from mooshak_jax.ops.matmul import PRECISION, einsum

    device = jax.devices(setup.jax_device)[0]
    yield Row("JAX: device", f"{device.device_kind} x {jax.device_count(setup.jax_device)}")
    for name in ("float32", "bfloat16"):
        yield Row(f"JAX: precision of {name} products", str(PRECISION[name]))
    yield Row("JAX: XLA_FLAGS", os.environ.get("XLA_FLAGS", "(none)"))

    def product(a: np.ndarray, b: np.ndarray, dtype: str) -> np.ndarray:
        x, w = (jax.device_put(m.astype(jnp.dtype(dtype)), device) for m in (a, b))
        return np.asarray(jax.jit(lambda x, w: einsum("ni,oi->no", x, w))(x, w), np.float32)

    yield from _products("JAX", product)


def _products(framework: str, product: object) -> Iterator[Row]:
    """Yield the relative errors of products: of float32, and of long bfloat16 sums."""
    assert callable(product)
    random = np.random.default_rng(0)
    a, b = random.normal(size=(2, 512, 512)).astype(np.float32)
    exact = a.astype(np.float64) @ b.astype(np.float64).T
    error = np.linalg.norm(product(a, b, "float32") - exact) / np.linalg.norm(exact)
    name = f"{framework}: error of a float32 product"
    yield Row(name, float(error), "relative", FLOAT32_PRODUCT, bool(error <= FLOAT32_PRODUCT))
    # Multiples of 1/64 below 2 are exact in bfloat16, and every product is exact in float32.
    a, b = (random.integers(64, 128, size=(2, 8, 2**16)) / 64).astype(np.float32)
    exact = a.astype(np.float64) @ b.astype(np.float64).T
    error = np.abs(product(a, b, "bfloat16") / exact - 1).max()
    name = f"{framework}: error of a bfloat16 sum of 65,536 products"
    yield Row(name, float(error), "relative", BFLOAT16_SUM, bool(error <= BFLOAT16_SUM))
