"""JAX meshes of eight CPU devices: equal steps, sharded memory, checkpoints between layouts."""

import functools
import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from mooshak.checkpoints import base
from mooshak.checkpoints.base import MOMENTS
from mooshak.config.model import ModelConfig
from mooshak.config.sections import (
    Config,
    OptimizerConfig,
    ParallelConfig,
    ScheduleConfig,
    TrainConfig,
)
from mooshak.data.packing import make_batch
from mooshak.errors import InputError
from mooshak.numerics.init_weights import initial_weight
from mooshak.numerics.schedule import learning_rate
from mooshak_jax import checkpoint, param_names, params
from mooshak_jax.decode import generate
from mooshak_jax.distributed.mesh import make_parallel
from mooshak_jax.step import initial_state, make_train_step

pytestmark = pytest.mark.slow

STEPS = 10
MODEL = ModelConfig(
    vocab_size=192, dim=32, n_layers=2, n_heads=8, n_kv_heads=4, hidden_dim=48, max_seq_len=24
)
NAMES = list(MODEL.parameter_shapes())
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
        parallel=ParallelConfig(mesh=mesh),
    )


def run(
    config: Config, state: Any = None, first: int = 0, end: int = STEPS
) -> tuple[list[float], Any]:
    """The losses of the steps from `first` up to `end`, and the last state."""
    parallel = make_parallel(config)
    if state is None:
        state = initial_state(params.initialize(config.model, "float64", 3, 0.2, parallel=parallel))
    step = make_train_step(config, parallel)
    losses = []
    for k in range(first, end):
        batch = make_batch(np.random.default_rng(k % 2).integers(0, 192, (8, 25), dtype=np.int32))
        state, loss, _ = step(state, parallel.shard_global_batch(batch), learning_rate(config, k))
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
        ("data=8", {"scan": True}),
        ("fsdp=8", {}),
        ("fsdp=8", {"scan": True, "fuse": True, "remat": "full"}),
        ("tensor=4", {"fuse": True, "remat": "dots"}),
        ("data=2,fsdp=2,tensor=2", {"remat": "full"}),
        ("data=2,fsdp=2,tensor=2", {"scan": True, "fuse": True, "remat": "dots"}),
        ("fsdp=2,tensor=2", {"scan": True, "gradient_accumulation_steps": 2}),
    ],
)
def test_every_mesh_and_layout_trains_as_one_device(
    mesh: str, options: dict[str, Any], truth: list[float]
) -> None:
    losses, _ = run(configured(mesh, **options))
    assert losses == pytest.approx(truth, rel=1e-10, abs=0)


@pytest.mark.parametrize("mesh", ["data=1", "data=2,fsdp=2,tensor=2"])
def test_generating_does_not_change_training(mesh: str) -> None:
    config = configured(mesh)
    losses, state = run(config, end=5)
    first, changed = run(config, end=2)
    generate(params.make_graphdef(config.model, "float64"), changed["params"], [[1, 2, 3], [4]], 8)
    rest, changed = run(config, changed, first=2, end=5)
    assert [*first, *rest] == losses
    for there, here in zip(jax.tree.leaves(changed), jax.tree.leaves(state), strict=True):
        assert np.array_equal(there, here)


def test_query_chunks_change_no_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    truth, _ = run(llama("data=1"), first=8)
    monkeypatch.setattr("mooshak_jax.ops.attention.QUERY_CHUNK", (7, 7))
    assert run(llama("data=1"), first=8)[0] == pytest.approx(truth, rel=1e-13, abs=0)


def llama(mesh: str, **layout: bool) -> Config:
    """Every kind of parameter, of sizes that differ; head width x heads is not the width."""
    model = ModelConfig(
        architecture="llama",
        vocab_size=192,
        dim=24,
        n_layers=2,
        n_heads=8,
        n_kv_heads=2,
        head_dim=6,
        hidden_dim=20,
        max_seq_len=24,
        tie_embeddings=True,
        qkv_bias=True,
        wo_bias=True,
        mlp_bias=True,
        qk_norm=True,
        sliding_window=9,
        **layout,
    )
    return replace(CONFIG, model=model, parallel=ParallelConfig(mesh=mesh))


def test_llama_with_all_options_trains_on_a_mesh() -> None:
    alone, _ = run(llama("data=1"), first=6)
    losses, _ = run(llama("data=2,fsdp=2,tensor=2", scan_layers=True, fuse_kernels=True), first=6)
    assert losses == pytest.approx(alone, rel=1e-10, abs=0)


