"""Packed documents: the model computes the same as for each document alone."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from mooshak.config.model import ModelConfig
from mooshak.config.sections import Config, ParallelConfig, TrainConfig
from mooshak_jax import params as jax_params
from mooshak_jax.distributed.mesh import make_parallel as make_jax_parallel
from mooshak_jax.ops.cross_entropy import cross_entropy as jax_cross_entropy
from mooshak_torch import model as torch_model_module
from mooshak_torch.distributed.mesh import make_parallel
from mooshak_torch.distributed.parallelize import parallelize
from mooshak_torch.model import Model, make_caches
from mooshak_torch.objectives import make_objective, model_of
from mooshak_torch.ops.cross_entropy import cross_entropy
from mooshak_torch.params import initialize
from parity.backends import canonical

pytestmark = pytest.mark.usefixtures("compiled_in_haste")

T, VOCABULARY = 22, 48
MOOSHAK = ModelConfig(
    vocab_size=VOCABULARY, dim=24, n_layers=2, n_heads=4, hidden_dim=20, max_seq_len=T
)
LLAMA = replace(
    MOOSHAK,
    architecture="llama",
    n_kv_heads=2,
    head_dim=10,
    qkv_bias=True,
    qk_norm=True,
    tie_embeddings=True,
)
MODELS = {
    "mooshak": MOOSHAK,
    "mooshak grouped": replace(MOOSHAK, n_kv_heads=2),
    "llama": LLAMA,
    "llama window": replace(LLAMA, sliding_window=5),
}
Arrays = dict[str, np.ndarray]


@pytest.fixture(autouse=True, scope="module")
def float64() -> Iterator[None]:
    with jax.enable_x64():
        yield


def lengths_of_rows() -> list[list[int]]:
    """One document of all; documents of one token; random ones, of few lengths: JAX compiles."""
    rng, rows = np.random.default_rng(0), [[T], [1] * T, [1, 13, 8]]
    while len(rows) < 8:
        row = rng.choice([1, 8, 13], size=int(rng.integers(2, 9))).tolist()
        if sum(row) == T and row not in rows:
            rows.append(row)
    return rows


ROWS = lengths_of_rows()
SEGMENTS = np.stack([np.repeat(np.arange(len(row)), row) for row in ROWS])
POSITIONS = np.stack([np.concatenate([np.arange(n) for n in row]) for row in ROWS])
TOKENS, LABELS = np.random.default_rng(1).integers(0, VOCABULARY, (2, len(ROWS), T))


def torch_side(
    model: Model, tokens: np.ndarray, labels: np.ndarray, **where: np.ndarray
) -> np.ndarray:
    """Logits; the gradients of the summed loss are added to those of the parameters."""
    at = {name: torch.from_numpy(array) for name, array in where.items()}
    hidden = model.hidden_states(torch.from_numpy(tokens), **at)
    cross_entropy(hidden, model.head_VD, torch.from_numpy(labels), 16).backward()
    with torch.no_grad():
        logits: np.ndarray = model(torch.from_numpy(tokens), **at).numpy()
    return logits


def torch_model(config: ModelConfig) -> Model:
    return initialize(Model(config, "float64"), 3, gain_std=0.2)


def torch_grads(model: Any) -> Arrays:
    return {name: p.grad.numpy() for name, p in model.named_parameters()}


def jax_side(
    config: ModelConfig,
    tokens: np.ndarray,
    labels: np.ndarray,
    mesh: str = "data=1",
    remat: str = "none",
    **where: np.ndarray,
) -> tuple[np.ndarray, Arrays]:
    """Logits, and gradients of the summed loss by canonical name."""
    parallel = make_jax_parallel(Config(model=config, parallel=ParallelConfig(mesh=mesh)))
    graphdef = jax_params.make_graphdef(config, "float64", remat)
    params = jax_params.initialize(config, "float64", 3, 0.2, parallel=parallel)

    def loss(params: Any, tokens: jax.Array, labels: jax.Array, at: Any) -> Any:
        model = jax_params.merge(graphdef, params)
        hidden = model.hidden_states(tokens, **at)
        total = jax_cross_entropy(hidden, model.head_DV, labels, 16)
        return total, model.logits(hidden)

    def compute(*args: Any) -> Any:
        with parallel.activate():
            return jax.value_and_grad(loss, has_aux=True)(*args)

    rows = parallel.batch_sharding if len(tokens) % parallel.dp_size == 0 else parallel.replicated
    put = [jax.device_put(jnp.asarray(a), rows) for a in (tokens, labels)]
    at = {name: jax.device_put(jnp.asarray(array), rows) for name, array in where.items()}
    (_, logits), grads = jax.jit(compute)(params, *put, at)
    return np.asarray(logits), canonical(grads)


def assert_close(ours: Any, expected: Any) -> None:
    assert np.linalg.norm(ours - expected) <= 1e-12 * np.linalg.norm(expected)


def assert_all_close(ours: Arrays, expected: Arrays) -> None:
    assert ours.keys() == expected.keys()
    for name, array in expected.items():
        assert_close(ours[name], array)


def documents() -> Iterator[tuple[int, slice]]:
    """The row of each document and its place there."""
    for row, lengths in enumerate(ROWS):
        ends = np.cumsum(lengths)
        yield from ((row, slice(end - n, end)) for end, n in zip(ends, lengths, strict=True))


@pytest.fixture(scope="module", params=MODELS)
def config(request: pytest.FixtureRequest) -> ModelConfig:
    return MODELS[request.param]


@pytest.fixture(scope="module")
def alone(config: ModelConfig) -> tuple[np.ndarray, Arrays]:
    """Logits in their place, and summed gradients, of every document alone, in torch."""
    model = torch_model(config)
    logits = np.empty((*TOKENS.shape, VOCABULARY))
    for row, here in documents():
        one = slice(row, row + 1)
        logits[one, here] = torch_side(model, TOKENS[one, here], LABELS[one, here])
    return logits, torch_grads(model)


@pytest.fixture(scope="module")
def packed(config: ModelConfig) -> tuple[np.ndarray, Arrays]:
    """Logits and gradients of the packed rows in torch."""
    model = torch_model(config)
    at = {"positions_BT": POSITIONS, "segments_BT": SEGMENTS}
    return torch_side(model, TOKENS, LABELS, **at), torch_grads(model)


def test_torch_packed_is_unpacked(alone: Any, packed: Any) -> None:
    assert_close(packed[0], alone[0])
    assert_all_close(packed[1], alone[1])


def test_torch_packed_under_one_mask_is_packed(config: ModelConfig, packed: Any) -> None:
    """As on an accelerator: all layers share one mask."""
    masks: list[Any] = []
    attention = torch_model_module.attention

    def recorded(q: Any, k: Any, v: Any, mask: Any) -> Any:
        masks.append(mask)
        return attention(q, k, v, mask)

    model, at = torch_model(config), {"positions_BT": POSITIONS, "segments_BT": SEGMENTS}
    with (
        mock.patch.object(torch_model_module, "needs_document_mask", lambda _: True),
        mock.patch.object(torch_model_module, "attention", recorded),
    ):
        logits = torch_side(model, TOKENS, LABELS, **at)
    assert_close(logits, packed[0])
    assert_all_close(torch_grads(model), packed[1])
    assert len(masks) == 2 * config.n_layers
    assert len({id(mask) for mask in masks}) == 2 and masks[0].dtype == torch.float64


def test_documents_see_each_other_without_segments(config: ModelConfig, alone: Any) -> None:
    model = torch_model(config)
    logits = torch_side(model, TOKENS, LABELS, positions_BT=POSITIONS)
    difference = np.linalg.norm(logits - alone[0], axis=(1, 2))
    assert difference[0] < 1e-12 * np.linalg.norm(alone[0][0])
    assert (difference[1:] > 1e-2 * np.linalg.norm(alone[0][1:], axis=(1, 2))).all()


@pytest.mark.slow
def test_jax_packed_is_torch_packed(config: ModelConfig, packed: Any) -> None:
    logits, grads = jax_side(config, TOKENS, LABELS, positions_BT=POSITIONS, segments_BT=SEGMENTS)
    assert_close(logits, packed[0])
    assert_all_close(grads, packed[1])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mooshak grouped", "llama window"])
def test_jax_packed_is_unpacked(name: str) -> None:
    config = MODELS[name]
    at = {"positions_BT": POSITIONS, "segments_BT": SEGMENTS}
    logits, grads = jax_side(config, TOKENS, LABELS, **at)
    total = {key: np.zeros_like(array) for key, array in grads.items()}
    for length in sorted({n for row in ROWS for n in row}):
        places = [(row, here) for row, here in documents() if here.stop - here.start == length]
        tokens, labels = (np.stack([a[place] for place in places]) for a in (TOKENS, LABELS))
        ours, grads_of_length = jax_side(config, tokens, labels)
        assert_close(np.stack([logits[place] for place in places]), ours)
        for key in total:
            total[key] += grads_of_length[key]
    assert_all_close(grads, total)


@pytest.mark.slow
@pytest.mark.parametrize("config", ["mooshak grouped", "llama window"], indirect=True)
@pytest.mark.parametrize(
    ("mesh", "remat", "layout"),
    [
        ("data=8", "none", {"scan_layers": True}),
        ("fsdp=8", "full", {"fuse_kernels": True}),
        ("tensor=2", "dots", {}),
        ("data=2,fsdp=2,tensor=2", "full", {"scan_layers": True, "fuse_kernels": True}),
        ("data=2,fsdp=2,tensor=2", "none", {}),
    ],
)
def test_jax_packed_on_every_mesh(
    mesh: str, remat: str, layout: dict[str, bool], config: ModelConfig, packed: Any
) -> None:
    at = {"positions_BT": POSITIONS, "segments_BT": SEGMENTS}
    config = replace(config, **layout)
    logits, grads = jax_side(config, TOKENS, LABELS, mesh, remat, **at)
    assert_close(logits, packed[0])
    assert_all_close(grads, packed[1])


@pytest.mark.parametrize("config", ["mooshak grouped", "llama window"], indirect=True)
@pytest.mark.parametrize(
    ("remat", "compiled"),
    [
        ("dots", False),
        ("full", False),
        pytest.param("none", True, marks=pytest.mark.slow),
        pytest.param("dots", True, marks=pytest.mark.slow),
    ],
)
def test_torch_packed_with_remat_and_compile(
    remat: str, compiled: bool, config: ModelConfig, packed: Any
) -> None:
    if compiled and not shutil.which("g++"):
        pytest.skip("torch.compile needs a C++ compiler")
    train = TrainConfig(dtype="float64", remat=remat, compile=compiled)
    run = Config(model=config, train=train)
    model = model_of(parallelize(make_objective(config, run), make_parallel(run), run))
    initialize(model, 3, gain_std=0.2)
    at = {"positions_BT": POSITIONS, "segments_BT": SEGMENTS}
    assert_close(torch_side(model, TOKENS, LABELS, **at), packed[0])
    assert_all_close(torch_grads(model), packed[1])


def test_cache_ignores_segments() -> None:
    model, tokens = torch_model(MOOSHAK), torch.from_numpy(TOKENS)
    segments = torch.from_numpy(SEGMENTS)
    with torch.no_grad():
        logits = model(tokens, None, make_caches(model, *tokens.shape), segments_BT=segments)
        assert torch.equal(logits, model(tokens))
