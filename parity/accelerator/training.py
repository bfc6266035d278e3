"""Parts `train-*`: the training step in bfloat16: speed, MFU, memory, and where the time goes.

Both frameworks run the trainers' own step on random tokens and random weights, which are made on
the device. The peer is transformers' Llama of the same width, depth and vocabulary, with bfloat16
autocast and torch's fused AdamW.
"""

import gc
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mooshak.config.parse import load_config
from mooshak.config.sections import Config
from mooshak.data.packing import Batch
from mooshak.hardware import device_name, peak_flops
from parity.accelerator.rows import Row, Setup, attempt

CONFIGS = Path(__file__).parents[2] / "configs"
ROWS = {"125m": 16, "2b": 4}
"""Sequences of a step."""
SEQUENCE_LENGTH = 2048
WARMUP_STEPS, MIN_STEPS, SECONDS = 3, 5, 6.0
"""The step is repeated for `SECONDS`, and at least `MIN_STEPS` times."""
N_OPERATIONS = 10
SMALL = {
    "model.vocab_size": 256,
    "model.dim": 64,
    "model.n_layers": 2,
    "model.n_heads": 4,
    "model.hidden_dim": 96,
    "train.batch_size": 2,
    "train.sequence_length": 32,
}
"""Options of the sizes of a test."""

PUBLISHED = (
    (
        "published: torchtitan, Llama 3.1 8B, 8 H100, eager to compiled",
        "0.33 to 0.39",
        "torchtitan, benchmarks/llama3_h100_202412_torchtitan.md",
    ),
    ("published: MaxText, 32B, TPU v5p-128", "0.715", "MaxText, configs/v5p/README.md"),
    ("published: MaxText, 16B, TPU v5e-256", "0.611", "MaxText, configs/v5e/README.md"),
)
"""Name, MFU, source."""


def train_torch(size: str, setup: Setup) -> Iterator[Row]:
    """Yield the figures of our step in PyTorch, eager and compiled, and of the plan."""
    if reason := not_measured(size, setup.torch_device, setup):
        yield Row("PyTorch", reason)
        return
    config = configuration(size, setup)
    yield from attempt("eager", lambda: _torch_step("eager", config, setup))
    yield from attempt("plan", lambda: _torch_plan(config))
    compiled = replace(config, train=replace(config.train, compile=True))
    yield from attempt("compiled", lambda: _torch_step("compiled", compiled, setup))


def train_jax(size: str, setup: Setup) -> Iterator[Row]:
    """Yield the figures of our step in JAX, and XLA's account of its memory."""
    if reason := not_measured(size, setup.jax_device, setup):
        yield Row("JAX", reason)
        return
    config = configuration(size, setup)
    yield from attempt("JAX", lambda: _jax_step(config, setup))
    if size == "125m":
        for name, value, source in PUBLISHED:
            yield Row(name, value, "MFU", note=source)


def train_transformers(size: str, setup: Setup) -> Iterator[Row]:
    """Yield the figures of transformers' Llama and of ours, in the same shape."""
    if reason := not_measured(size, setup.torch_device, setup):
        yield Row("transformers", reason)
        return
    config = configuration(size, setup)
    config = replace(config, model=replace(config.model, architecture="llama"))
    compiled = replace(config, train=replace(config.train, compile=True))
    measures = {
        "transformers eager": partial(_transformers_step, config, False),
        "ours, Llama, eager": partial(_torch_step, "ours, Llama, eager", config, setup, False),
        "transformers compiled": partial(_transformers_step, config, True),
        "ours, Llama, compiled": partial(
            _torch_step, "ours, Llama, compiled", compiled, setup, False
        ),
    }
    for name, measure in measures.items():
        if name.startswith("transformers"):
            yield from attempt(name, lambda name=name, m=measure: m(name, setup))  # type: ignore[misc]
        else:
            yield from attempt(name, measure)


def not_measured(size: str, device: str, setup: Setup) -> str | None:
    """Return the reason why a step is not measured on a device, if there is one."""
    if setup.small:
        return "not measured: equal to 125M in the sizes of a test" if size == "2b" else None
    return "not measured: it has no accelerator here" if device == "cpu" else None


