"""Write `report.html`, the self-contained page about a run that changed its framework.

Reads the files that the stages of `parity.demo` wrote to DIRECTORY: metrics, samples, the report of
`parity.check`, evaluations, stamps. Exits 1 when a bound does not hold.

python -m parity.report runs/demo
python -m parity.report runs/short
"""

import json
import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from mooshak.command_line import command_parser
from mooshak.config.parse import load_config
from mooshak.config.sections import Config
from mooshak.data.manifest import read_manifest, totals
from mooshak.data.shards import SPLITS
from mooshak.errors import InputError, command
from mooshak.files import write_atomically
from mooshak.report.html import COLORS, TEMPLATES, power, svg, themed
from mooshak.training.metrics import losses, read_metrics
from parity.distance import curve_differences, difference
from parity.tolerances import CURVE_FLOAT32, FLOAT64


@dataclass(frozen=True)
class Curve:
    """The loss after the change of framework, and that of the baseline, which does not change."""

    before: dict[int, float]
    """Step -> loss of the part that both share."""
    changed: dict[int, float]
    baseline: dict[int, float]
    relative: bool
    allowed: float

    @cached_property
    def differences(self) -> dict[int, float]:
        """Return the absolute or relative difference of each step."""
        return curve_differences(self.changed, self.baseline, self.relative)

    @property
    def worst_step(self) -> int:
        return max(self.differences, key=lambda step: self.differences[step])

    @property
    def worst(self) -> float:
        return self.differences[self.worst_step]

    @property
    def passed(self) -> bool:
        return all(difference <= self.allowed for difference in self.differences.values())

    @property
    def exact(self) -> int:
        """Count the steps whose losses are equal to the last bit."""
        return sum(difference == 0.0 for difference in self.differences.values())


@dataclass(frozen=True)
class Sample:
    """One prompt and each framework's continuation."""

    prompt: str
    torch: str
    jax: str

    @property
    def passed(self) -> bool:
        return self.torch == self.jax

    @property
    def language(self) -> str:
        return "hi" if re.search("[\u0900-\u097f]", self.prompt) else "en"


def read_curve(runs: Sequence[Path], relative: bool, allowed: float) -> Curve:
    """Read a curve from three runs: before the change, after it, and the baseline.

    Raises `InputError` unless their steps fit together.
    """
    before, changed, baseline = map(losses, runs)
    if not (before and changed) or changed.keys() != baseline.keys() or min(changed) <= max(before):
        raise InputError(f"the steps of {', '.join(map(str, runs))} do not fit together")
    return Curve(before, changed, baseline, relative, allowed)


def read_samples(torch: Path, jax: Path, prompts: list[str]) -> list[Sample]:
    """Read the samples from the output of the two `generate` commands."""
    texts = [_texts(path, prompts) for path in (torch, jax)]
    return [Sample(*row) for row in zip(prompts, *texts, strict=True)]


def _texts(path: Path, prompts: list[str]) -> list[str]:
    """Return the continuation of each prompt: a text starts with it and ends in an empty line."""
    output, starts = path.read_text("utf-8"), [0]
    for prompt in prompts[1:]:
        starts.append(output.find(f"\n\n{prompt}", starts[-1]) + 2)
    if not output.startswith(prompts[0]) or 1 in starts:
        raise InputError(f"{path} does not hold a text for each prompt")
    ends = [*(start - 2 for start in starts[1:]), len(output)]
    spans = zip(prompts, starts, ends, strict=True)
    return [output[start + len(prompt) : end].rstrip() for prompt, start, end in spans]


