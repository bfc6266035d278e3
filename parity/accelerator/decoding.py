"""Parts `decode-*`: tokens per second of 1 and of 16 rows after a prompt of 1,024 tokens."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from mooshak.config.model import Dtype, ModelConfig
from mooshak.hardware import DEVICES, device_name
from parity.accelerator.rows import Row, Setup, attempt
from parity.accelerator.training import (
    configuration,
    jax_random_weights,
    not_measured,
    torch_random_weights,
)

ROWS = (1, 16)
PROMPT, NEW_TOKENS = 1024, 128
SMALL_PROMPT, SMALL_NEW_TOKENS = 16, 8
DTYPES: tuple[Dtype, ...] = ("bfloat16", "float32")

Generate = Callable[[list[list[int]], int], np.ndarray]
"""(prompts, new tokens) -> token ids [prompts, new tokens]."""


def decode_torch(setup: Setup) -> Iterator[Row]:
    """Yield the figures of PyTorch, eager and compiled."""
    if reason := not_measured("125m", setup.torch_device, setup):
        yield Row("PyTorch", reason)
        return
    import torch

    from mooshak_torch.decode import generate
    from mooshak_torch.model import Model
    from mooshak_torch.step import set_matmul_precision

    set_matmul_precision()
    config = _model(setup)
    kind = torch.cuda.get_device_name() if setup.torch_device == "cuda" else "CPU"
    for compiled in (False, True):
        for dtype in DTYPES[:1] if compiled or setup.small else DTYPES:

            def measure(dtype: Dtype = dtype, compiled: bool = compiled) -> Iterator[Row]:
                model = Model(config, dtype).to(setup.torch_device)
                torch_random_weights(model)
                name = f"PyTorch{' compiled' if compiled else ''}, {dtype}"
                size = sum(p.nbytes for p in model.parameters())

                def run(prompts: list[list[int]], n: int) -> np.ndarray:
                    return generate(model, prompts, n, compiled=compiled)

                yield from _figures(name, run, size, kind, config, setup)

            yield from attempt(f"PyTorch, {dtype}", measure)


def decode_jax(setup: Setup) -> Iterator[Row]:
    """Yield the figures of JAX."""
    if reason := not_measured("125m", setup.jax_device, setup):
        yield Row("JAX", reason)
        return
    import jax

    from mooshak_jax.decode import generate
    from mooshak_jax.distributed.mesh import make_mesh
    from mooshak_jax.params import abstract_params, make_graphdef

    config, devices = _model(setup), jax.devices(setup.jax_device)
    for dtype in DTYPES[:1] if setup.small else DTYPES:

        def measure(dtype: Dtype = dtype) -> Iterator[Row]:
            params: Any = jax_random_weights(
                abstract_params(config, dtype, make_mesh("data=1", devices))
            )
            graphdef = make_graphdef(config, dtype)
            size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))

            def run(prompts: list[list[int]], n: int) -> np.ndarray:
                with jax.enable_x64():
                    return generate(graphdef, params, prompts, n)

            yield from _figures(f"JAX, {dtype}", run, size, devices[0].device_kind, config, setup)

        yield from attempt(f"JAX, {dtype}", measure)


def _model(setup: Setup) -> ModelConfig:
    return configuration("125m", setup).model


def _figures(
    name: str, generate: Generate, n_bytes: int, kind: str, model: ModelConfig, setup: Setup
) -> Iterator[Row]:
    """Yield speeds of prefill and of decoding, and the limit that reading the weights sets."""
    length = SMALL_PROMPT if setup.small else PROMPT
    n_new = SMALL_NEW_TOKENS if setup.small else NEW_TOKENS
    device = device_name(kind)
    for n_rows in ROWS:
        shape = (n_rows, length)
        prompts = np.random.default_rng(0).integers(0, model.vocab_size, shape).tolist()
        generate(prompts, n_new + 1), generate(prompts, 1)  # Compile.
        start = time.perf_counter()
        generate(prompts, 1)
        prefill = time.perf_counter() - start
        tokens = generate(prompts, n_new + 1)
        decode = time.perf_counter() - start - 2 * prefill
        whole = tokens.shape == (n_rows, n_new + 1)
        row = f"{name}, {n_rows} row{'s' if n_rows > 1 else ''}"
        yield Row(f"{row}: prompt of {length}", n_rows * length / prefill, "tokens/s")
        speed = n_rows * n_new / decode if decode > 0 else None
        yield Row(f"{row}: decoding", speed, "tokens/s", passed=whole)
        if device and speed:
            limit = n_rows * DEVICES[device].memory_bandwidth / n_bytes
            yield Row(f"{row}: share of the bandwidth roofline", speed / limit)