def configuration(size: str, setup: Setup) -> Config:
    """Return the configuration of a size, 125m or 2b, in bfloat16."""
    overrides = {
        "train.batch_size": ROWS[size],
        "train.sequence_length": SEQUENCE_LENGTH,
        "train.gradient_accumulation_steps": 1,
        "evaluate.every": 0,
    }
    if setup.small:
        overrides |= SMALL
    words = [word for key, value in overrides.items() for word in (f"--{key}", str(value))]
    return load_config(CONFIGS / f"mooshak-{size}.yaml", words)


def random_batch(config: Config) -> Batch[np.ndarray]:
    """Return a batch of random tokens."""
    shape = (config.train.batch_size, config.T + 1)
    tokens_BS = np.random.default_rng(0).integers(0, config.model.vocab_size, shape, np.int32)
    return Batch(np.ascontiguousarray(tokens_BS[:, :-1]), np.ascontiguousarray(tokens_BS[:, 1:]))


def _timed(step: Callable[[], float], setup: Setup) -> tuple[float, float]:
    """Return the median seconds of a step that waits for its loss, and the last loss."""
    for _ in range(WARMUP_STEPS):
        loss = step()
    seconds: list[float] = []
    while len(seconds) < MIN_STEPS or (sum(seconds) < SECONDS and not setup.small):
        start = time.perf_counter()
        loss = step()
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds)), loss


def _figures(name: str, config: Config, seconds: float, loss: float, kind: str) -> Iterator[Row]:
    tokens = config.train.batch_size * config.T
    yield Row(f"{name}: speed", tokens / seconds, "tokens/s")
    peak = peak_flops(kind)
    if peak:
        yield Row(f"{name}: MFU", config.model.flops_per_token(config.T) * tokens / seconds / peak)
    # Random tokens: the loss starts near that of a uniform distribution.
    finite = math.isfinite(loss) and loss < 2 * math.log(config.model.vocab_size)
    yield Row(f"{name}: loss of the last step", loss, "nats", passed=finite)


def _slowest(name: str, seconds: dict[str, float]) -> Iterator[Row]:
    total = sum(seconds.values())
    for operation in sorted(seconds, key=lambda key: -seconds[key])[:N_OPERATIONS]:
        share = seconds[operation] / total if total else 0.0
        yield Row(f"{name}: time in {operation[:60]}", share, "of the step")


def _torch_step(name: str, config: Config, setup: Setup, profile: bool = True) -> Iterator[Row]:
    from mooshak_torch.profile import profiled

    _release_memory()
    step, _ = torch_trainer(config, setup)
    seconds, loss = _timed(step, setup)
    yield from _figures(name, config, seconds, loss, _torch_kind())
    yield _torch_memory(name)
    if profile:
        with profiled(setup.out / "profiles" / f"torch-{name}") as times:
            step()
        yield from _slowest(name, times)


def torch_trainer(config: Config, setup: Setup) -> tuple[Callable[[], float], Any]:
    """Return the trainer's step on a random batch, and its optimizer."""
    import torch

    from mooshak_torch.distributed.mesh import make_parallel
    from mooshak_torch.distributed.parallelize import parallelize
    from mooshak_torch.objectives import make_objective, model_of
    from mooshak_torch.optimizer import Optimizer
    from mooshak_torch.step import set_matmul_precision, train_step

    set_matmul_precision()
    parallel = make_parallel(config, torch.device(setup.torch_device))
    objective: Any = parallelize(make_objective(config.model, config), parallel, config)
    model = model_of(objective)
    torch_random_weights(model)
    optimizer = Optimizer(objective, model, config.optimizer)
    batch = parallel.shard_local_batch(random_batch(config))

    def step() -> float:
        return train_step(objective, optimizer, batch, 1e-4, config, parallel)[0].item()

    return step, optimizer


def torch_random_weights(model: Any) -> None:
    """Fill the matrices with random numbers on the device, and the gains with ones."""
    import torch

    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02) if parameter.ndim == 2 else parameter.fill_(1)


