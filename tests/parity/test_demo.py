"""The demo: in full on a tiny model, its stages one by one, and failing stages."""

import json
import re
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from parity.demo import PROMPTS
from parity.report import Curve, read_samples
from parity.stages import Stage, carry_out

STEPS = 12


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration of a tiny model on text that begins like the demo's prompts."""
    here = tmp_path_factory.mktemp("demo")
    for language, starts in (("hi", PROMPTS[0::2]), ("en", PROMPTS[1::2])):
        lines = [
            json.dumps({"text": f"{starts[i % 2]} {i}\n" + f"{starts[1 - i % 2]}. " * 6})
            for i in range(300)
        ]
        (here / f"{language}.jsonl").write_text("\n".join(lines))
    (here / "tiny.yaml").write_text(f"""
model: {{vocab_size: 448, dim: 24, n_layers: 2, n_heads: 3, hidden_dim: 40, max_seq_len: 64}}
tokenizer: {{path: {here}/tokenizer.model, vocab_size: 440}}
data:
  dir: {here}/tokens
  validation_fraction: 0.1
  sources:
    - {{name: hindi, kind: jsonl, language: hi, path: "{here}/hi.jsonl"}}
    - {{name: english, kind: jsonl, language: en, path: "{here}/en.jsonl"}}
optimizer: {{learning_rate: 1.0e-2}}
schedule: {{warmup_steps: 2}}
train: {{steps: {STEPS}, batch_size: 4}}
evaluate: {{every: 6, sequences: 6, batch_size: 4}}
run: {{progress: false, tensorboard: false}}
""")
    return here / "tiny.yaml"


def run(module: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)], capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def demo(config: Path) -> Path:
    """The directory of a whole demo."""
    out = config.parent / "out"
    done = run("parity.demo", "--config", config, "--out", out)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return out


@pytest.mark.slow
def test_torch_evaluates_the_checkpoint_of_a_jax_mesh(demo: Path) -> None:
    """The run's configuration says data=2, which in PyTorch needs torchrun."""
    words = ("mooshak_torch.evaluate", demo / f"jax/checkpoints/{STEPS}", "--json")
    found = run(*words, "--evaluate.sequences", 0)
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout) == json.loads((demo / "evaluation-torch.json").read_text())
    refused = run(*words, "--mesh", "data=2")
    assert refused.returncode == 2 and "needs 2 processes" in refused.stderr


@pytest.mark.slow
def test_report_is_complete_and_self_contained(demo: Path) -> None:
    page = (demo / "report.html").read_text()
    assert "its loss curve did not notice" in re.sub(r"\s+", " ", re.sub("<[^>]*>", "", page))
    assert page.count("<svg") == 1 and "#0102" not in page
    assert not re.search(r"<(script|link|img)|url\((?!#)|@import|src=", page)
    for stage in ("mooshak_torch.train", "mooshak_jax.train", "parity.convert", "parity.check"):
        assert f"<i>python -m {stage}</i>" in page
    for prompt in PROMPTS:
        assert page.count(f"<b>{prompt}</b>") == 2
    for framework in ("torch", "jax"):
        scores = json.loads((demo / f"evaluation-{framework}.json").read_text())
        assert all(f"{scores[tag]['bits_per_byte']:.6f}" in page for tag in ("hi", "en"))
    lines = json.loads((demo / "parity" / "report.json").read_text())["lines"]
    assert all(line["name"] in page for line in lines)
    assert "verdict fail" not in page and page.count("verdict pass") == len(lines) + 2


@pytest.mark.slow
def test_second_call_runs_only_missing_stages(config: Path, demo: Path) -> None:
    again = run("parity.demo", "--config", config, "--out", demo)
    assert again.returncode == 0 and "0 stages run" in again.stdout
    (demo / "report.html").unlink()
    again = run("parity.demo", "--config", config, "--out", demo)
    assert again.returncode == 0 and "1 stages run" in again.stdout
    assert (demo / "report.html").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["loss", "float64 loss", "missing step", "text", "parity"])
