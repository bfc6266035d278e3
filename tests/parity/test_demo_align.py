"""The demo of fine-tuning and alignment, in full on a tiny model, and its report."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mooshak.config.parse import load_config
from mooshak.corpus.tasks import task_records
from parity.align_report import read, summary

pytestmark = pytest.mark.slow

TASKS = {"sft": "questions", "dpo": "right_answer,asked_language", "grpo": "known_answers"}
MORE = {"grpo": "grpo: {num_generations: 2, max_completion_length: 4}\n"}


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Configurations of a tiny model, with the names of those of the demo."""
    here = tmp_path_factory.mktemp("configs")

    def sources(kind: str, path: str) -> str:
        return "".join(
            f'    - {{name: {tag}, kind: {kind}, path: "{path}", language: {tag}, documents: 40}}\n'
            for tag in ("hi", "en")
        )

    common = "schedule: {warmup_steps: 1}\nrun: {tensorboard: false}\n"
    (here / "demo.yaml").write_text(
        "model: {vocab_size: 512, dim: 24, n_layers: 1, n_heads: 2, hidden_dim: 40}\n"
        f"tokenizer: {{path: {here}/tokenizer.model, vocab_size: 512}}\n"
        f"data:\n  dir: {here}/tokens\n  validation_fraction: 0.1\n  sources:\n"
        + sources("tales", "")
        + common
        + "train: {batch_size: 2, sequence_length: 64}\nevaluate: {every: 0}\n"
    )
    for name, tasks in TASKS.items():
        (here / f"demo-align-{name}.yaml").write_text(
            "data:\n  validation_fraction: 0.3\n  sources:\n"
            + sources("tasks", tasks)
            + common
            + MORE.get(name, "")
            + "train: {steps: 4, batch_size: 2, sequence_length: 400}\n"
            "checkpoint: {every: 2}\nevaluate: {every: 2, sequences: 2}\n"
        )
    return here


def run(module: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)], capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def demo(configs: Path) -> Path:
    """The directory of a whole run; so small a model misses its goals."""
    out = configs / "out"
    words = ("--configs", configs, "--out", out, "--base_steps", 2, "--count", 3)
    done = run("parity.demo_align", *words)
    assert done.returncode == 1, done.stdout[-2000:] + done.stderr[-3000:]
    assert "missed: SFT: exact match, Hindi: 0.0%, of 80.0%" in done.stdout
    return out


def test_demo_runs_every_stage_and_reports(demo: Path) -> None:
    results = read(demo)
    assert list(results.scores) == ["base", "sft", "dpo", "grpo"]
    for found in results.scores.values():
        assert {tag: score["questions"] for tag, score in found.items()} == {"hi": 3, "en": 3}
        assert all(score["pairs"] == 3 for score in found.values())
    steps = [*results.curves["sft torch"], *results.curves["sft jax"]]
    assert steps == [1, 2, 3, 4] and list(results.curves["sft validation"]) == [2, 4]
    assert list(results.curves["dpo hi"]) == [2, 4]
    assert list(results.curves["grpo reward"]) == [1, 2, 3, 4]
    assert results.seen == 0
    page = (demo / "report.html").read_text()
    assert page.count("<svg") == 1 and "#0102" not in page
    assert not re.search(r"<(script|link|img)|url\((?!#)|@import|src=", page)
    for stage in results.stages.values():
        if stage["name"] != "report":
            assert stage["words"][0] in page
    for goal in results.goals:
        assert page.count(goal.text) == (1 if goal.passed else 2)
    document = json.loads((demo / "report.json").read_text())
    assert document == json.loads(json.dumps(summary(results)))
    assert not document["passed"] and document["scores"] == results.scores


def test_second_call_runs_only_the_report(configs: Path, demo: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (demo / "stages").iterdir()}
    words = ("--configs", configs, "--out", demo, "--base_steps", 2, "--count", 3)
    done = run("parity.demo_align", *words)
    assert done.returncode == 1 and done.stdout.count("done before") == 9
    assert before == {path: path.stat().st_mtime_ns for path in (demo / "stages").iterdir()}


def write_answers(out: Path, stage: str, shares: dict[str, float]) -> None:
    """Write answers to 100 questions of each language, of which this share is right."""
    rows = [
        {
            "prompt": [{"role": "user", "content": f"{tag} {i}"}],
            "answer": "a",
            "language": tag,
            "text": "b",
            "is_right": i < 100 * share,
        }
        for tag, share in shares.items()
        for i in range(100)
    ]
    (out / f"answers-{stage}.jsonl").write_text("\n".join(map(json.dumps, rows)))


def test_goals_decide_the_exit_code(demo: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(demo, out)
    for stage, share in (("base", 0.0), ("sft", 0.9), ("dpo", 0.88), ("grpo", 0.91)):
        write_answers(out, stage, {"hi": share, "en": share})
    lines = (out / "dpo/metrics.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])
    last |= {f"validation_rewards/accuracies_{tag}": 0.95 for tag in ("hi", "en")}
    (out / "dpo/metrics.jsonl").write_text("\n".join([*lines[:-1], json.dumps(last)]))
    done = run("parity.align_report", out)
    assert done.returncode == 0 and "all 8 goals are reached" in done.stdout
    assert "failed" not in (out / "report.html").read_text().split("</style>")[1]
    write_answers(out, "dpo", {"hi": 0.9, "en": 0.87})
    write_answers(out, "grpo", {"hi": 0.9, "en": 0.95})
    done = run("parity.align_report", out)
    assert done.returncode == 1 and done.stdout == (
        "missed: GRPO: exact match, Hindi: 90.0%, of 91.0%\n"
        "missed: DPO: exact match, English: 87.0%, of 88.0%\n"
    )
    (out / "dpo/metrics.jsonl").unlink()
    done = run("parity.align_report", out)
    assert done.returncode == 2 and done.stderr.startswith("error: ")


def test_questions_of_the_training_are_left_out(demo: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(demo, out)
    source = load_config(demo / "dpo/config.yaml").data.sources[0]
    trained = next(task_records(source))["prompt"]
    for stage in ("base", "sft", "dpo", "grpo"):
        path = out / f"answers-{stage}.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        rows[0] |= {"prompt": trained, "is_right": True}
        path.write_text("\n".join(map(json.dumps, rows)))
    results = read(out)
    assert results.seen == 1 and results.scores["sft"]["hi"]["questions"] == 2
    assert results.scores["sft"]["hi"]["exact_match"] == 0.0
