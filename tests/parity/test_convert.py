"""Conversion: exact, readable by the framework tools, verified, atomic, in little memory."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.numpy import load_file

from benchmarks.conversion import measure, model_of, random_state
from mooshak.checkpoints import base, safetensors
from mooshak.checkpoints.base import FULL_SLICE, MOMENTS, Checkpoint
from mooshak.config.model import ModelConfig
from mooshak.errors import InputError
from mooshak.files import LOCK
from parity import checker
from parity import convert as conversion
from parity.convert import convert, open_any

MODEL = ModelConfig(vocab_size=192, dim=24, n_layers=2, n_heads=3, hidden_dim=40, max_seq_len=48)
KINDS = ("torch", "jax", "safetensors")
STATE = {
    "format_version": 1,
    "step": 17,
    "seed": 3,
    "written_by": {"framework": "torch", "processes": 2, "mesh": "fsdp=2"},
    "schedule": {"name": "cosine"},
    "data": {"sources": [{"name": "hindi"}], "batch_size": 4, "sequence_length": 32},
}


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A training state in the interchange format."""
    drawn = checker.random_checkpoint(MODEL)
    tensors = {
        key: (np.dtype(np.float32), shape)
        for prefix in ("", *(f"{moment}." for moment in MOMENTS))
        for key, shape in ((prefix + n, s) for n, s in MODEL.parameter_shapes().items())
    }

    def read(key: str, rows: slice = FULL_SLICE) -> np.ndarray:
        name = key.removeprefix("exp_avg.").removeprefix("exp_avg_sq.")
        return (drawn.read(name, rows) * len(key)).astype(np.float32)

    source = replace(drawn, tensors=tensors, trainer_state=STATE, read=read)
    path = tmp_path_factory.mktemp("conversion") / "state"
    safetensors.write_checkpoint(path, source)
    return safetensors.open_checkpoint(path)


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable:
    """Runs the command, which must end with exit code 2 and one line; returns the line."""

    def run(*arguments: object) -> str:
        monkeypatch.setattr("sys.argv", ["parity.convert", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            conversion.main()
        assert stopped.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line.removeprefix("error: ")

    return run


def same(a: Checkpoint, b: Checkpoint) -> None:
    """Asserts that two checkpoints hold the same bits, state and checksums."""
    assert list(a.tensors.items()) == list(b.tensors.items())
    assert (a.model, a.trainer_state, a.checksums) == (b.model, b.trainer_state, b.checksums)
    assert len(a.checksums) == len(a.tensors)
    for key in a.tensors:
        assert np.array_equal(a.read(key).view(np.uint8), b.read(key).view(np.uint8)), key


@pytest.mark.slow
@pytest.mark.parametrize("block", [1000, 1 << 24], ids=["many blocks", "one block"])
def test_conversion_between_every_pair_is_exact(
    state: Checkpoint, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "CHUNK_BYTES", block)
    for first in KINDS:
        convert(state.path, tmp_path / first, first)
        for second in KINDS:
            target = tmp_path / f"{first}-{second}"
            assert convert(tmp_path / first, target, second) == state.n_bytes
            assert open_any(target).format == second
            same(open_any(target), state)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("block", [1000, 1 << 24], ids=["many blocks", "one block"])
def test_framework_tools_restore_what_is_written(
    state: Checkpoint, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "CHUNK_BYTES", block)
    convert(state.path, tmp_path / "jax", "jax")
    tree = ocp.PyTreeCheckpointer().restore((tmp_path / "jax" / "orbax").absolute())
    kernel = tree["params"]["layers"]["1"]["mlp"]["w1"]["kernel"]
    assert kernel.dtype == np.float32
    assert np.array_equal(kernel, state.read("layers.1.mlp.w1.weight").T)
    moment = tree["exp_avg_sq"]["embeddings"]["embedding"]
    assert np.array_equal(moment, state.read("exp_avg_sq.embeddings.weight"))
    gain = tree["exp_avg"]["layers"]["0"]["output_norm"]["scale"]
    assert np.array_equal(gain, state.read("exp_avg.layers.0.output_norm.weight"))

    convert(state.path, tmp_path / "torch", "torch")
    tensors = {
        name: torch.zeros(shape)
        for key, (_, shape) in state.tensors.items()
        for name in [key if key.startswith(MOMENTS) else f"params.{key}"]
    }
    dcp.load(tensors, checkpoint_id=tmp_path / "torch" / "dcp", no_dist=True)
    for name, tensor in tensors.items():
        assert np.array_equal(tensor.numpy(), state.read(name.removeprefix("params."))), name

    weights = load_file(state.path / "model.safetensors")
    assert set(weights) == set(MODEL.parameter_shapes())
    for key, weight in weights.items():
        assert np.array_equal(weight, state.read(key)), key


@pytest.mark.parametrize("kind", KINDS)
def test_weights_in_another_dtype(state: Checkpoint, kind: str, tmp_path: Path) -> None:
    convert(state.path, tmp_path / "start", kind)
    for dtype in ("bfloat16", "float16", "float64"):
        convert(tmp_path / "start", tmp_path / dtype, kind, dtype, weights_only=True)
        cast = open_any(tmp_path / dtype)
        assert not cast.has_optimizer and cast.trainer_state is None
        for key, (stored, _) in cast.tensors.items():
            assert stored.name == dtype
            assert np.array_equal(cast.read(key), state.read(key).astype(stored)), key
    convert(tmp_path / "start", tmp_path / "half", kind, "bfloat16")
    half = open_any(tmp_path / "half")
    assert {key: dtype.name for key, (dtype, _) in half.tensors.items()} == {
        key: "float32" if key.startswith(MOMENTS) else "bfloat16" for key in state.tensors
    }


def test_shards(state: Checkpoint, tmp_path: Path, refused: Callable) -> None:
    convert(state.path, tmp_path / "cut", "safetensors", shard_size=20_000)
    same(open_any(tmp_path / "cut"), state)
    for name in ("model", "optimizer"):
        index = json.loads((tmp_path / "cut" / f"{name}.safetensors.index.json").read_text())
        files = sorted(path.name for path in (tmp_path / "cut").glob(f"{name}-*"))
        assert len(files) > 2 and files[0] == f"{name}-00001-of-{len(files):05}.safetensors"
        assert sorted(set(index["weight_map"].values())) == files
        sizes = [sum(a.nbytes for a in load_file(tmp_path / "cut" / f).values()) for f in files]
        assert max(sizes) <= 20_000 and sum(sizes) == index["metadata"]["total_size"]
    # The whole again is the file that was never cut.
    convert(tmp_path / "cut", tmp_path / "whole", "safetensors", shard_size=10**9)
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (state.path / name).read_bytes()
    lost = tmp_path / "cut" / files[1]
    lost.unlink()
    line = refused(tmp_path / "cut", tmp_path / "no")
    assert f"{lost} is missing, with tensor exp_avg." in line
    assert not (tmp_path / "no").exists()


def flip(path: Path, tensor: np.ndarray) -> None:
    """Change one bit of the tensor where it stands in the files of a checkpoint."""
    part = tensor.tobytes()[1000:1400]
    (file,) = (f for f in path.rglob("*") if f.is_file() and part in f.read_bytes())
    content = bytearray(file.read_bytes())
    content[content.index(part) + 100] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("kind", KINDS)
def test_flipped_bit_is_found(
    state: Checkpoint, kind: str, tmp_path: Path, refused: Callable
) -> None:
    convert(state.path, tmp_path / "start", kind)
    flip(tmp_path / "start", state.read("lm_head.weight"))
    for to in KINDS:
        line = refused(tmp_path / "start", tmp_path / "no", "--to", to)
        inside = {"torch": "dcp", "jax": "orbax", "safetensors": "model.safetensors"}[kind]
        assert str(tmp_path / "start" / inside) in line
        assert "tensor lm_head.weight is damaged: its checksum is" in line
        assert not (tmp_path / "no").exists()
    with pytest.raises(InputError, match=r"lm_head\.weight is damaged"):
        open_any(tmp_path / "start").read("lm_head.weight")


@pytest.mark.parametrize("to", KINDS)
def test_conversion_verifies_before_it_renames(
    state: Checkpoint, to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = base.verify

    def damaged(checkpoint: Checkpoint) -> None:
        flip(checkpoint.path, state.read("exp_avg.lm_head.weight"))
        original(checkpoint)

    for module in (base, safetensors):
        monkeypatch.setattr(module, "verify", damaged)
    with pytest.raises(InputError, match=r"exp_avg\.lm_head\.weight is damaged"):
        convert(state.path, tmp_path / "out", to)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("to", KINDS)
def test_conversion_needs_room_on_the_disk(
    state: Checkpoint, to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(InputError, match=r"needs .* GB and the disk has"):
        convert(state.path, tmp_path / "full", to)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("to", KINDS)
def test_conversion_without_direct_io(
    state: Checkpoint, to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> int:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    def open_(path: str, flags: int, *arguments: int, **names: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return original(path, flags, *arguments, **names)

    original = os.open
    monkeypatch.setattr(os, "preadv", refuse)
    monkeypatch.setattr(os, "open", open_)
    convert(state.path, tmp_path / "out", to)
    same(open_any(tmp_path / "out"), state)


def converting(source: Path, target: Path, to: str, first: str = "") -> subprocess.Popen[str]:
    """A conversion in a process of its own, which executes `first` before it."""
    call = f"convert(Path({str(source)!r}), Path({str(target)!r}), {to!r})"
    lines = [
        "import os, signal, sys, resource",
        "from pathlib import Path",
        "from mooshak.checkpoints import base, checksums, safetensors",
        "from mooshak.errors import command",
        "from parity.convert import convert",
        "die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)",
        first,
        f"command(lambda: {call})()",
    ]
    return subprocess.Popen(
        [sys.executable, "-c", "\n".join(lines)],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


MOMENTS_OF_DEATH = {
    "in the middle of the tensors": (
        "base.CHUNK_BYTES = 1000\n"
        "left = [20]\n"
        "original = checksums.Checksums.add\n"
        "def add(*arguments):\n"
        "    left[0] -= 1\n"
        "    return original(*arguments) if left[0] else die()\n"
        "checksums.Checksums.add = add"
    ),
    "before it is read back": "safetensors.verify = die",
    "before it has its name": "Path.rename = die",
    "after it has its name": "Path.unlink = die",
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("to", "moment"),
    [
        *(("safetensors", moment) for moment in MOMENTS_OF_DEATH),
        *((kind, "in the middle of the tensors") for kind in ("torch", "jax")),
    ],
)
def test_kill_leaves_the_source_usable(
    state: Checkpoint, to: str, moment: str, tmp_path: Path
) -> None:
    shutil.copytree(state.path, tmp_path / "older")
    process = converting(state.path, tmp_path / "out", to, MOMENTS_OF_DEATH[moment])
    error = process.communicate(timeout=120)[1]
    assert process.returncode == -signal.SIGKILL, error
    complete = moment == "after it has its name"
    assert (tmp_path / "out").exists() == complete
    assert (tmp_path / ".out.unfinished").exists() != complete
    same(open_any(state.path), open_any(tmp_path / "older"))
    if complete:
        same(open_any(tmp_path / "out"), state)
    else:
        (tmp_path / ".out.unfinished" / "folder").mkdir()  # Of another kind, perhaps.
        convert(state.path, tmp_path / "out", to)
        same(open_any(tmp_path / "out"), state)
        assert {path.name for path in tmp_path.iterdir()} == {"older", "out"}
        assert not (tmp_path / "out" / LOCK).exists() and not (tmp_path / "out/folder").exists()


@pytest.mark.slow
def test_destination_is_written_by_one_process(state: Checkpoint, tmp_path: Path) -> None:
    waiting = "safetensors.verify = lambda _: (print(file=sys.stderr, flush=True), input())"
    process = converting(state.path, tmp_path / "out", "safetensors", waiting)
    try:
        assert process.stderr is not None
        process.stderr.readline()
        with pytest.raises(InputError, match=r"another process is writing .*/out"):
            convert(state.path, tmp_path / "out", "torch")
        assert (tmp_path / ".out.unfinished" / "model.safetensors").is_file()
    finally:
        process.kill()
        process.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("to", KINDS)
def test_full_disk_ends_in_one_line(state: Checkpoint, to: str, tmp_path: Path) -> None:
    """The limit on the size of files stands for it: the write fails in the middle."""
    full = "resource.setrlimit(resource.RLIMIT_FSIZE, (18_000, 18_000))"
    process = converting(state.path, tmp_path / "out", to, full)
    error = process.communicate(timeout=120)[1]
    assert process.returncode == 2, error
    assert error.splitlines()[-1].startswith("error: ") and "Traceback" not in error
    assert "File too large" in error and "free some space" in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_conversion_takes_little_memory(tmp_path: Path) -> None:
    """Memory does not grow with the state: 400 MB here, with an embedding of 43 MB."""
    first = tmp_path / "safetensors"
    safetensors.write_checkpoint(first, random_state(model_of(400_000_000)))
    for source, to in (("safetensors", "torch"), ("torch", "jax"), ("jax", "torch")):
        target = tmp_path / f"{to}-of-{source}"
        memory = measure(tmp_path / source, target, to)["anon_bytes"]
        assert memory < 200 << 20, (source, to, memory)
        if (tmp_path / to).exists():
            shutil.rmtree(target)
        else:
            target.rename(tmp_path / to)


def test_description_of_a_checkpoint(
    state: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    convert(state.path, tmp_path / "weights", "jax", "bfloat16", weights_only=True)
    facts = conversion.describe(state.path)
    n_parameters = sum(int(np.prod(shape)) for shape in MODEL.parameter_shapes().values())
    assert facts["kind"] == "safetensors" and facts["parameters"] == n_parameters
    assert (facts["step"], facts["seed"], facts["dtype"]) == (17, 3, ["float32"])
    assert facts["optimizer_bytes"] == 2 * facts["weight_bytes"] == 8 * n_parameters
    assert facts["checksums"] == facts["tensors"] == 3 * len(MODEL.parameter_shapes())
    assert facts["missing"] == ["validation_loss", "tokenizer.model"]
    conversion.print_description(facts)
    shown = capsys.readouterr().out
    assert "torch, 2 processes, mesh fsdp=2" in shown and "hindi; 4 sequences of 32" in shown
    facts = conversion.describe(tmp_path / "weights")
    assert facts["kind"] == "jax" and facts["dtype"] == ["bfloat16"]
    assert facts["missing"] == ["optimizer", "trainer_state.json", "tokenizer.model"]
    conversion.print_description(facts)
    assert "optimizer, trainer_state.json, tokenizer.model" in capsys.readouterr().out
    assert json.loads(json.dumps(facts)) == facts


@pytest.mark.parametrize(("text", "size"), [("2GB", 2 * 10**9), ("1.5 MiB", 3 << 19), ("7", 7)])
def test_sizes(text: str, size: int) -> None:
    assert conversion.size_in_bytes(text) == size


def test_incompatible_options_are_refused(
    state: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for arguments in (
        (state.path,),
        (state.path, tmp_path / "no", "--to", "jax", "--shard-size", "2GB"),
        (state.path, tmp_path / "no", "--shard-size", "two"),
    ):
        monkeypatch.setattr("sys.argv", ["parity.convert", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            conversion.main()
        assert stopped.value.code == 2
    assert os.listdir(tmp_path) == []
