"""scripts/guard.py: equal results pass, and a planted change is found and named."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

from guard_compare import COMPARISONS, differences  # noqa: E402
from guard_lower import strip_names  # noqa: E402


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """Two directories of results that are equal."""
    for name in ("base", "head"):
        directory = tmp_path / name / "run"
        directory.mkdir(parents=True)
        (directory / "state.npy").write_text(name)  # A framework's own file: not compared.
        lines = [{"step": step, "loss": 1 / step, "time": id(directory)} for step in (1, 2, 3)]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (directory.parent / "metrics.jsonl").write_text(text)
        (directory.parent / "tokens.txt").write_text("one\ntwo\nthree")
        (directory.parent / "tokenizer.model").write_bytes(b"model")
        np.save(directory.parent / "logits.npy", np.array([[1.0, 0.0], [np.nan, 2.0]]))
        tensors = {"a": np.zeros(3, np.float32), "b": np.ones((2, 2))}
        save_file(tensors, directory.parent / "model.safetensors")
    return tmp_path / "base", tmp_path / "head"


def test_guard_equal_results_have_no_differences(pair: tuple[Path, Path]) -> None:
    assert list(differences(*pair)) == []


def test_guard_finds_last_bit_of_a_metric(pair: tuple[Path, Path]) -> None:
    file = pair[1] / "metrics.jsonl"
    file.write_text(file.read_text().replace("0.3333333333333333", "0.33333333333333337"))
    (line,) = differences(*pair)
    assert line.startswith("metrics.jsonl: loss of step 3: 0.3333333333333333, HEAD 0.333")


def test_guard_finds_missing_step_and_metric(pair: tuple[Path, Path]) -> None:
    file = pair[1] / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:2]))
    assert list(differences(*pair)) == ["metrics.jsonl: 3 steps, HEAD 2"]
    file.write_text("".join(lines).replace("loss", "nll"))
    assert list(differences(*pair)) == ["metrics.jsonl: loss of step 1: 1.0, HEAD None"]


def test_guard_finds_bits_names_and_dtypes_of_tensors(pair: tuple[Path, Path]) -> None:
    a, b = np.zeros(3, np.float32), np.ones((2, 2))
    changed = b.copy()
    changed[1, 0] = np.nextafter(1.0, 2.0)
    for tensors, message in (
        ({"a": a, "b": changed}, "b [1, 0]: np.float64(1.0), HEAD np.float64(1.0000000000000002)"),
        ({"a": a * np.float32(-1), "b": b}, "a [0]: np.float32(0.0), HEAD np.float32(-0.0)"),
        ({"a": a, "c": b}, "2 tensors in one of the two only: b, c"),
        ({"a": a.astype(np.float64), "b": b}, "a: float32 [3], HEAD float64 [3]"),
        ({"a": a, "b": b.reshape(4, 1)}, "b: float64 [2, 2], HEAD float64 [4, 1]"),
    ):
        save_file(tensors, pair[1] / "model.safetensors")
        (line,) = differences(*pair)
        assert line.startswith(f"model.safetensors: {message}")


def test_guard_finds_first_token_and_missing_file(pair: tuple[Path, Path]) -> None:
    (pair[1] / "tokens.txt").write_text("one\nzwei\nthree\nfour")
    (pair[1] / "tokenizer.model").unlink()
    assert list(differences(*pair)) == [
        "tokenizer.model: HEAD has no such file",
        "tokens.txt: line 2 of 3: 'two', HEAD 'zwei'",
    ]
    (pair[1] / "tokens.txt").write_text("one\ntwo\nthree\nfour")
    assert "tokens.txt: 3 lines, HEAD 4" in list(differences(*pair))


def test_guard_compares_every_kind_of_result() -> None:
    assert {".jsonl", ".safetensors", ".gguf", ".npy", ".txt", ".mlir"} <= set(COMPARISONS)


def test_guard_lowered_text_ignores_names_only() -> None:
    jax = pytest.importorskip("jax")

    def lowered(names: tuple[str, str], factor: float) -> str:
        def inner(x: Any) -> Any:
            return jax.lax.with_sharding_constraint(x * factor, sharding).sum()

        inner.__name__ = names[0]

        def outer(tree: dict[str, Any]) -> dict[str, Any]:
            return {names[1]: jax.jit(inner)(tree["x"])}

        outer.__name__ = names[1]
        mesh = jax.sharding.Mesh(jax.devices()[:2], ("data",))
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
        argument = jax.ShapeDtypeStruct((4, 2), jax.numpy.float32)
        return strip_names(jax.jit(outer).lower({"x": argument}).as_text())

    before = lowered(("product", "step"), 2.0)
    assert "product" not in before and "sharding" in before and "@mesh" in before
    assert before == lowered(("matmul", "update"), 2.0)
    assert before != lowered(("product", "step"), 3.0)


@pytest.mark.slow
def test_guard_finds_a_planted_change(tmp_path: Path) -> None:
    def git(*words: object) -> None:
        subprocess.run(["git", "-C", ROOT, *words], check=True, capture_output=True)

    if subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True).returncode:
        pytest.skip("not a git repository")
    tree, scripts = tmp_path / "tree", tmp_path / "scripts"
    # The scripts of the working tree, with one lowered step of four, and a smaller model.
    shutil.copytree(ROOT / "scripts", scripts)
    settings = yaml.safe_load((scripts / "guard.yaml").read_text())
    settings["lowered"] = {"single": {}}
    settings["models"]["mooshak"] |= {"n_layers": 1, "dim": 48, "hidden_dim": 64}
    settings["common"]["optimizer"]["max_grad_norm"] = 0.1
    (scripts / "guard.yaml").write_text(yaml.safe_dump(settings))
    git("worktree", "add", "--detach", tree, "HEAD")
    try:
        guard = [sys.executable, scripts / "guard.py", "HEAD", "--steps", "3"]
        guard += ["--cache", tmp_path / "cache"]
        guard += ["--only", "torch/mooshak/single,lowered/mooshak"]
        equal = subprocess.run(guard, cwd=tree, capture_output=True, text=True)
        assert equal.returncode == 0, equal.stdout + equal.stderr
        file = tree / "mooshak/config/model.py"
        source = file.read_text()
        assert source.count("norm_eps: float = number(1e-5") == 1
        file.write_text(source.replace("number(1e-5", "number(2e-5"))
        changed = subprocess.run(guard, cwd=tree, capture_output=True, text=True)
    finally:
        git("worktree", "remove", "--force", tree)
    assert changed.returncode == 1, changed.stdout + changed.stderr
    found = changed.stdout.splitlines()
    for line in (
        "torch/mooshak/single/metrics.jsonl: ",
        "torch/mooshak/single/weights/model.safetensors: ",
        "torch/mooshak/single/weights/optimizer.safetensors: ",
        "lowered/mooshak/single.mlir: line ",
    ):
        assert any(other.startswith(line) for other in found), line
