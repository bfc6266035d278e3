"""KV cache of both frameworks: calls at any positions equal the full sequence.

Shapes: B batch, T time, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import mooshak_jax.model
import mooshak_jax.params
import mooshak_torch.model
import mooshak_torch.params
from mooshak.config.model import Dtype, ModelConfig

SIZES = {"vocab_size": 96, "dim": 24, "n_layers": 2, "hidden_dim": 40, "max_seq_len": 32}
MODELS = {
    "mooshak": ModelConfig(**SIZES, n_heads=3),
    "window": ModelConfig(
        **SIZES, architecture="llama", n_heads=4, n_kv_heads=2, head_dim=8, sliding_window=4
    ),
}
LENGTH = 14
"""Slots of the caches."""
TOLERANCE: dict[Dtype, float] = {"float64": 1e-12, "float32": 1e-5}


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


class Decoder:
    """A model of one framework with caches of so many rows."""

    def __init__(self, framework: str, model: str, dtype: Dtype, rows: int):
        self.step, make_caches = {"torch": torch_model, "jax": jax_model}[framework](model, dtype)
        self.caches: list[Any] = make_caches(rows)
        self.model = mooshak_torch.model.Model(MODELS[model], "float64")
        mooshak_torch.params.initialize(self.model, 0, gain_std=0.1)

    @torch.no_grad()
    def full(self, tokens_BT: np.ndarray) -> np.ndarray:
        """Logits [B, T, V] without a cache: those of torch in float64, in every case."""
        logits_BTV: np.ndarray = self.model(torch.from_numpy(tokens_BT)).numpy()
        return logits_BTV

    def call(self, tokens_BT: np.ndarray, starts: Sequence[int]) -> np.ndarray:
        """Logits [B, T, V] of tokens whose rows begin at these positions."""
        positions_BT = np.array(starts)[:, None] + np.arange(tokens_BT.shape[1])
        logits_BTV, self.caches = self.step(tokens_BT, positions_BT, self.caches)
        return logits_BTV

    def truncate(self, lengths: Sequence[int]) -> None:
        self.caches = [layer.truncate(lengths) for layer in self.caches]

    def select(self, rows: Sequence[int]) -> None:
        self.caches = [layer.select(rows) for layer in self.caches]

    @property
    def lengths(self) -> list[list[int]]:
        """Of each layer."""
        return [layer.lengths.tolist() for layer in self.caches]


@cache
def torch_model(name: str, dtype: Dtype) -> tuple[Any, Any]:
    model = mooshak_torch.model.Model(MODELS[name], dtype)
    mooshak_torch.params.initialize(model, 0, gain_std=0.1)

    @torch.no_grad()
    def step(tokens_BT: np.ndarray, positions_BT: np.ndarray, caches: Any) -> tuple[Any, Any]:
        tokens, positions = torch.from_numpy(tokens_BT), torch.from_numpy(positions_BT)
        return model(tokens, positions, caches).numpy(), caches

    return step, lambda rows: mooshak_torch.model.make_caches(model, rows, LENGTH)


@cache
def jax_model(name: str, dtype: Dtype) -> tuple[Any, Any]:
    graphdef = mooshak_jax.params.make_graphdef(MODELS[name], dtype)
    params = mooshak_jax.params.initialize(MODELS[name], dtype, 0, gain_std=0.1)
    model = mooshak_jax.params.merge(graphdef, params)

    @jax.jit
    def step(tokens_BT: Any, positions_BT: Any, caches: Any) -> tuple[Any, Any]:
        caches = list(caches)
        return model(tokens_BT, positions_BT, caches), caches

    return step, lambda rows: mooshak_jax.model.make_caches(model, rows, LENGTH)


def tokens(rows: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 96, (rows, length))


def assert_close(found: np.ndarray, truth: np.ndarray, dtype: Dtype = "float64") -> None:
    found, truth = np.asarray(found), np.asarray(truth)
    assert found.shape == truth.shape
    assert np.linalg.norm(found - truth) <= TOLERANCE[dtype] * np.linalg.norm(truth)


frameworks = pytest.mark.parametrize("framework", ["torch", "jax"])
models = pytest.mark.parametrize("model", MODELS)


@pytest.mark.slow
@frameworks
@models
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("new", [1, 3])
@pytest.mark.parametrize("truncated", [True, False])
def test_cache_rolls_back_exactly(
    framework: str, model: str, dtype: Dtype, rows: int, new: int, truncated: bool
) -> None:
    decoder, accepted_BT = Decoder(framework, model, dtype, rows), tokens(rows, 9)
    truth_BTV = decoder.full(accepted_BT)
    decoder.call(accepted_BT[:, :6], [0] * rows)
    for t in range(6, 12):  # These are rejected.
        decoder.call(tokens(rows, 1, seed=t), [t] * rows)
    assert decoder.lengths == [[12] * rows] * 2
    if truncated:
        decoder.truncate([6] * rows)
        assert decoder.lengths == [[6] * rows] * 2
    for t in range(6, 9, new):
        logits_BTV = decoder.call(accepted_BT[:, t : t + new], [t] * rows)
        assert_close(logits_BTV, truth_BTV[:, t : t + new], dtype)
        assert decoder.lengths == [[t + new] * rows] * 2


@pytest.mark.slow
@frameworks
@models
def test_cache_truncates_each_row_to_its_length(framework: str, model: str) -> None:
    decoder, read_BT, new_BT = (
        Decoder(framework, model, "float64", 3),
        tokens(3, 6),
        tokens(3, 3, 1),
    )
    decoder.call(read_BT, [0, 0, 0])
    decoder.truncate([6, 1, 0])
    decoder.truncate([9, 4, 4])  # It makes no row longer.
    assert decoder.lengths == [[6, 1, 0]] * 2
    logits_BTV = decoder.call(new_BT, [6, 1, 0])
    for row, length in enumerate((6, 1, 0)):
        ids_T = np.concatenate((read_BT[row, :length], new_BT[row]))
        assert_close(logits_BTV[row], decoder.full(ids_T[None])[0, length:])


@pytest.mark.slow
@frameworks
@models
def test_cache_selects_rows(framework: str, model: str) -> None:
    """As beams do: a row may go on in several, and another in none."""
    decoder, read_BT, new_BT = (
        Decoder(framework, model, "float64", 3),
        tokens(3, 5),
        tokens(4, 2, 1),
    )
    decoder.call(read_BT, [0, 0, 0])
    decoder.truncate([5, 3, 4])
    decoder.select([2, 0, 0, 2])
    assert decoder.lengths == [[4, 5, 5, 4]] * 2
    logits_BTV = decoder.call(new_BT, [4, 5, 5, 4])
    for row, (source, length) in enumerate(((2, 4), (0, 5), (0, 5), (2, 4))):
        ids_T = np.concatenate((read_BT[source, :length], new_BT[row]))
        assert_close(logits_BTV[row], decoder.full(ids_T[None])[0, length:])


@pytest.mark.slow
@frameworks
@models
def test_prefill_in_chunks_is_that_at_once(framework: str, model: str) -> None:
    decoder, ids_BT = Decoder(framework, model, "float64", 2), tokens(2, 10)
    truth_BTV = decoder.full(ids_BT)
    for chunk in (slice(0, 4), slice(4, 8), slice(8, 10)):
        logits_BTV = decoder.call(ids_BT[:, chunk], [chunk.start] * 2)
        assert_close(logits_BTV, truth_BTV[:, chunk])


@pytest.mark.slow
@frameworks
@models
@pytest.mark.parametrize("truncated", [True, False])
def test_cache_takes_another_prompt(framework: str, model: str, truncated: bool) -> None:
    decoder, ids_BT = Decoder(framework, model, "float64", 2), tokens(2, 7)
    truth_BTV = decoder.full(ids_BT)
    decoder.call(tokens(2, 9, seed=1), [0, 0])
    assert all(layer.written for layer in decoder.caches)
    if truncated:
        decoder.truncate([0, 0])
        assert not any(layer.written for layer in decoder.caches)
    for chunk in (slice(0, 5), slice(5, 6), slice(6, 7)):
        logits_BTV = decoder.call(ids_BT[:, chunk], [chunk.start] * 2)
        assert_close(logits_BTV, truth_BTV[:, chunk])
        assert all(layer.written for layer in decoder.caches)


@pytest.mark.slow
@frameworks
@models
def test_padded_prompts_of_several_lengths_are_exact(framework: str, model: str) -> None:
    decoder, read_BT, lengths = Decoder(framework, model, "float64", 3), tokens(3, 6), [6, 2, 4]
    padded_BTV = decoder.call(read_BT, [0, 0, 0])
    ids = [read_BT[row, :length] for row, length in enumerate(lengths)]
    for row, length in enumerate(lengths):
        assert_close(padded_BTV[row, :length], decoder.full(ids[row][None])[0])
    for step in range(5):
        new_B1 = tokens(3, 1, seed=step)
        logits_B1V = decoder.call(new_B1, [length + step for length in lengths])
        ids = [np.append(row, new) for row, new in zip(ids, new_B1, strict=True)]
        for row in range(3):
            assert_close(logits_B1V[row, 0], decoder.full(ids[row][None])[0, -1])
    assert decoder.lengths == [[11, 7, 9]] * 2


@models
def test_cache_is_the_same_in_both_frameworks(model: str) -> None:
    ours, theirs = (Decoder(framework, model, "float64", 3) for framework in ("torch", "jax"))
    steps: list[Callable[[Decoder], Any]] = [
        lambda d: d.call(tokens(3, 6), [0, 0, 0]),
        lambda d: d.truncate([6, 2, 3]),
        lambda d: d.call(tokens(3, 3, 1), [6, 2, 3]),
        lambda d: d.select([1, 1, 0]),
        lambda d: d.call(tokens(3, 1, 2), [5, 4, 7]),
        lambda d: d.call(tokens(3, 1, 3), [3, 5, 8]),
    ]
    for step in steps:
        found, expected = step(ours), step(theirs)
        if found is not None:
            assert_close(found, expected)
        assert ours.lengths == theirs.lengths


def test_torch_cache_changes_in_place() -> None:
    (layer, *_) = torch_model("mooshak", "float64")[1](2)
    new = torch.ones(2, 3, 3, 8, dtype=torch.float64)
    assert layer.update(new, new, torch.arange(3).expand(2, 3)) is layer
    assert layer.truncate([2, 1]) is layer and layer.written == 2
    assert layer.select([1]) is layer and layer.k_BSGK.shape[0] == 1


@pytest.mark.slow
def test_jax_decoding_compiles_no_step_per_length() -> None:
    decoder = Decoder("jax", "mooshak", "float64", 5)
    before = decoder.step._cache_size()
    decoder.call(tokens(5, 4), [0] * 5)
    for t in range(4, 9):
        decoder.call(tokens(5, 1), [t] * 5)
        decoder.truncate([t + 1 - t % 2] * 5)
    assert decoder.step._cache_size() == before + 2


def test_jax_cache_is_truncated_in_compiled_code() -> None:
    """There lengths have no values: a cache that becomes empty is read under masks."""
    decoder, ids_BT = Decoder("jax", "mooshak", "float64", 2), tokens(2, 4)
    decoder.call(tokens(2, 5, seed=1), [0, 0])
    truncate = jax.jit(lambda caches, lengths: [layer.truncate(lengths) for layer in caches])
    decoder.caches = truncate(decoder.caches, jnp.array([0, 0]))
    assert decoder.lengths == [[0, 0]] * 2
    assert_close(decoder.call(ids_BT, [0, 0]), decoder.full(ids_BT))


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_position_without_a_slot_is_an_error(framework: str) -> None:
    """JAX would drop the write, and take the last row for a row that is not there."""
    decoder = Decoder(framework, "mooshak", "float64", 2)
    caches = decoder.caches
    k_BTGK = caches[0].k_BSGK[:, :3]
    positions_BT = np.arange(LENGTH - 2, LENGTH + 1)[None].repeat(2, 0)
    arrays = {"torch": torch.from_numpy, "jax": jnp.asarray}[framework]
    with pytest.raises(IndexError):
        caches[0].update(k_BTGK, k_BTGK, arrays(positions_BT))
    with pytest.raises(IndexError):
        caches[0].select([5])
    for lengths in ([3], [3, 3, 3]):
        with pytest.raises(ValueError, match="lengths for"):
            caches[0].truncate(lengths)
    with pytest.raises(IndexError):
        caches[0].truncate([-3, 3])
    assert len(caches[0].select([]).lengths) == 0


@pytest.mark.parametrize("token", [-1, 96, 10_000])
def test_token_outside_of_the_vocabulary_is_an_error(token: int) -> None:
    for framework in ("torch", "jax"):
        decoder = Decoder(framework, "mooshak", "float64", 1)
        model = decoder.model if framework == "torch" else jax_module("mooshak")
        arrays = {"torch": torch.tensor, "jax": jnp.asarray}[framework]
        with pytest.raises(IndexError):
            model(arrays([[1, token]]))
        with pytest.raises((IndexError, RuntimeError)):
            model(arrays([[1] * 33]))


def jax_module(model: str) -> mooshak_jax.model.Model:
    params = mooshak_jax.params.initialize(MODELS[model], "float64", 0)
    return mooshak_jax.params.merge(
        mooshak_jax.params.make_graphdef(MODELS[model], "float64"), params
    )