@pytest.mark.parametrize(
    ("mesh", "parts"), [("fsdp=8", 8), ("tensor=4", 4), ("data=2,fsdp=2,tensor=2", 4)]
)
@pytest.mark.parametrize("layout", [False, True], ids=["plain", "scanned and fused"])
def test_device_holds_its_shard_of_the_state(mesh: str, parts: int, layout: bool) -> None:
    config = configured(mesh, scan=layout, fuse=layout)
    parallel = make_parallel(config)
    state = initial_state(params.initialize(config.model, "float64", 0, parallel=parallel))
    held: Counter[Any] = Counter()
    for array in jax.tree.leaves({key: state[key] for key in ("params", *MOMENTS)}):
        for shard in array.addressable_shards:
            held[shard.device] += shard.data.nbytes
    # Gains are whole on every device; all else is cut into as many parts as the mesh has.
    sizes = {name: math.prod(shape) for name, shape in MODEL.parameter_shapes().items()}
    gains = sum(size for name, size in sizes.items() if "norm" in name)
    expected = 3 * 8 * (gains + (sum(sizes.values()) - gains) // parts)
    assert set(held.values()) == {expected} and len(held) == parallel.mesh.size


LAYOUTS = [
    ("data=1", False, False),
    ("fsdp=8", True, False),
    ("data=2,tensor=4", False, True),
    ("data=2,fsdp=2,tensor=2", True, True),
]


def test_checkpoint_restores_on_every_mesh_bit_for_bit(
    tmp_path: Path,
) -> None:
    models = [replace(MODEL, scan_layers=scan, fuse_kernels=fuse) for _, scan, fuse in LAYOUTS]
    meshes = [make_parallel(configured(mesh)) for mesh, _, _ in LAYOUTS]
    truth = {
        kind: {n: initial_weight(MODEL, seed, n, dtype=np.float32, gain_std=0.2) for n in NAMES}
        for seed, kind in enumerate(("params", *MOMENTS))
    }
    for i, (model, mesh) in enumerate(zip(models, meshes, strict=True)):
        state = {
            kind: params.initialize(model, "float32", seed, 0.2, mesh)
            for seed, kind in enumerate(truth)
        }
        (tmp_path / str(i)).mkdir()
        checkpoint.start_saving(state, tmp_path / str(i))()
        base.write_description(tmp_path / str(i), MODEL, None)
    for i in range(len(LAYOUTS)):
        source = checkpoint.open_checkpoint(tmp_path / str(i))
        source = replace(source, read=functools.cache(source.read))
        for model, mesh in zip(models, meshes, strict=True):
            restored = checkpoint.restore(model, "float32", source, mesh)
            for kind, tree in restored.items():
                for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
                    for part in param_names.canonical_tensors(path, leaf.shape):
                        values = part.canonical(np.asarray(leaf))
                        assert np.array_equal(values, truth[kind][part.name]), (i, part.name)


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ("fsdp=5", "train.batch_size 8 is not divisible by mesh data=1 x fsdp=5"),
        ("tensor=8", "model.n_kv_heads 4 is not divisible by tensor=8"),
        ("data=-1,tensor=-1", "only one axis may be -1"),
        ("model=2", "expected axis=size with the axes data, fsdp, tensor"),
        ("fsdp=4", "model.dim 30 is not divisible by fsdp=4"),
        ("data=2", "mesh data=2 is not divisible by parallel.num_slices 4"),
    ],
)
def test_mesh_that_does_not_fit_is_refused(mesh: str, message: str) -> None:
    model = replace(MODEL, dim=30, head_dim=None, n_heads=15, n_kv_heads=5)
    config = configured(mesh)
    if "dim" in message:
        config = replace(config, model=model)
    if "slices" in message:
        config = replace(config, parallel=replace(config.parallel, num_slices=4))
    with pytest.raises(InputError, match=re.escape(message)):
        make_parallel(config)


def test_data_axis_spans_slices() -> None:
    config = configured("data=2,fsdp=4")
    config = replace(config, parallel=replace(config.parallel, num_slices=2))
    ids = [[d.id for d in row] for row in make_parallel(config).mesh.devices.reshape(2, 4)]
    assert ids == [[0, 1, 2, 3], [4, 5, 6, 7]]