def _release_memory() -> None:
    """Free what an earlier measurement has held, and measure the peak anew."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _torch_kind() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def _torch_memory(name: str) -> Row:
    from mooshak_torch.step import peak_memory

    return Row(f"{name}: peak memory", peak_memory()["memory_bytes"] / 1e9, "GB")


def _torch_plan(config: Config) -> Iterator[Row]:
    from mooshak_torch.planner import plan

    gpu = device_name(_torch_kind()) or "h100-80g"
    predicted = plan(config, gpu, 1, "single")
    parts = ", ".join(f"{part} {size / 1e9:.2f}" for part, size in predicted.memory.items())
    yield Row(f"planned memory ({gpu})", predicted.total / 1e9, "GB", note=parts)


def _transformers_step(config: Config, compiled: bool, name: str, setup: Setup) -> Iterator[Row]:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from mooshak_torch.step import set_matmul_precision

    _release_memory()
    set_matmul_precision()
    device, model_config = torch.device(setup.torch_device), config.model
    llama: Any = LlamaConfig
    with device:
        model: Any = LlamaForCausalLM(
            llama(
                vocab_size=model_config.vocab_size,
                hidden_size=model_config.dim,
                intermediate_size=model_config.hidden_dim,
                num_hidden_layers=model_config.n_layers,
                num_attention_heads=model_config.n_heads,
                max_position_embeddings=config.T,
                attn_implementation="sdpa",
            )
        )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1, fused=True)
    forward = torch.compile(model) if compiled else model
    ids_BT = torch.from_numpy(random_batch(config).tokens).to(device).long()

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16):
            loss = forward(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    seconds, loss = _timed(step, setup)
    yield from _figures(name, config, seconds, loss, _torch_kind())
    yield _torch_memory(name)


def _jax_step(config: Config, setup: Setup) -> Iterator[Row]:
    import jax

    from mooshak_jax.profile import profiled
    from mooshak_jax.step import peak_memory

    start = time.perf_counter()
    step, compiled, _ = jax_trainer(config, setup)
    step()
    yield Row("JAX: compilation and first step", time.perf_counter() - start, "s")
    seconds, loss = _timed(step, setup)
    yield from _figures("JAX", config, seconds, loss, jax.devices()[0].device_kind)
    yield Row("JAX: peak memory", peak_memory()["memory_bytes"] / 1e9, "GB")
    memory = compiled.memory_analysis()
    if memory is not None:
        held = memory.argument_size_in_bytes + memory.temp_size_in_bytes
        held += memory.output_size_in_bytes - memory.alias_size_in_bytes
        yield Row("JAX: memory of the compiled step, by XLA", held / 1e9, "GB")
    with profiled(setup.out / "profiles" / "jax") as times:
        step()
    yield from _slowest("JAX", times)


def jax_trainer(config: Config, setup: Setup) -> tuple[Callable[[], float], Any, Callable[[], Any]]:
    """Return the trainer's step on a random batch, the compiled step, and a function of its state.

    The state is donated to the next step.
    """
    import jax

    from mooshak_jax.distributed.mesh import make_mesh
    from mooshak_jax.step import abstract_state, initial_state, make_train_step
    from mooshak_jax.step import set_matmul_precision as set_precision

    set_precision(config)
    parallel = make_mesh("data=1", jax.devices(setup.jax_device))
    state = initial_state(jax_random_weights(abstract_state(config, parallel)["params"]))
    batch = parallel.shard_local_batch(random_batch(config))
    rate: Any = np.float32(1e-4)
    train_step: Any = make_train_step(config, parallel)
    compiled = train_step.lower(state, batch, rate).compile()

    def step() -> float:
        nonlocal state
        state, loss, _ = compiled(state, batch, rate)
        return float(loss)

    return step, compiled, lambda: state


def jax_random_weights(abstract: Any) -> Any:
    """Return random matrices, made on the device, and gains of ones, as in the tree `abstract`."""
    import jax
    import jax.numpy as jnp

    leaves, tree = jax.tree.flatten(abstract)

    def fill() -> Any:
        keys = jax.random.split(jax.random.key(0), len(leaves))
        values = [
            0.02 * jax.random.normal(key, leaf.shape, leaf.dtype)
            if leaf.ndim > 1
            else jnp.ones(leaf.shape, leaf.dtype)
            for key, leaf in zip(keys, leaves, strict=True)
        ]
        return jax.tree.unflatten(tree, values)

    return jax.jit(fill, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, abstract))()
