"""Measure our code and its peers in turns.

Every worker of a case runs in a separate process, and they take turns: A B B A. Prints medians with
their spread, writes OUT/CASE.json and, of all measured cases, OUT/index.html. Exits 1 when one of
our own workers fails; a missed target is not a failure.

python -m benchmarks
python -m benchmarks train decode-1 --repetitions 5
"""

import json
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import jinja2
from rich.console import Console
from rich.table import Table

from benchmarks.case import Case, Size, Target
from benchmarks.cases import CASES, ROOFLINE
from mooshak.command_line import command_parser
from mooshak.device import add_device_option, restrict_to
from mooshak.errors import InputError, command
from mooshak.files import write_atomically
from mooshak.report.html import COLORS, TEMPLATES, svg, themed
from mooshak.tables import print_table
from mooshak.training.metrics import environment

Measured = dict[str, dict[str, Any]]
"""Worker -> `seconds`, `figures`, `median`, `low`, `high`, `other_cpu_share`, `memory`; or
`missing`."""


class Worker:
    """The process of a worker (benchmarks/worker.py), ready to measure."""

    def __init__(self, entry: str, size: Size, errors: IO[str]):
        self.entry, self.errors = entry, errors
        words = [sys.executable, "-m", "benchmarks.worker", entry, json.dumps(size)]
        self.process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, encoding="utf-8"
        )
        self.missing = self._answer().get("missing")

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *error: object) -> None:
        # At the end of its input it ends by itself and removes its files.
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def repeat(self) -> dict[str, float]:
        """Return `seconds` and `other_cpu_share` of one repetition (see benchmarks/worker.py)."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self._answer()

    def finish(self) -> float:
        """End the process. Returns its peak memory in bytes."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        return self._answer()["memory"]

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.errors.seek(0)
            raise InputError(f"{self.entry} ended: {self.errors.read()[-2000:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def measure(case: Case, size: Size, repetitions: int) -> Measured:
    """Measure one point of a case: every worker, in turns."""
    result: Measured = {}
    with ExitStack() as stack, Console(stderr=True).status("") as status:
        running = {}
        for name, entry in case.workers.items():
            status.update(f"{case.name}: {name}, setting up")
            errors = stack.enter_context(tempfile.TemporaryFile("w+"))
            worker = stack.enter_context(Worker(entry, size, errors))
            if worker.missing:
                result[name] = {"missing": worker.missing}
            else:
                running[name] = worker
        answers: dict[str, list[dict[str, float]]] = {name: [] for name in running}
        for i in range(repetitions):
            # Back and forth, so that no worker always follows the same one.
            for name, worker in list(running.items())[:: -1 if i % 2 else 1]:
                status.update(f"{case.name}: {name}, {i + 1} of {repetitions}")
                answers[name].append(worker.repeat())
        for name, worker in running.items():
            seconds = [answer["seconds"] for answer in answers[name]]
            share = max(answer["other_cpu_share"] for answer in answers[name])
            more = {"other_cpu_share": share, "memory": worker.finish()}
            result[name] = summary(case, size, seconds) | more
    return result


def summary(case: Case, size: Size, seconds: Sequence[float]) -> dict[str, Any]:
    """Return the median, lowest and highest figure of the repetitions."""
    work = None if case.work is None else case.work(size)
    figures = [s if work is None else work / s for s in seconds]
    middle = statistics.median(figures)
    spread = {"median": middle, "low": min(figures), "high": max(figures)}
    return {"seconds": list(seconds), "figures": figures, **spread}


def check_target(target: Target, measured: Measured) -> dict[str, Any] | None:
    """Return a target with the measured value; None where a worker is missing."""
    key = "memory" if target.quantity == "memory" else "median"
    names = [name for name in (target.ours, target.other) if name is not None]
    if any("missing" in measured[name] for name in names):
        return None
    values: list[float] = [measured[name][key] for name in names]
    value = values[0] if len(values) == 1 else values[0] / values[1]
    passed = value >= target.bound if target.quantity == "speed" else value <= target.bound
    row = {"ours": target.ours, "other": target.other, "quantity": target.quantity}
    return {**row, "bound": target.bound, "value": value, "passed": passed}


def run(case: Case, full: bool, repetitions: int | None) -> dict[str, Any]:
    """Measure all points of a case."""
    base = case.full if full else case.tiny
    points = []
    for change in (case.grid if full else ()) or ({},):
        size = base | change
        measured = measure(case, size, repetitions or case.repetitions)
        rows = [check_target(target, measured) for target in case.targets]
        points.append({"change": change, "workers": measured, "targets": list(filter(None, rows))})
        print_point(case, points[-1])
    return {
        "case": case.name,
        "title": case.title,
        "unit": case.unit,
        "size": base,
        "points": points,
        "machine": machine(),
    }


def machine() -> dict[str, Any]:
    """Return the processor and the versions of the software."""
    names = [line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")]
    known = environment()
    chosen = {key: known[key] for key in ("python", "processors", "versions")}
    return {"processor": names[0] if names else platform.processor(), **chosen}


def _cpuinfo() -> Iterable[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text("utf-8").splitlines() if path.exists() else ()


def print_point(case: Case, point: Mapping[str, Any]) -> None:
    """Print the table and the targets of one point."""
    what = ", ".join(f"{key} {value}" for key, value in point["change"].items())
    title = f"{case.name}: {case.title}" + (f", {what}" if what else "")
    table = Table("implementation", case.unit, "lowest", "highest", "peak memory, GB", title=title)
    for name, row in point["workers"].items():
        if "missing" in row:
            table.add_row(name, f"not installed: {row['missing']}", "", "", "")
            continue
        numbers = (row["median"], row["low"], row["high"])
        memory = "" if name == ROOFLINE else f"{row['memory'] / 1e9:.2f}"
        table.add_row(name, *(f"{number:,.4g}" for number in numbers), memory)
    print_table(table)
    for row in point["targets"]:
        sign, other = ("≥" if row["quantity"] == "speed" else "≤"), row["other"]
        against = f" of {other}" if other else ""
        verdict = "reached" if row["passed"] else "not reached"
        print(
            f"  {row['ours']}, {row['quantity']}: {row['value']:.3g}{against}"
            f" (target {sign} {row['bound']:g}): {verdict}"
        )


def write_page(out: Path) -> None:
    """Write one page of all results in the directory, in the order of the cases."""
    files = {case.name: out / f"{case.name}.json" for case in CASES}
    results = [json.loads(file.read_text("utf-8")) for file in files.values() if file.is_file()]
    here, there = jinja2.FileSystemLoader(Path(__file__).parent), TEMPLATES.loader
    assert there is not None
    pages = TEMPLATES.overlay(loader=jinja2.ChoiceLoader([here, there]))
    figures = {r["case"]: (plot_scaling if len(r["points"]) > 1 else plot_bars)(r) for r in results}
    template = pages.get_template("page.html")
    page = template.render(results=results, figures=figures, roofline=ROOFLINE)
    write_atomically(out / "index.html", page)


def plot_bars(result: Mapping[str, Any]) -> str:
    """Plot every worker's median as a bar, its repetitions as strokes."""
    rows = {n: r for n, r in result["points"][0]["workers"].items() if "missing" not in r}
    with themed(5.0, 0.5 + 0.26 * len(rows)) as figure:
        axes = figure.subplots()
        for i, (name, row) in enumerate(rows.items()):
            color = COLORS[_color(name)]
            axes.barh(i, row["median"], height=0.62, color=color, alpha=0.8)
            axes.plot(row["figures"], [i] * len(row["figures"]), "|", color=COLORS["ink"])
        axes.set_yticks(range(len(rows)), list(rows))
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
        axes.set_xlim(left=0)
        axes.set_xlabel(result["unit"])
    return svg(figure)


def plot_scaling(result: Mapping[str, Any]) -> str:
    """Plot speed and memory of every worker over each size that is varied."""
    varied: dict[str, list[Mapping[str, Any]]] = {}
    for point in result["points"]:
        varied.setdefault(next(iter(point["change"])), []).append(point)
    with themed(7.5, 4.2) as figure:
        grid = figure.subplots(2, len(varied), sharey="row", squeeze=False)
        for (top, bottom), (key, points) in zip(grid.T, varied.items(), strict=True):
            sizes = [point["change"][key] for point in points]
            for name in points[0]["workers"]:
                rows = [point["workers"][name] for point in points]
                for axes, field, unit in ((top, "median", 1.0), (bottom, "memory", 1e9)):
                    values = [row.get(field, float("nan")) / unit for row in rows]
                    axes.plot(sizes, values, "o-", ms=3, color=COLORS[_color(name)], label=name)
            for axes in (top, bottom):
                axes.set_xscale("log", base=2)
                axes.set_yscale("log")
                axes.set_xticks(sizes, [str(size) for size in sizes])
                axes.minorticks_off()
            bottom.set_xlabel(key.replace("_", " "))
        grid[0, 0].set_ylabel(result["unit"])
        grid[1, 0].set_ylabel("peak memory, GB")
        grid[0, 0].legend(frameon=False)
    return svg(figure)


def _color(name: str) -> str:
    if not name.startswith(("ours", "pipeline")):
        return "faint"
    return "jax" if "JAX" in name else "torch"


@command
def main() -> None:
    names = [case.name for case in CASES]
    usage = "[CASE ...] [--repetitions N] [--size full|tiny] [--device NAME] [--out DIR]"
    parser = command_parser("benchmarks", __doc__, usage)
    add = parser.add_argument
    add("cases", nargs="*", metavar="CASE", help=f"some of {', '.join(names)} (all)")
    text = "repetitions of every worker (default: that of the case)"
    add("--repetitions", type=int, metavar="N", help=text)
    text = "sizes: full, or tiny, which takes seconds"
    add("--size", choices=("full", "tiny"), default="full", help=text)
    text = "directory of the results"
    add("--out", type=Path, default=Path("benchmarks/results"), metavar="DIR", help=text)
    add_device_option(parser)
    options = parser.parse_args()
    restrict_to(options.device)  # The processes of the workers.
    if unknown := sorted(set(options.cases) - set(names)):
        raise InputError(f"no case {unknown[0]!r}; the cases are {', '.join(names)}")
    if options.repetitions is not None and options.repetitions < 1:
        raise InputError("--repetitions must be positive")
    options.out.mkdir(parents=True, exist_ok=True)
    for case in CASES:
        if not options.cases or case.name in options.cases:
            result = run(case, options.size == "full", options.repetitions)
            text = json.dumps(result, indent=1, ensure_ascii=False) + "\n"
            write_atomically(options.out / f"{case.name}.json", text)
            write_page(options.out)
    print(f"{options.out / 'index.html'} shows all results")


if __name__ == "__main__":
    main()
