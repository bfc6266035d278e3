"""Shared numerics: initial weights, RoPE tables, schedule, sampling noise, bits per byte."""

import math
from dataclasses import replace

import numpy as np
import pytest

from mooshak.config.model import ModelConfig
from mooshak.config.sections import Config, OptimizerConfig, ScheduleConfig, TrainConfig
from mooshak.evaluation.bits_per_byte import bits_per_byte, unigram_nats
from mooshak.numerics.init_weights import initial_weight, standard
from mooshak.numerics.rope import rescaled, rope_tables
from mooshak.numerics.sampling_noise import noise
from mooshak.numerics.schedule import has_weight_decay, learning_rate

MODEL = ModelConfig(vocab_size=128, dim=24, n_layers=2, n_heads=3, hidden_dim=40, max_seq_len=32)
LLAMA = replace(
    MODEL,
    architecture="llama",
    tie_embeddings=True,
    qkv_bias=True,
    wo_bias=True,
    mlp_bias=True,
    qk_norm=True,
    sliding_window=5,
)


def test_initial_weights_depend_on_seed_name_and_element() -> None:
    # Literal values: a change of the generator would orphan every seed in use.
    expected = [0.92875463, -0.39952716, 0.32404594]
    assert np.allclose(standard("0:embeddings.weight", 0, 3), expected, atol=1e-6)
    assert not np.array_equal(standard("0:a", 0, 9), standard("1:a", 0, 9))
    assert not np.array_equal(standard("0:a", 0, 9), standard("0:b", 0, 9))


@pytest.mark.parametrize("rows", [slice(0, 5), slice(7, 23), slice(39, 40), slice(3, 3)])
def test_initial_weights_of_a_slice_equal_the_full_ones(rows: slice) -> None:
    name = "layers.1.mlp.w1.weight"
    assert np.array_equal(
        initial_weight(MODEL, 3, name)[rows], initial_weight(MODEL, 3, name, rows)
    )
    for columns in (slice(0, 5), slice(11, 24), slice(7, 7)):
        assert np.array_equal(
            initial_weight(MODEL, 3, name)[rows, columns],
            initial_weight(MODEL, 3, name, rows, columns),
        )
    gain = initial_weight(MODEL, 3, "layers.1.mlp_norm.weight", gain_std=0.2)
    part = initial_weight(MODEL, 3, "layers.1.mlp_norm.weight", rows, gain_std=0.2)
    assert gain.std() > 0.1 and np.array_equal(gain[rows], part)


def test_initial_weights_have_the_stated_distribution() -> None:
    z = standard("0:x", 0, 400_000)
    assert abs(z.mean()) < 0.01 and abs(z.var() - 1) < 0.01
    assert abs((z**4).mean() - (3 - 6 / 80 * 16 / 15)) < 0.05  # Irwin-Hall: excess -6 / (5 n)
    assert np.array_equal(initial_weight(MODEL, 0, "layers.0.mlp_norm.weight"), np.ones(24))


def test_rope_tables_rotate_by_position_times_frequency() -> None:
    cos, sin = rope_tables(MODEL)
    assert cos.dtype == np.float64 and cos.shape == (32, 4)
    assert math.isclose(cos[5, 1], math.cos(5 * 10000 ** (-2 / 8)), rel_tol=1e-15)
    assert np.allclose(cos**2 + sin**2, 1)


def test_llama3_scaling_slows_only_low_frequencies() -> None:
    frequencies = 2 * np.pi * np.array([1.0, 1 / 8, 1 / 16, 1 / 24, 1 / 32, 1 / 1000])
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    kept = [1, 1, 1 / 3 + 2 / 3 / 8, 1 / 9 + 8 / 9 / 8, 1 / 8, 1 / 8]  # 32, 4, 2, 4/3, 1, 0 turns
    assert np.allclose(rescaled(frequencies, scaling), kept * frequencies, rtol=1e-14)
    linear = {"rope_type": "linear", "factor": 8.0}
    assert np.array_equal(rescaled(frequencies, linear), frequencies / 8)


def schedule(kind: str) -> Config:
    return Config(
        model=MODEL,
        optimizer=OptimizerConfig(learning_rate=1.0),
        schedule=ScheduleConfig(kind=kind, warmup_steps=4, decay_fraction=0.25),
        train=TrainConfig(steps=20),
    )


@pytest.mark.parametrize(
    ("kind", "step", "expected"),
    [
        ("cosine", 0, 0.25),
        ("cosine", 3, 1.0),
        ("cosine", 12, 0.55),
        ("cosine", 20, 0.1),
        ("wsd", 14, 1.0),
        ("wsd", 19, 0.1),
        ("wsd", 20, 0.1),
        ("constant", 19, 1.0),
    ],
)
def test_learning_rate(kind: str, step: int, expected: float) -> None:
    assert math.isclose(learning_rate(schedule(kind), step), expected)


@pytest.mark.parametrize("model", [MODEL, LLAMA], ids=["mooshak", "llama"])
def test_only_matrices_decay(model: ModelConfig) -> None:
    shapes = model.parameter_shapes()
    spared = {name for name in shapes if not has_weight_decay(name)}
    assert spared == {name for name, shape in shapes.items() if len(shape) == 1}


def test_initial_weights_of_llama() -> None:
    assert not initial_weight(LLAMA, 0, "layers.1.attention.wo.bias").any()
    assert initial_weight(LLAMA, 0, "layers.1.attention.wo.bias", gain_std=0.1).any()
    assert (initial_weight(LLAMA, 0, "layers.0.attention.k_norm.weight") == 1).all()
    w2, w1 = (
        initial_weight(LLAMA, 0, f"layers.0.mlp.{name}.weight").std() for name in ("w2", "w1")
    )
    assert math.isclose(w1 / w2, math.sqrt(40 / 24) * 2, rel_tol=0.1)
    assert math.isclose(
        initial_weight(LLAMA, 0, "embeddings.weight").std(), 1 / math.sqrt(24), rel_tol=0.1
    )


def test_flops_count_the_head_once_and_attention_by_its_window() -> None:
    untied = replace(LLAMA, tie_embeddings=False)
    assert untied.flops_per_token(32) == LLAMA.flops_per_token(32)
    assert LLAMA.flops_per_token(32) == LLAMA.flops_per_token(5)
    assert LLAMA.flops_per_token(4) < LLAMA.flops_per_token(5)


def test_noise_is_independent_of_length_and_neighbours() -> None:
    assert np.array_equal(noise(1, 2, 5), noise(1, 2, 50)[:5])
    assert not np.array_equal(noise(1, 2, 5), noise(1, 3, 5))
    assert abs(noise(0, 0, 100_000).mean() - 0.5) < 0.01


def test_bits_per_byte_of_a_uniform_model_over_single_bytes() -> None:
    labels = np.zeros((3, 10), np.int32)
    assert math.isclose(bits_per_byte(30 * math.log(256), labels, np.ones(256, np.int32)), 8.0)


def test_unigram_coder_on_two_equally_frequent_tokens() -> None:
    counts = np.array([10**9, 10**9])
    nats = unigram_nats(counts, np.array([[1, 0, 1]]))
    assert math.isclose(nats, 3 * math.log(2), rel_tol=1e-6)
