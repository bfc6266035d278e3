"""Shared numerics against oracles: initial weights, RoPE tables, schedule, sampling noise."""

import hashlib
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers

from mooshak.config.lora import LoraConfig
from mooshak.config.model import ModelConfig
from mooshak.config.sections import Config, OptimizerConfig, ScheduleConfig, TrainConfig
from mooshak.numerics.init_weights import initial_std, initial_weight, row_norms, standard
from mooshak.numerics.philox import random_words
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


def philox_block(counter: int, key: tuple[int, int]) -> list[int]:
    """Return a block of Philox-4x64-10, from the paper (Salmon et al., SC 2011)."""
    mask = 2**64 - 1
    words, (k0, k1) = [counter, 0, 0, 0], key
    for _ in range(10):
        left, right = 0xD2E7470EE14C6C93 * words[0], 0xCA5A826395121157 * words[2]
        words = [
            (right >> 64) ^ words[1] ^ k0,
            right & mask,
            (left >> 64) ^ words[3] ^ k1,
            left & mask,
        ]
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & mask, (k1 + 0xBB67AE8584CAA73B) & mask
    return words


def blocks_of(stream: str, first: int, count: int) -> list[list[int]]:
    """Return the blocks of a stream. NumPy adds one to the counter before its first block."""
    digest = hashlib.blake2b(stream.encode(), digest_size=16).digest()
    key = int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")
    return [philox_block(first + 1 + index, key) for index in range(count)]


def test_philox_is_that_of_the_paper() -> None:
    # The known answer that its authors publish for counter 0 and key 0.
    assert philox_block(0, (0, 0)) == [
        0x16554D9ECA36314C,
        0xDB20FE9D672D0FDC,
        0xD7E772CEE186176B,
        0x7E68B68AEC7BA23B,
    ]
    for first in (0, 7):
        assert random_words("3:wq", first, 12).reshape(3, 4).tolist() == blocks_of("3:wq", first, 3)


def test_weight_is_the_sum_of_sixteen_uniforms() -> None:
    for value, block in zip(standard("5:x", 2, 9), blocks_of("5:x", 2, 9), strict=True):
        uniforms = [word >> shift & 0xFFFF for word in block for shift in (0, 16, 32, 48)]
        # Mean 65535 / 2 and variance (65536^2 - 1) / 12 each.
        expected = (sum(uniforms) - 524280) / math.sqrt(5726623060)
        assert len(uniforms) == 16 and math.isclose(value, expected, rel_tol=1e-14)


STDS = {
    "mooshak": {
        "embeddings": 1.0,
        "layers.0.attention.wq": 24**-0.5,
        "layers.1.mlp.w1": 24**-0.5,
        "layers.1.mlp.w2": 40**-0.5,
        "lm_head": 0.1 * 24**-0.5,
    },
    "llama": {
        "embeddings": 24**-0.5,
        "layers.0.attention.wq": 24**-0.5,
        "layers.0.attention.wo": 24**-0.5 / 2,
        "layers.1.mlp.w1": 24**-0.5,
        "layers.1.mlp.w2": 40**-0.5 / 2,
    },
}
"""Of two layers, four outputs are summed in the residual stream."""


def test_standard_deviations_are_those_of_the_table() -> None:
    for model in (MODEL, LLAMA):
        for name, std in STDS[model.architecture].items():
            assert math.isclose(initial_std(model, f"{name}.weight"), std, rel_tol=1e-15), name
    adapted = replace(MODEL, lora=LoraConfig(rank=4))
    name = next(name for name in adapted.parameter_shapes() if name.endswith("w2.lora_a.weight"))
    assert math.isclose(initial_std(adapted, name), (3 * 40) ** -0.5)
    z = standard("4:lm_head.weight", 0, 128 * 24).reshape(128, 24)
    weights = initial_weight(MODEL, 4, "lm_head.weight", dtype=np.float64)
    assert np.allclose(weights, 0.1 * 24**-0.5 * z, rtol=1e-15)
    gains = initial_weight(MODEL, 4, "layers.0.mlp_norm.weight", dtype=np.float64, gain_std=0.3)
    assert np.allclose(gains, 1 + 0.3 * standard("4:layers.0.mlp_norm.weight", 0, 24), rtol=1e-15)


def test_row_norms_are_those_of_the_outputs() -> None:
    assert row_norms(np.array([[3, 4], [0, 2], [1, 0]], np.float32)).tolist() == [5, 2, 1]


def test_long_rows_are_one_stream() -> None:
    wide = replace(LLAMA, dim=20_000, tie_embeddings=False)
    z = standard("1:embeddings.weight", 3 * 20_000 + 5, 19_990)
    block = initial_weight(wide, 1, "embeddings.weight", slice(3, 4), slice(5, 19_995))
    assert np.array_equal(block[0], z.astype(np.float32))


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


