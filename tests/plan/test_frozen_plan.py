"""Plans of adapters, conversations and pairs: FLOPs, memory and traffic of what is trained."""

from dataclasses import replace

import pytest

import mooshak_jax.planner as jax_planner
from mooshak.config.lora import LoraConfig
from mooshak.config.model import ModelConfig
from mooshak.config.sections import Config, DataConfig, ParallelConfig, TrainConfig
from mooshak.plan import executed_flops
from mooshak_torch import planner as torch_planner
from tests.plan.test_plan import BIG


def test_recomputed_flops_are_those_of_the_window() -> None:
    model = ModelConfig("llama", 64, 24, 2, 2, hidden_dim=32, max_seq_len=64, sliding_window=16)
    none, dots = (Config(model, train=TrainConfig(remat=remat)) for remat in ("none", "dots"))
    assert executed_flops(dots) - executed_flops(none) == 8 * 64 * 4 * 2 * 24 * 16


@pytest.mark.slow
def test_frozen_parameters_have_no_gradient_and_no_moments() -> None:
    train = TrainConfig(batch_size=8, dtype="bfloat16")
    model = replace(BIG, scan_layers=False)
    base = Config(model=model, train=train)
    adapted = replace(base, lora=LoraConfig(rank=8), model=replace(model, lora=LoraConfig(rank=8)))
    trained = 4 * 8 * (3 * (256 + 256) + 3 * (256 + 1024))
    # Frozen matrices of the layers are bfloat16; embedding, head and gains float32.
    layers = 2 * 4 * (3 * 256 * 256 + 3 * 256 * 1024)
    others = 4 * (2 * 2048 * 256 + 4 * 2 * 256)
    plan = torch_planner.plan(adapted, "4090-24g", 1, "single")
    assert plan.memory["parameters"] == layers + others + 4 * trained
    assert plan.memory["gradients"] == 4 * trained
    assert plan.memory["optimizer"] == 8 * trained
    full = torch_planner.plan(base, "4090-24g", 1, "single")
    # No product for the gradient of a frozen matrix, three for each adapter's.
    n = 8 * 256
    frozen = layers // 2 + 2048 * 256
    assert full.flops - plan.flops == n * (2 * frozen - 6 * trained)
    sharded = torch_planner.plan(adapted, "4090-24g", 4, "fsdp")
    for part in ("parameters", "gradients", "optimizer"):
        assert sharded.memory[part] == pytest.approx(plan.memory[part] / 4, rel=0.01)
    assert sharded.bytes_sent is not None
    assert sharded.bytes_sent["reduce-scatter"] == pytest.approx(3 / 4 * 4 * trained, rel=0.01)
    preferences = replace(adapted, data=replace(adapted.data, format="preferences"))
    pairs = torch_planner.plan(preferences, "4090-24g", 1, "single")
    assert pairs.memory["activations"] > plan.memory["activations"]


@pytest.mark.slow
def test_plan_of_adapters_compiles_for_absent_tpus() -> None:
    train = TrainConfig(batch_size=8, dtype="bfloat16", remat="full")
    data = DataConfig(format="preferences")
    mesh = ParallelConfig(mesh="fsdp=4")
    config = Config(model=BIG, train=train, lora=LoraConfig(rank=8), data=data, parallel=mesh)
    plan = jax_planner.plan(config, "v5e:2x2")
    assert plan.fits
    full = jax_planner.plan(replace(config, lora=LoraConfig(), model=BIG), "v5e:2x2")
    # Of the adapters, the factors with the sharded dimension are sharded: lora_a, of w2 lora_b.
    adapters = 4 * 4 * 8 * (6 * 256 // 4 + 3 * 256 + 2 * 1024 + 1024)
    frozen = 2 * 4 * (3 * 256 * 256 + 3 * 256 * 1024) + 4 * 2 * 2048 * 256
    norms = 4 * 4 * 2 * 256
    assert plan.memory["parameters"] == frozen // 4 + norms + adapters
    assert plan.memory["optimizer"] == 2 * adapters and plan.total < full.total
    assert sum((plan.bytes_sent or {}).values()) < 0.7 * sum((full.bytes_sent or {}).values())
