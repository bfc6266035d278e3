"""Conversion from and to checkpoints of any processes, mesh and layout, bit for bit."""

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import torch
import torch.distributed.checkpoint as dcp

from mooshak.checkpoints import base, safetensors
from mooshak.checkpoints.base import FULL_SLICE, MOMENTS, Checkpoint
from mooshak.config.model import ModelConfig
from mooshak.config.parse import dump_config
from mooshak.config.sections import Config, ParallelConfig, TrainConfig
from mooshak_jax import checkpoint
from mooshak_jax.distributed.mesh import make_parallel
from parity import checker
from parity.backends import canonical
from parity.convert import convert, describe, open_any

pytestmark = pytest.mark.slow

MODEL = ModelConfig(
    vocab_size=192, dim=32, n_layers=3, n_heads=8, n_kv_heads=4, hidden_dim=48, max_seq_len=24
)
LAYOUTS = [
    ("data=1", False, False),
    ("data=8", True, False),
    ("fsdp=8", False, True),
    ("data=2,fsdp=2,tensor=2", True, True),
    ("data=2,fsdp=2,tensor=2", False, False),
]
"""Mesh of eight devices, scan_layers, fuse_kernels."""


def same(read: Mapping[str, np.ndarray], truth: Checkpoint) -> None:
    assert set(read) == set(truth.tensors)
    for key in truth.tensors:
        assert read[key].tobytes() == truth.read(key).tobytes(), key


def arrays(state: Mapping[str, object]) -> dict[str, np.ndarray]:
    """A state of the JAX side by canonical key."""
    return {
        name if part == "params" else f"{part}.{name}": np.ascontiguousarray(array)
        for part in ("params", *MOMENTS)
        for name, array in canonical(state[part]).items()
    }


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A training state as DCP, in blocks that no device's part ends with."""
    drawn = checker.random_checkpoint(MODEL)
    shapes = MODEL.parameter_shapes()
    tensors = {
        prefix + name: (np.dtype(np.float32), shape)
        for prefix in ("", *(f"{moment}." for moment in MOMENTS))
        for name, shape in shapes.items()
    }

    def read(key: str, rows: slice = FULL_SLICE) -> np.ndarray:
        name = key.removeprefix("exp_avg.").removeprefix("exp_avg_sq.")
        return (drawn.read(name, rows) * len(key)).astype(np.float32)

    state = {"format_version": 1, "step": 3, "seed": 1}
    source = replace(drawn, tensors=tensors, trainer_state=state, read=read)
    path = tmp_path_factory.mktemp("meshes")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(base, "CHUNK_BYTES", 900)
        safetensors.write_checkpoint(path / "state", source)
        convert(path / "state", path / "torch", "torch")
    return open_any(path / "torch")


@pytest.mark.parametrize(("mesh", "scan", "fuse"), LAYOUTS)
def test_conversion_of_any_jax_mesh_and_layout(
    mesh: str,
    scan: bool,
    fuse: bool,
    truth: Checkpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(base, "CHUNK_BYTES", 1000)
    model = replace(MODEL, scan_layers=scan, fuse_kernels=fuse)
    train = TrainConfig(batch_size=8, sequence_length=24)
    parallel = make_parallel(Config(model=model, train=train, parallel=ParallelConfig(mesh=mesh)))
    convert(truth.path, tmp_path / "jax", "jax")
    state = checkpoint.restore(model, "float32", open_any(tmp_path / "jax"), parallel)
    assert max(len(leaf.sharding.device_set) for leaf in jax.tree.leaves(state)) == len(
        parallel.mesh.devices.flat
    )
    same(arrays(state), truth)
    # As the trainer saves it, it goes everywhere.
    (tmp_path / "saved").mkdir()
    checkpoint.start_saving(state, tmp_path / "saved")()
    base.write_description(tmp_path / "saved", MODEL, truth.trainer_state)
    for to in ("torch", "jax", "safetensors"):
        convert(tmp_path / "saved", tmp_path / to / "copy", to)
        copy = open_any(tmp_path / to / "copy")
        same({key: copy.read(key) for key in copy.tensors}, truth)
        assert copy.trainer_state == truth.trainer_state


@pytest.fixture(scope="module")
def run_config(tiny_config: Config, tiny_tokenizer: object, tmp_path_factory: object) -> Path:
    """A run of three steps of a model in which two processes have parts of every tensor."""
    from mooshak.data.shards import load_or_prepare_shards

    config = replace(
        tiny_config,
        model=replace(tiny_config.model, hidden_dim=50),
        train=replace(tiny_config.train, steps=3),
        evaluate=replace(tiny_config.evaluate, every=0),
        checkpoint=replace(tiny_config.checkpoint, every=1, keep=3),
    )
    load_or_prepare_shards(config, progress=False)
    path: Path = tmp_path_factory.mktemp("run") / "config.yaml"  # type: ignore[attr-defined]
    path.write_text(dump_config(config))
    return path


def run(*command: object) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu"}
    arguments = [sys.executable, "-m", *map(str, command)]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=200, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]