def plot(curve: Curve) -> str:
    """Plot the loss of all parts, and the difference below, as SVG in the page's colours."""
    change, baseline = max(curve.before), curve.before | curve.baseline
    changed = {change: curve.before[change]} | curve.changed
    with themed(5.0, 4.5) as figure:
        top, bottom = figure.subplots(2, sharex=True, height_ratios=(2.4, 1))

        def draw(axes: Any, scale: float) -> None:
            axes.plot(*_xy(baseline), color=COLORS["ink"], alpha=0.25, linewidth=4.5 * scale)
            axes.plot(*_xy(curve.before), color=COLORS["torch"], linewidth=1.1 * scale)
            axes.plot(*_xy(changed), color=COLORS["jax"], linewidth=1.1 * scale)
            axes.axvline(change + 0.5, color=COLORS["ink"], linewidth=0.6, linestyle=(0, (2, 2)))

        draw(top, 1)
        top.set_ylabel("loss, nats per token")
        near = curve.before | curve.changed
        width = max(3, min(12, len(curve.baseline) // 3))
        inset = top.inset_axes((0.56, 0.46, 0.43, 0.54))
        draw(inset, 1.2)
        window = [near[s] for s in near if change - width < s <= change + width + 1]
        margin = 0.12 * (max(window) - min(window)) or 0.1
        inset.set_xlim(change - width + 0.5, change + width + 0.5)
        inset.set_ylim(min(window) - margin, max(window) + 3 * margin)
        inset.set_facecolor("none")
        inset.tick_params(labelsize=7, length=2)
        inset.locator_params(axis="y", nbins=4)
        place = {"transform": inset.get_xaxis_transform(), "va": "top"}
        inset.text(change, 0.97, "PyTorch ", color=COLORS["torch"], ha="right", **place)
        inset.text(change + 1, 0.97, " JAX", color=COLORS["jax"], ha="left", **place)

        floor = curve.allowed / 1e4
        shown = {s: max(difference, floor) for s, difference in curve.differences.items()}
        bottom.plot(*_xy(shown), ".", markersize=2.5, color=COLORS["jax"])
        bottom.axhline(curve.allowed, color=COLORS["ink"], linewidth=0.8)
        bottom.axvline(change + 0.5, color=COLORS["ink"], linewidth=0.6, linestyle=(0, (2, 2)))
        bottom.set_yscale("log")
        bottom.set_ylim(floor / 2, curve.allowed * 8)
        bottom.text(1, curve.allowed * 1.4, f"allowed: {power(curve.allowed)}", va="bottom")
        bottom.text(change / 2, floor * 30, "both runs share\nthis half", ha="center", alpha=0.7)
        bottom.set_ylabel("difference")
        bottom.set_xlabel("step")
        bottom.minorticks_off()
    return svg(figure)


def _xy(points: Mapping[int, float]) -> tuple[list[int], list[float]]:
    return list(points), list(points.values())


@dataclass(frozen=True)
class Results:
    """The contents of the page."""

    directory: Path
    stages: dict[str, dict[str, Any]]
    """The stamps of the stages, by name."""
    config: Config
    environment: dict[str, Any]
    curve: Curve
    precise: Curve
    """The same change in float64."""
    parity: list[dict[str, Any]]
    samples: list[Sample]
    evaluations: dict[str, dict[str, dict[str, float]]]
    """Framework -> language -> `bits_per_byte`, `unigram_bits_per_byte` and their `ratio`."""

    def failures(self) -> Iterator[str]:
        """Yield a line for each result out of tolerance."""
        for dtype, curve in (("float32", self.curve), ("float64", self.precise)):
            if not curve.passed:
                yield (
                    f"the {dtype} loss of step {curve.worst_step} differs by {curve.worst:.2g} "
                    f"after the change of framework; allowed: {curve.allowed:g}"
                )
        for sample in self.samples:
            if not sample.passed:
                yield f"the texts of both frameworks differ after {sample.prompt!r}"
        for language, scores in self.evaluations["torch"].items():
            theirs = self.evaluations["jax"][language]
            apart = difference(theirs["bits_per_byte"], scores["bits_per_byte"])
            if not apart <= CURVE_FLOAT32:
                yield f"bits per byte of {language} differ by {apart:.2g} between the frameworks"
        for line in self.parity:
            if not line["passed"]:
                yield f"parity.check: {line['name']} ({line['dtype']}): {line['measured']:.2g}"

    def command(self, name: str) -> list[str]:
        """Return the shell command of a stage in parts: each option with its value."""
        module, *words = self.stages[name]["words"]
        parts = [f"python -m {module}"]
        for word in map(shlex.quote, words):
            if re.fullmatch(r"--\S+", parts[-1]) and not word.startswith("--"):
                parts[-1] += f" {word}"
            else:
                parts.append(word)
        return parts

    def stage_bytes(self, name: str) -> int:
        """Return the size of a stage's files."""
        return sum(self.stages[name]["files"].values())

    def speed(self, run: str) -> float:
        """Return the median tokens per second of a run."""
        lines = read_metrics(self.directory / run / "metrics.jsonl")
        return median(line["tokens_per_second"] for line in lines)

    def corpus(self) -> list[dict[str, Any]]:
        """Return documents, tokens and bytes of each source."""
        rows = []
        for source in self.config.data.sources:
            counts = totals(read_manifest(Path(self.config.data.dir) / source.name), *SPLITS)
            rows.append({"name": source.name, **counts})
        return rows


def read(directory: Path) -> Results:
    """Read the output directory of a demo. Raises `InputError` when a stage is missing."""
    stamps = {
        p.stem: json.loads(p.read_text("utf-8")) for p in (directory / "stages").glob("*.json")
    }
    made = dict(sorted(stamps.items(), key=lambda stamp: stamp[1]["number"]))
    try:
        prompts = [b for a, b in pairwise(made["samples-jax"]["words"]) if a == "--prompt"]
        runs = [directory / run for run in ("torch", "jax", "baseline")]
        precise = [run.with_name(f"float64-{run.name}") for run in runs]
        return Results(
            directory=directory,
            stages=made,
            config=load_config(directory / "torch" / "config.yaml"),
            environment=json.loads((directory / "jax" / "environment.json").read_text("utf-8")),
            curve=read_curve(runs, relative=False, allowed=CURVE_FLOAT32),
            precise=read_curve(precise, relative=True, allowed=FLOAT64),
            parity=json.loads((directory / "parity" / "report.json").read_text("utf-8"))["lines"],
            samples=read_samples(
                directory / "samples-torch.txt", directory / "samples-jax.txt", prompts
            ),
            evaluations={
                framework: json.loads(
                    (directory / f"evaluation-{framework}.json").read_text("utf-8")
                )
                for framework in ("torch", "jax")
            },
        )
    except (FileNotFoundError, KeyError) as error:
        raise InputError(
            f"{directory} does not hold a complete demo ({error}); run `python -m parity.demo`"
        ) from error


def page(results: Results) -> str:
    """Render the page."""
    template = TEMPLATES.get_template("report.html")
    return template.render(r=results, figure=plot(results.curve), failures=[*results.failures()])


@command
def main() -> None:
    parser = command_parser("parity.report", __doc__, "DIRECTORY")
    text = "output directory of parity.demo, such as runs/demo"
    parser.add_argument("directory", type=Path, metavar="DIRECTORY", help=text)
    results = read(parser.parse_args().directory)
    target = results.directory / "report.html"
    write_atomically(target, page(results))
    failures = list(results.failures())
    if failures:
        print(f"failed: {failures[0]}; see {target}")
        sys.exit(1)
    print(
        f"{target}: the loss differs by at most {results.curve.worst:.2g} (float64, relative: "
        f"{results.precise.worst:.2g}); {len(results.samples)} sampled texts are equal"
    )


if __name__ == "__main__":
    main()
