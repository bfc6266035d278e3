"""The accelerator report: the full command in small, time limits, failures, missing packages."""

import json
import os
import re
import subprocess
import sys
import zipfile
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from mooshak.config.model import ModelConfig
from mooshak.errors import InputError
from parity import checker
from parity.accelerator import machine, page, wheels
from parity.accelerator.__main__ import main, measure, part_seconds
from parity.accelerator.parts import PARTS
from parity.accelerator.rows import Row, Setup, attempt
from parity.backends import FixedDtype, JaxBackend, TorchBackend
from parity.comparisons import ParityCase
from parity.comparisons.precision import float64_reference, precision
from scripts import collect_wheels

pytestmark = pytest.mark.usefixtures("compiled_in_haste")

MODEL = ModelConfig(vocab_size=48, dim=32, n_layers=2, n_heads=4, hidden_dim=40, max_seq_len=32)


@pytest.mark.slow
def test_report_of_a_cpu_has_every_part_and_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["parity.accelerator", "--out", str(tmp_path), "--minutes", "20", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", words)
    main()  # In this process; its parts are processes.
    report = json.loads((tmp_path / "report.json").read_text())
    failed = [row for rows in report["parts"].values() for row in rows if row["passed"] is False]
    assert not failed
    assert list(report["parts"]) == [part.name for part in PARTS]
    assert report["devices"] == {"torch": "cpu", "jax": "cpu"} and report["small"]
    names = {row["name"] for rows in report["parts"].values() for row in rows}
    for wanted in (
        "logits, JAX from float64, float32",
        "logits of packed documents, float64",
        "eager: speed",
        "compiled: peak memory",
        "JAX: speed",
        "transformers compiled: speed",
        "torch-to-jax from torch",
        "jax from torch on the CPU",
        "PyTorch, bfloat16, 16 rows: decoding",
        "JAX, bfloat16, 1 row: decoding",
        "PyTorch, 125M: tensors that a restore changes",
        "jax to torch to jax: tensors that change",
    ):
        assert wanted in names, wanted
    text = (tmp_path / "report.html").read_text()
    assert "every bound holds" in text and "<svg" in text
    assert not re.search(r"""src=|href="(?!#)|url\((?!#)""", text)  # Self-contained.


@pytest.mark.slow
def test_part_is_ended_after_its_time_with_a_row(tmp_path: Path) -> None:
    rows = list(measure(PARTS[1], _setup(tmp_path), 1.5, os.environ))
    assert [(row.value, row.passed) for row in rows][-1] == ("ended after its 2 seconds", False)
    assert next(measure(PARTS[1], _setup(tmp_path), 0.5, os.environ)).passed is None


def test_parts_share_the_time_the_first_ones_first() -> None:
    total = sum(part.seconds for part in PARTS)
    # On time: its share. Early: what is left over, too.
    assert part_seconds(PARTS, 480, 8) == pytest.approx(PARTS[0].seconds * 480 / total)
    assert part_seconds(PARTS[-1:], 200, 8) == 200
    assert part_seconds(PARTS[1:], 480, 8) > PARTS[1].seconds * 480 / total
    # Late: its share as long as there is time, then what is left.
    assert part_seconds(PARTS, 100, 8) == pytest.approx(PARTS[0].seconds * 480 / total)
    assert part_seconds(PARTS, 3, 8) == 3 and part_seconds(PARTS, -1, 8) == 0


@pytest.mark.slow
def test_part_whose_process_fails_is_a_row(tmp_path: Path) -> None:
    broken = replace(PARTS[0], name="no such part")
    (row,) = measure(broken, _setup(tmp_path), 60, os.environ)
    assert row.passed is False and "exit code 1" in str(row.value)
    assert "ValueError" in (tmp_path / "logs/no such part.log").read_text()


def test_attempt_yields_rows_and_the_reason_of_a_failure() -> None:
    def rows() -> object:
        yield Row("first", 1.0)
        raise RuntimeError("CUDA out of memory\nand more")

    first, last = attempt("step", rows)  # type: ignore[arg-type]
    assert first.value == 1.0
    assert last == Row("step", "RuntimeError: CUDA out of memory", passed=False)


def test_page_shows_a_report_that_was_cut_off(tmp_path: Path) -> None:
    rows = [Row("loss <b>", 0.5, "nats", 0.1, False, "at step 3"), Row("speed", 12345.6)]
    report = {
        "date": "2026-01-01",
        "devices": {"torch": "cuda", "jax": "cpu"},
        "small": False,
        "seconds": {},
    }
    parts = {"machine": [asdict(row) for row in rows]}
    (tmp_path / "report.json").write_text(json.dumps(report | {"parts": parts}))
    text = page.page(tmp_path)
    assert "1 of 1 bounds do not hold" in text and "loss &lt;b&gt;" in text and "12,346" in text
    with pytest.raises(InputError, match=r"has no report\.json"):
        page.page(tmp_path / "absent")


def test_unknown_device_is_refused_by_both_frameworks() -> None:
    with pytest.raises(InputError, match=r"PyTorch runs on cpu and cuda.*tpu"):
        machine.find_devices("tpu")
    assert machine.find_devices("cpu") == ("cpu", "cpu")


@pytest.mark.slow
def test_wheels_of_missing_packages_are_installed(tmp_path: Path) -> None:
    folder = tmp_path / "wheels"
    folder.mkdir()
    _wheel(folder, "mooshak_absent", "VALUE = 7\n")
    _wheel(folder, "numpy", "raise ImportError('replaced')\n")
    environment, rows = wheels.install_missing(folder, tmp_path, os.environ)
    assert [row.name for row in rows] == ["mooshak_absent-1.0-py3-none-any.whl"]
    code = "import mooshak_absent, numpy; print(mooshak_absent.VALUE)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert done.stdout == "7\n", done.stderr
    with pytest.raises(InputError, match="has no wheels"):
        wheels.install_missing(tmp_path / "absent", tmp_path, os.environ)
    (folder / "other_absent-1.0-py3-none-any.whl").write_bytes(b"not a wheel")
    with pytest.raises(InputError, match="pip cannot install"):
        wheels.install_missing(folder, tmp_path, os.environ)


def test_collected_packages_are_those_of_the_project_only(tmp_path: Path) -> None:
    names = collect_wheels.needed("mooshak")
    assert {"grain", "array-record", "jsonargparse", "orbax-checkpoint", "tokenizers"} <= names
    assert not {name for name in names if re.match("torch|jax|nvidia|libtpu|deepspeed", name)}
    (tmp_path / "freeze.txt").write_text("NumPy==2.0\nruamel.yaml==1\n# comment\n\n")
    assert collect_wheels.packages_in(tmp_path / "freeze.txt") == {"numpy", "ruamel-yaml"}


@pytest.mark.slow
def test_low_precision_of_both_exceeds_the_bound_of_the_cpu() -> None:
    source = checker.random_checkpoint(MODEL)
    backends = TorchBackend(source), JaxBackend(source)
    tokens = np.random.default_rng(0).integers(0, 48, (20, 2, 17), dtype=np.int32)
    right = ParityCase(*backends, tokens, 8, on_cpu=backends)
    truth = float64_reference(right)
    assert all(line.passed for line in precision(truth, "float32", right))
    low = (FixedDtype(backend, "bfloat16") for backend in backends)
    lines = list(precision(truth, "float32", ParityCase(*low, tokens, 8, on_cpu=backends)))
    passed = [line.name for line in lines if line.passed]
    # The embeddings are looked up, in any dtype with the same bits but for a rounding.
    assert not [name for name in passed if "embeddings" not in name], passed


def test_failing_comparison_on_a_device_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(case: ParityCase) -> object:
        raise RuntimeError("no kernel image is available")

    monkeypatch.setitem(checker.COMPARISONS, "forward", failing)  # type: ignore[arg-type]
    source = checker.random_checkpoint(MODEL)
    sizes = {"batch": 2, "time": 8, "decode": 4, "controls": False, "floors": False}
    parts = ("forward", "loss")
    lines = list(checker.check(source, parts=parts, devices=("cpu", "cpu"), **sizes))  # type: ignore[arg-type]
    assert [line.passed for line in lines] == [False, True]
    assert lines[0].where == "RuntimeError: no kernel image is available"
    with pytest.raises(RuntimeError, match="no kernel image"):
        list(checker.check(source, parts=parts, **sizes))  # type: ignore[arg-type]


def _setup(out: Path) -> Setup:
    return Setup(out, "cpu", "cpu", small=True)


def _wheel(folder: Path, name: str, code: str) -> None:
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as file:
        file.writestr(f"{name}.py", code)
        info = f"{name}-1.0.dist-info"
        file.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        file.writestr(f"{info}/RECORD", "")