def losses(directory: Path) -> list[str]:
    return (directory / "metrics.jsonl").read_text().splitlines()


def test_conversion_of_two_fsdp_ranks(run_config: Path, tmp_path: Path) -> None:
    torchrun = ("torch.distributed.run", "--standalone", "--nproc-per-node", 2, "-m")
    train = (*torchrun, "mooshak_torch.train", "--config", run_config, "--mesh", "fsdp=2")
    run(*train, "--run.dir", tmp_path / "run")
    written = tmp_path / "run" / "checkpoints" / "2"
    assert describe(written)["written_by"]["processes"] == 2
    assert len(list((written / "dcp").glob("*.distcp"))) == 2
    # What DCP itself reads is the truth.
    source = open_any(written)
    names = {key if key.startswith(MOMENTS) else f"params.{key}": key for key in source.tensors}
    whole = {name: torch.zeros(source.tensors[key][1]) for name, key in names.items()}
    dcp.load(whole, checkpoint_id=written / "dcp", no_dist=True)
    path = written
    for step, to in enumerate(("jax", "safetensors", "torch")):
        convert(path, tmp_path / f"{step}" / "2", to)
        path = tmp_path / f"{step}" / "2"
        copy = open_any(path)
        for name, key in names.items():
            assert copy.read(key).tobytes() == whole[name].numpy().tobytes(), key
    # The ranks go on from what has been everywhere as if it had stayed.
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    for step in (2, 3):
        shutil.rmtree(tmp_path / "again" / "checkpoints" / str(step))
    shutil.copytree(path, tmp_path / "again" / "checkpoints" / "2")
    run(*train, "--run.dir", tmp_path / "again")
    ours, theirs = (open_any(tmp_path / d / "checkpoints" / "3") for d in ("again", "run"))
    for key in theirs.tensors:
        assert ours.read(key).tobytes() == theirs.read(key).tobytes(), key


def test_conversion_of_two_jax_processes(run_config: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "mooshak_jax.train", "--config", str(run_config)]
    command += ["--run.dir", str(tmp_path / "run"), "--mesh", "fsdp=2,tensor=2"]
    command += ["--model.scan_layers", "true", "--model.fuse_kernels", "true"]
    command += ["--train.stop_after_step", "1", "--parallel.coordinator_address", coordinator]
    command += ["--parallel.num_processes", "2"]
    pair = [
        subprocess.Popen(
            [*command, "--parallel.process_id", str(i)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for i in range(2)
    ]
    told = [process.communicate(timeout=200)[0] for process in pair]
    assert [process.returncode for process in pair] == [0, 0], told
    written = tmp_path / "run" / "checkpoints" / "1"
    mesh = "fsdp=2,tensor=2"
    facts = describe(written)
    assert facts["written_by"] == {"framework": "jax", "processes": 2, "mesh": mesh}
    # What Orbax itself reads is the truth.
    convert(written, tmp_path / "torch", "torch")
    orbax, reader = (written / "orbax").absolute(), ocp.PyTreeCheckpointer()
    tree = reader.metadata(orbax).item_metadata.tree
    on_host = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    whole = arrays(reader.restore(orbax, restore_args=on_host))
    copy = open_any(tmp_path / "torch")
    assert set(whole) == set(copy.tensors)
    for key, array in whole.items():
        assert copy.read(key).tobytes() == array.tobytes(), key