@pytest.mark.slow
@pytest.mark.parametrize(
    "scaling",
    [
        None,
        {"rope_type": "linear", "factor": 4.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    ],
    ids=["default", "linear", "llama3"],
)
def test_rope_tables_are_those_of_transformers(scaling: dict | None) -> None:
    from transformers.models.llama import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    theirs = LlamaRotaryEmbedding(
        LlamaConfig(
            hidden_size=24,
            num_attention_heads=3,
            head_dim=8,
            max_position_embeddings=32,
            rope_parameters={"rope_type": "default", **(scaling or {}), "rope_theta": 500.0},
        )
    )
    cos, sin = theirs(torch.zeros(1), torch.arange(32)[None])
    tables = rope_tables(replace(LLAMA, rope_theta=500.0, rope_scaling=scaling))
    for ours, half in zip(tables, (cos, sin), strict=True):
        assert np.allclose(ours, half[0, :, :4].numpy(), rtol=0, atol=1e-5)


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


def schedule(kind: str, warmup: int = 4, decay: float = 0.25, total: int = 20) -> Config:
    return Config(
        model=MODEL,
        optimizer=OptimizerConfig(learning_rate=1.0),
        schedule=ScheduleConfig(kind=kind, warmup_steps=warmup, decay_fraction=decay),
        train=TrainConfig(steps=total),
    )


@pytest.mark.parametrize(
    ("kind", "step", "expected"),
    [
        ("cosine", 0, 0.25),
        ("cosine", 3, 1.0),
        ("cosine", 4, 1.0),
        ("cosine", 12, 0.55),
        ("cosine", 16, 0.1 + 0.9 * (1 - 2**-0.5) / 2),
        ("cosine", 20, 0.1),
        ("wsd", 14, 1.0),
        ("wsd", 15, 0.82),
        ("wsd", 18, 0.28),
        ("wsd", 19, 0.1),
        ("wsd", 20, 0.1),
        ("constant", 19, 1.0),
    ],
)
def test_learning_rate(kind: str, step: int, expected: float) -> None:
    assert math.isclose(learning_rate(schedule(kind), step), expected)


def rates(kind: str, *settings: float) -> list[float]:
    """The rates of all steps, and of one more."""
    config = schedule(kind, *settings)  # type: ignore[arg-type]
    return [learning_rate(config, step) for step in range(config.train.steps + 1)]


def test_learning_rate_at_the_ends_of_a_schedule() -> None:
    # Warmup as long as the run: no step is left to decay.
    assert rates("cosine", 4, 0.25, 4)[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates("wsd", 4, 0.25, 4) == [0.25, 0.5, 0.75, 1.0, 0.1]
    assert rates("wsd", 0, 0.25, 1) == [0.1, 0.1] and rates("cosine", 0, 0.25, 1) == [1.0, 0.1]
    # A decay of no step, of less than a step, of all steps.
    assert rates("wsd", 0, 0.0, 5) == [1.0] * 5 + [0.1]
    assert rates("wsd", 0, 0.01, 5) == [1.0] * 4 + [0.1, 0.1]
    assert np.allclose(rates("wsd", 0, 1.0, 4), [0.775, 0.55, 0.325, 0.1, 0.1])
    assert np.allclose(rates("wsd", 2, 1.0, 4), [0.5, 1.0, 0.55, 0.1, 0.1])


def test_learning_rate_is_that_of_transformers() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    cosine = transformers.get_cosine_with_min_lr_schedule_with_warmup(
        optimizer, 4, 20, min_lr_rate=0.1
    )
    # Its step 14 is the last at the peak; ours has the decay end with the last step.
    wsd = transformers.get_wsd_schedule(
        optimizer,
        num_warmup_steps=4,
        num_decay_steps=5,
        num_stable_steps=10,
        min_lr_ratio=0.1,
        decay_type="linear",
    )
    for kind, theirs in (("cosine", cosine), ("wsd", wsd)):
        expected = [theirs.lr_lambdas[0](step) for step in range(4, 21)]
        assert np.allclose(rates(kind)[4:], expected, rtol=1e-14)
    # Their warmup starts at 0, with a step that changes nothing; ours is one step ahead.
    assert rates("cosine")[:4] == [cosine.lr_lambdas[0](step) for step in range(1, 5)]


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


def test_noise_is_the_first_53_bits_of_a_word() -> None:
    words = [word for block in blocks_of("7:3", 0, 2) for word in block]
    assert noise(7, 3, 8).tolist() == [(word >> 11) / 2**53 for word in words]


def test_noise_is_independent_of_length_and_neighbours() -> None:
    assert np.array_equal(noise(1, 2, 5), noise(1, 2, 50)[:5])
    assert not np.array_equal(noise(1, 2, 5), noise(1, 3, 5))
    assert abs(noise(0, 0, 100_000).mean() - 0.5) < 0.01
