"""Write `report.html` and `report.json` about a model that was fine-tuned and aligned.

Reads the files that the stages of `parity.demo_align` wrote to DIRECTORY. Exits 1 when a goal is
missed.

python -m parity.align_report runs/demo-align
python -m parity.align_report runs/seed-1
"""

import json
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from mooshak.command_line import command_parser
from mooshak.config.parse import load_config
from mooshak.corpus.tasks import task_records
from mooshak.errors import InputError, command
from mooshak.files import write_atomically
from mooshak.numerics.preference import ACCURACY
from mooshak.report.html import COLORS, TEMPLATES, svg, themed
from mooshak.training.metrics import read_metrics

NAMES = {"base": "base model", "sft": "after SFT", "dpo": "after DPO", "grpo": "after GRPO"}
"""Stage that is measured -> its title, in order."""
LANGUAGES = {"hi": "Hindi", "en": "English"}
MATCH, PREFERENCE, LOST = 0.8, 0.9, 0.02
"""Least exact match after SFT, least reward accuracy after DPO, most exact match that DPO loses."""
SAMPLES = 4
"""Questions of each language that the page shows."""

Curve = dict[int, float]
Scores = dict[str, dict[str, dict[str, float]]]
"""Stage -> language -> measure -> value."""


@dataclass(frozen=True)
class Goal:
    """The goal of a stage in a language."""

    text: str
    measured: float
    wanted: float

    @property
    def passed(self) -> bool:
        return self.measured >= self.wanted - 1e-9  # Differences of shares are rounded.


@dataclass(frozen=True)
class Results:
    """The contents of the page."""

    directory: Path
    stages: dict[str, dict[str, Any]]
    """The stamps of the stages, by name."""
    scores: Scores
    curves: dict[str, Curve]
    answers: dict[str, list[dict[str, Any]]]
    """Stage -> the held-out questions with its answers."""
    seen: int
    """Questions that are left out, because their prompt is among those of the training."""

    @property
    def goals(self) -> list[Goal]:
        """Return the goals of all stages."""
        return [goal for tag in LANGUAGES for goal in self._goals(tag)]

    def _goals(self, tag: str) -> Iterator[Goal]:
        name = LANGUAGES[tag]
        matched = {stage: found[tag]["exact_match"] for stage, found in self.scores.items()}
        yield Goal(f"SFT: exact match, {name}", matched["sft"], MATCH)
        accuracy = self.curves[f"dpo {tag}"]
        yield Goal(
            f"DPO: reward accuracy on held-out pairs, {name}", accuracy[max(accuracy)], PREFERENCE
        )
        yield Goal(f"DPO: exact match, {name}", matched["dpo"], matched["sft"] - LOST)
        # Above SFT by a question at least.
        more = 1 / self.scores["grpo"][tag]["questions"]
        yield Goal(f"GRPO: exact match, {name}", matched["grpo"], matched["sft"] + more)

    @property
    def samples(self) -> dict[str, list[list[dict[str, Any]]]]:
        """Return, of each language, questions with the answers of all stages in order."""
        found = {}
        for tag in LANGUAGES:
            rows = [list(row) for row in zip(*self.answers.values(), strict=True)]
            own = [row for row in rows if row[0]["language"] == tag]
            # Those whose answers change the most often, first.
            own.sort(key=lambda row: -sum(a["text"] != b["text"] for a, b in pairwise(row)))
            found[tag] = own[:SAMPLES]
        return found

    def command(self, name: str) -> str:
        """Return the shell command of a stage."""
        return shlex.join(["python", "-m", *self.stages[name]["words"]])


def read(directory: Path) -> Results:
    """Read the output directory of the stages. Raises `InputError` when one is missing."""
    try:
        stamps = [json.loads(p.read_text("utf-8")) | {"name": p.stem}
                  for p in (directory / "stages").glob("*.json")]  # fmt: skip
        stages = {stamp["name"]: stamp for stamp in sorted(stamps, key=lambda s: s["number"])}
        trained = trained_prompts(directory / run for run in ("sft-jax", "dpo", "grpo"))
        scores, answers = {}, {}
        for stage in NAMES:
            path = directory / f"answers-{stage}"
            scores[stage] = json.loads(path.with_suffix(".json").read_text("utf-8"))
            lines = path.with_suffix(".jsonl").read_text("utf-8").splitlines()
            rows = [json.loads(line) for line in lines]
            answers[stage] = [row for row in rows if _text(row) not in trained]
            for tag, score in scores[stage].items():
                score |= matched(answers[stage], tag)
        seen = len(rows) - len(answers[stage])
        curves = read_curves(directory)
    except (FileNotFoundError, KeyError) as error:
        raise InputError(
            f"{directory} does not hold a complete run ({error}); run `python -m parity.demo_align`"
        ) from error
    return Results(directory, stages, scores, curves, answers, seen)


