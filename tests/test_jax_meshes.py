"""Meshes of JAX on eight CPU devices: the same steps, a part of the memory, any layout from any."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest

from mooshak.config import (
    Config,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    ScheduleConfig,
    TrainConfig,
)
from mooshak.schedule import learning_rate
from mooshak_jax import checkpoint
from mooshak_jax.parallel import make_parallel
from mooshak_jax.train import initial_state, make_train_step

STEPS = 10
MODEL = ModelConfig(
    vocab_size=192, dim=32, n_layers=3, n_heads=8, n_kv_heads=4, hidden_dim=48, max_seq_len=24
)
CONFIG = Config(
    model=MODEL,
    optimizer=OptimizerConfig(learning_rate=1e-2),
    schedule=ScheduleConfig(warmup_steps=2),
    train=TrainConfig(steps=STEPS, batch_size=8, dtype="float64", loss_chunk=40),
)


@pytest.fixture(autouse=True, scope="module")
def float64() -> Iterator[None]:
    with jax.enable_x64():
        yield


def configured(mesh: str, scan: bool = False, fuse: bool = False, **train: Any) -> Config:
    return replace(
        CONFIG,
        model=replace(MODEL, scan_layers=scan, fuse_kernels=fuse),
        train=replace(CONFIG.train, **train),
        parallel=ParallelConfig(mesh=mesh, cpu_devices=8),
    )


def run(config: Config, state: Any = None, first: int = 0) -> tuple[list[float], Any]:
    """The losses of the steps from `first` on, and the last state."""
    parallel = make_parallel(config)
    if state is None:
        state = initial_state(
            checkpoint.initialize(config.model, "float64", 3, 0.2, parallel=parallel)
        )
    step = make_train_step(config, parallel)
    losses = []
    for k in range(first, STEPS):
        batch = np.random.default_rng(k % 2).integers(0, 192, (8, 25), dtype=np.int32)
        state, loss, _ = step(state, parallel.put_whole(batch), learning_rate(config, k))
        losses.append(float(loss))
    return losses, state


@pytest.fixture(scope="module")
def truth(float64: None) -> list[float]:
    losses, _ = run(configured("data=1"))
    assert losses[-1] < losses[0]
    return losses


@pytest.mark.parametrize(
    ("mesh", "options"),
    [
        ("data=1", {"scan": True, "fuse": True, "remat": "dots"}),
        ("data=8", {"scan": True}),
        ("fsdp=8", {}),
        ("fsdp=8", {"scan": True, "fuse": True, "remat": "full"}),
        ("tensor=4", {"fuse": True, "remat": "dots"}),
        ("data=2,tensor=4", {"scan": True}),
        ("data=2,fsdp=2,tensor=2", {"remat": "full"}),
        ("data=2,fsdp=2,tensor=2", {"scan": True, "fuse": True, "remat": "dots"}),
        ("fsdp=2,tensor=-1", {"scan": True, "accumulation": 2}),
    ],
)
def test_every_mesh_and_layout_trains_as_one_device(
    mesh: str, options: dict[str, Any], truth: list[float]
) -> None:
    losses, _ = run(configured(mesh, **options))
    assert losses == pytest.approx(truth, rel=1e-10, abs=0)