def test_report_fails_when_something_differs(fault: str, demo: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(demo, out)
    metrics = out / ("float64-jax" if fault == "float64 loss" else "jax") / "metrics.jsonl"
    lines = metrics.read_text().splitlines()
    code, reason = 1, "differs by"
    if fault == "missing step":
        del lines[2]
        code, reason = 2, "do not fit together"
    elif fault.endswith("loss"):
        line = json.loads(lines[2])
        line["loss"] *= 1 + (1e-11 if fault == "float64 loss" else 1e-4)
        lines[2] = json.dumps(line)
    elif fault == "text":
        text = (out / "samples-jax.txt").read_text()
        (out / "samples-jax.txt").write_text(text.rstrip() + "!\n\n")
        reason = "texts of both frameworks differ"
    else:
        parity = json.loads((out / "parity" / "report.json").read_text())
        parity["lines"][0]["passed"] = False
        (out / "parity" / "report.json").write_text(json.dumps(parity))
        reason = "parity.check: weights of SOURCE and OTHER"
    metrics.write_text("\n".join(lines))
    done = run("parity.report", out)
    assert done.returncode == code and reason in done.stdout + done.stderr
    assert len((done.stdout + done.stderr).splitlines()) == 1
    assert code == 2 or 'class="failed"' in (out / "report.html").read_text()


@pytest.fixture
def copies(tmp_path: Path) -> list[Stage]:
    """Two stages: each copies a JSON file, the second one what the first has made."""
    (tmp_path / "source.json").write_text('{"a": 1}')
    out = tmp_path / "out"
    out.mkdir()
    names = [tmp_path / "source.json", out / "first.json", out / "second.json"]
    return [
        Stage(target.stem, target.stem, ("json.tool", str(source), str(target)), (target,))
        for source, target in pairwise(names)
    ]


@pytest.mark.slow
def test_stage_is_rerun_only_when_its_inputs_change(copies: list[Stage], tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert carry_out(copies, out, "one configuration") == 2
    assert carry_out(copies, out, "one configuration") == 0
    assert carry_out(copies, out, "another configuration") == 2
    (out / "second.json").write_text("{")  # Cut short.
    assert carry_out(copies, out, "another configuration") == 1
    assert json.loads((out / "second.json").read_text()) == {"a": 1}
    (out / "stages" / "first.json").write_text("{")
    assert carry_out(copies, out, "another configuration") == 1
    changed = Stage("first", "first", (*copies[0].words, "--sort-keys"), copies[0].makes)
    assert carry_out([changed, copies[1]], out, "another configuration") == 2


@pytest.mark.slow
def test_broken_stage_leaves_no_stamp(copies: list[Stage], tmp_path: Path) -> None:
    out = tmp_path / "out"
    carry_out(copies, out, "")
    (out / "first.json").write_text("{")
    source = tmp_path / "source.json"
    source.write_text("not JSON")
    with pytest.raises(SystemExit) as stop:
        carry_out(copies, out, "")
    assert stop.value.code == 1
    assert not (out / "stages" / "first.json").exists()
    source.write_text('{"a": 1}')
    assert carry_out(copies, out, "") == 1


@pytest.mark.slow
def test_stage_without_its_files_fails(copies: list[Stage], tmp_path: Path) -> None:
    out = tmp_path / "out"
    stage = Stage("first", "first", copies[0].words, (*copies[0].makes, out / "more"))
    with pytest.raises(SystemExit, match="more was not written"):
        carry_out([stage], out, "")
    assert not list((out / "stages").glob("*"))


def test_curve_with_a_nan_loss_fails() -> None:
    curve = Curve({1: 3.0}, {2: float("nan"), 3: 2.0}, {2: 2.5, 3: 2.0}, False, 2e-5)
    assert not curve.passed and curve.exact == 1


def test_samples_are_split_by_their_prompts(tmp_path: Path) -> None:
    texts = ["चूहा\n\nआया।", "A mouse\n\nA\n", "A mouse"]
    (tmp_path / "t.txt").write_text("".join(f"{text}\n\n" for text in texts))
    samples = read_samples(tmp_path / "t.txt", tmp_path / "t.txt", ["चूहा", "A m", "A mouse"])
    assert [sample.torch for sample in samples] == ["\n\nआया।", "ouse\n\nA", ""]
    assert [sample.language for sample in samples] == ["hi", "en", "en"]


@pytest.mark.slow
def test_bad_input_ends_in_one_line(config: Path, tmp_path: Path) -> None:
    for module, *arguments, reason in (
        ("parity.demo", "--config", config, "--train.stepz", 3, "did you mean train.steps"),
        ("parity.demo", "--config", tmp_path / "no.yaml", "no.yaml"),
        ("parity.demo", "--config", config, "--train.batch_size", 3, "choose even numbers"),
        ("parity.report", tmp_path, "does not hold a complete demo"),
    ):
        done = run(module, *arguments)
        assert done.returncode == 2 and reason in done.stderr
        assert len(done.stderr.splitlines()) == 1