def read_curves(directory: Path) -> dict[str, Curve]:
    """Return the curves of the page by name. Raises `KeyError` for one that is missing."""
    runs = {
        run: read_metrics(directory / run / "metrics.jsonl")
        for run in ("sft-torch", "sft-jax", "dpo", "grpo")
    }

    def curve(key: str, *names: str) -> Curve:
        lines = [line for name in names for line in runs[name]]
        found = {int(line["step"]): line[key] for line in lines if key in line}
        if not found:
            raise KeyError(f"{key} of {names[0]}")
        return found

    curves = {
        "sft torch": curve("loss", "sft-torch"),
        "sft jax": curve("loss", "sft-jax"),
        "sft validation": curve("validation_loss", "sft-torch", "sft-jax"),
        "grpo reward": curve("reward", "grpo"),
    }
    for tag in LANGUAGES:
        curves[f"dpo {tag}"] = curve(f"validation_{ACCURACY}_{tag}", "dpo")
    return curves


def trained_prompts(runs: Iterable[Path]) -> set[str]:
    """Return the prompts of all conversations that the runs were trained on."""
    sources = [one for run in runs for one in load_config(run / "config.yaml").data.sources]
    return {_text(record) for source in sources for record in task_records(source)}


def _text(record: Mapping[str, Any]) -> str:
    return json.dumps(record["prompt"], ensure_ascii=False)


def matched(rows: Sequence[Mapping[str, Any]], tag: str) -> dict[str, float]:
    """Return `exact_match` and `questions` of a language. Raises `KeyError` if it has none."""
    own = [row["is_right"] for row in rows if row["language"] == tag]
    if not own:
        raise KeyError(f"questions in {tag}")
    return {"exact_match": sum(own) / len(own), "questions": len(own)}


def plot(curves: dict[str, Curve]) -> str:
    """Plot SFT's loss, DPO's held-out pairs and GRPO's reward, as SVG in the page's colours."""
    with themed(5.0, 6.0) as figure:
        top, bottom, last = figure.subplots(3, height_ratios=(1.4, 1, 1))
        for name in ("torch", "jax"):
            top.plot(*_xy(curves[f"sft {name}"]), color=COLORS[name], linewidth=0.6, alpha=0.6)
        top.plot(*_xy(curves["sft validation"]), "o-", color=COLORS["ink"], markersize=3)
        change = max(curves["sft torch"])
        top.axvline(change + 0.5, color=COLORS["ink"], linewidth=0.6, linestyle=(0, (2, 2)))
        place = {"transform": top.get_xaxis_transform(), "va": "top"}
        top.text(change, 0.97, "PyTorch ", color=COLORS["torch"], ha="right", **place)
        top.text(change + 1, 0.97, " JAX", color=COLORS["jax"], ha="left", **place)
        top.set_yscale("log")
        top.minorticks_off()
        top.set_ylabel("SFT: nats per label")
        for tag, line in zip(LANGUAGES, ("-", "--"), strict=True):
            style: Any = {"color": COLORS["torch"], "label": LANGUAGES[tag], "markersize": 3}
            bottom.plot(*_xy(curves[f"dpo {tag}"]), f"o{line}", **style)
        bottom.set_ylim(0, 1.03)
        bottom.set_ylabel("DPO: reward accuracy")
        bottom.legend(frameon=False, loc="lower right")
        last.plot(*_xy(curves["grpo reward"]), color=COLORS["jax"], linewidth=0.6, alpha=0.6)
        last.set_ylim(0, 1.03)
        last.set_ylabel("GRPO: reward")
        last.set_xlabel("step")
    return svg(figure)


def _xy(points: Curve) -> tuple[list[int], list[float]]:
    return list(points), list(points.values())


def summary(results: Results) -> dict[str, Any]:
    """Return the contents of `report.json`."""
    goals = [asdict(goal) | {"passed": goal.passed} for goal in results.goals]
    return {
        "passed": all(goal.passed for goal in results.goals),
        "goals": goals,
        "scores": results.scores,
        "seen": results.seen,
        "seconds": {name: stage["seconds"] for name, stage in results.stages.items()},
        "curves": results.curves,
    }


@command
def main() -> None:
    parser = command_parser("parity.align_report", __doc__, "DIRECTORY")
    text = "output directory of parity.demo_align, such as runs/demo-align"
    parser.add_argument("directory", type=Path, metavar="DIRECTORY", help=text)
    directory = parser.parse_args().directory
    results = read(directory)
    write_atomically(directory / "report.json", json.dumps(summary(results), indent=1) + "\n")
    page = TEMPLATES.get_template("align.html")
    text = page.render(r=results, figure=plot(results.curves), names=NAMES, languages=LANGUAGES)
    write_atomically(directory / "report.html", text)
    missed = [goal for goal in results.goals if not goal.passed]
    for goal in missed:
        print(f"missed: {goal.text}: {goal.measured:.1%}, of {goal.wanted:.1%}")
    if missed:
        sys.exit(1)
    print(f"{directory / 'report.html'}: all {len(results.goals)} goals are reached")


if __name__ == "__main__":
    main()
