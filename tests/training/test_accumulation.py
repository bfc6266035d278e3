"""Gradient accumulation with ignored labels: the denominator counts the global batch."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest
import torch
from document_masks import packed_batch

from mooshak.config.model import ModelConfig
from mooshak.config.sections import Config, OptimizerConfig, ParallelConfig, TrainConfig
from mooshak.data.packing import IGNORE_INDEX, Batch, make_batch
from mooshak_jax import params as jax_params
from mooshak_jax import step as jax_step
from mooshak_jax.distributed import mesh as jax_mesh
from mooshak_torch import step as torch_step
from mooshak_torch.distributed import mesh as torch_mesh

pytestmark = pytest.mark.usefixtures("compiled_in_haste")

STEPS = 3
MODEL = ModelConfig(vocab_size=192, dim=32, n_layers=2, n_heads=4, hidden_dim=48, max_seq_len=24)
CONFIG = Config(
    model=MODEL,
    optimizer=OptimizerConfig(learning_rate=1e-2, max_grad_norm=0.5),
    train=TrainConfig(batch_size=8, dtype="float64", loss_chunk=40),
)
BATCHES = [packed_batch(seed, 8, 24, 192) for seed in range(STEPS)]

Curve = list[tuple[float, float]]
"""Loss and gradient norm of each step."""


@pytest.fixture(autouse=True, scope="module")
def environment() -> Iterator[None]:
    with jax.enable_x64():
        yield


def accumulated(parts: int, **changes: Any) -> Config:
    return replace(
        CONFIG, train=replace(CONFIG.train, gradient_accumulation_steps=parts), **changes
    )


def torch_curve(config: Config, batches: list[Batch] = BATCHES) -> Curve:
    parallel = torch_mesh.make_parallel(config)
    objective, optimizer = torch_step.make_state(config, parallel, None, None)
    curve = []
    for batch in batches:
        batch = parallel.shard_local_batch(batch)
        loss, norm = torch_step.train_step(objective, optimizer, batch, 1e-2, config, parallel)
        curve.append((loss.item(), norm.item()))
    return curve


def jax_curve(config: Config, batches: list[Batch] = BATCHES) -> Curve:
    parallel = jax_mesh.make_parallel(config)
    params = jax_params.initialize(config.model, "float64", 0, parallel=parallel)
    state = jax_step.initial_state(params)
    step = jax_step.make_train_step(config, parallel)
    curve = []
    for batch in batches:
        state, loss, norm = step(state, parallel.shard_local_batch(batch), 1e-2)
        curve.append((float(loss), float(norm)))
    return curve


def distance(found: Curve, truth: Curve) -> float:
    return float(np.max(np.abs(np.array(found) / np.array(truth) - 1)))


@pytest.fixture(scope="module")
def truth(environment: None) -> Curve:
    return torch_curve(accumulated(1))


def test_first_loss_is_the_mean_over_labels_that_count(truth: Curve) -> None:
    objective, _ = torch_step.make_state(CONFIG, torch_mesh.make_parallel(CONFIG), None, None)
    sums, counts = [], []
    for row in BATCHES[0].chunk(8):
        tensors = row.map(lambda array: torch.from_numpy(array).long())
        sums.append(objective(tensors).item())
        counts.append(int((row.labels != IGNORE_INDEX).sum()))
    assert counts[0] == 0 and len(set(counts)) > 4
    assert truth[0][0] == pytest.approx(sum(sums) / sum(counts), rel=1e-13, abs=0)
    # What a mean of each part's mean would be, and a mean over all positions, are far away.
    pairs = [(sums[i] + sums[i + 1]) / (counts[i] + counts[i + 1]) for i in range(0, 8, 2)]
    assert abs(np.mean(pairs) / truth[0][0] - 1) > 1e-6  # Allowed below: 1e-13.
    assert sum(sums) / (8 * 24) < 0.9 * truth[0][0]


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_torch_accumulation_changes_no_loss(parts: int, truth: Curve) -> None:
    assert distance(torch_curve(accumulated(parts)), truth) < 1e-13


@pytest.mark.slow
@pytest.mark.parametrize("parts", [1, 4])
def test_jax_accumulation_changes_no_loss(parts: int, truth: Curve) -> None:
    assert distance(jax_curve(accumulated(parts)), truth) < 1e-13


@pytest.mark.slow
def test_jax_mesh_divides_by_the_labels_of_all_rows(truth: Curve) -> None:
    mesh = ParallelConfig(mesh="data=2,fsdp=2,tensor=2")
    assert distance(jax_curve(accumulated(2, parallel=mesh)), truth) < 1e-12


@pytest.mark.slow
def test_batch_without_counted_labels_has_loss_0() -> None:
    """Such as one in which every token is a document of its own: no division by zero."""
    tokens_BS = np.random.default_rng(0).integers(0, 192, (8, 25), dtype=np.int32)
    empty = make_batch(tokens_BS, np.arange(8 * 25, dtype=np.int32).reshape(8, 25))
    assert torch_curve(CONFIG, [empty]) == jax_curve(CONFIG, [empty]) == [(0.0, 0.0)]


@pytest.mark.slow
def test_evaluation_ignores_labels_in_both_frameworks() -> None:
    """Five rows in batches of three: torch cuts the last one short, JAX pads it."""
    batch = packed_batch(7, 5, 24, 192)
    config = replace(CONFIG, evaluate=replace(CONFIG.evaluate, batch_size=3))
    parallel = torch_mesh.make_parallel(config)
    objective, _ = torch_step.make_state(config, parallel, None, None)

    def nats(rows: Batch) -> float:
        return torch_step.evaluate(objective, rows, config, parallel)["loss"]

    rows, total = [nats(row) for row in batch.chunk(5)], nats(batch)
    assert rows[0] == 0 and total == pytest.approx(sum(rows), rel=1e-13)
    config = replace(config, parallel=ParallelConfig(mesh="data=2"))
    mesh = jax_mesh.make_parallel(config)
    params = jax_params.initialize(MODEL, "float64", 0, parallel=mesh)
    found = jax_step.evaluate(jax_step.make_evaluate(config, mesh), params, batch, config, mesh)
    assert found == {"loss": pytest.approx(total, rel=1e-13)}
