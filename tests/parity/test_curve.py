"""Loss curves of full runs in both frameworks, with changes between them, on a tiny model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from parity.curve import NEGATIVE_CONTROL, NOISE_FLOORS, PAIRS, RUNS, compare

WORDS = "एक चूहा और a mouse जंगल में in the forest शेर से मिला met a lion".split()


@pytest.mark.slow
@pytest.mark.usefixtures("compiled_in_haste")
def test_loss_curves_agree_across_frameworks(tmp_path: Path) -> None:
    lines = [json.dumps({"text": " ".join([*WORDS[i % 7 :], str(i)])}) for i in range(400)]
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    (tmp_path / "tiny.yaml").write_text(f"""
model: {{vocab_size: 320, dim: 24, n_layers: 2, n_heads: 3, hidden_dim: 40, max_seq_len: 32}}
tokenizer: {{path: {tmp_path}/tokenizer.model, vocab_size: 320}}
data:
  dir: {tmp_path}/tokens
  sources: [{{name: text, kind: jsonl, path: "{tmp_path}/text.jsonl"}}]
optimizer: {{learning_rate: 1.0e-2}}
schedule: {{warmup_steps: 2}}
train: {{batch_size: 4}}
""")
    words = ["--config", tmp_path / "tiny.yaml", "--steps", 8, "--switch", 4, "--out", tmp_path]
    command = [sys.executable, "-m", "parity.curve", *map(str, words), "--dtypes", "float64"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "curve.json").read_text())
    assert report["passed"] and len(report["lines"]) == 4
    for line in report["lines"]:
        assert line["measured"] <= line["allowed"] < line["negative_control"], line
    assert len(report["losses"]["float64"]["torch to JAX"]) == 8
    assert "<svg" in (tmp_path / "curve.html").read_text()
    # Whole runs are used again; one that is cut short is not.
    metrics = tmp_path / "float64/torch-to-JAX/metrics.jsonl"
    whole = tmp_path / "float64/torch/metrics.jsonl"
    times, text = whole.stat().st_mtime_ns, metrics.read_text()
    metrics.write_text(text.splitlines()[0] + "\n")
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0, again.stdout + again.stderr
    assert whole.stat().st_mtime_ns == times
    assert len(metrics.read_text().splitlines()) == 4


def test_float32_tolerance_is_twice_the_noise_floor() -> None:
    curves = {run.name: {1: 3.0, 2: 2.0} for run in RUNS}
    curves[NOISE_FLOORS[0][1]] = {1: 3.0, 2: 2.0 + 2**-20}
    curves[NEGATIVE_CONTROL[1]] = {1: 3.0, 2: 2.5}
    curves[PAIRS[1][1]] = {1: 3.0, 2: 2.0 - 2**-19}
    assert all(line.passed for line in compare("float32", curves))
    curves[PAIRS[1][1]] = {1: 3.0, 2: 2.0 - 2**-18}
    failed = [line for line in compare("float32", curves) if not line.passed]
    assert {(line.first, line.second) for line in failed} >= {PAIRS[1]}
    assert {(line.measured, line.step, line.allowed) for line in failed} == {(2**-18, 2, 2**-19)}
