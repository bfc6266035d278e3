"""Measure our code and its peers side by side.

Every contestant of a case has a process of its own, and they take turns: A B B A. Prints medians
with their spread, writes OUT/CASE.json and, of all cases that have been measured, OUT/index.html.
Exits 1 when one of our own contestants fails; a reach that is missed is no failure.

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

from benchmarks.cases import CASES, ROOF, Case, Reach, Size
from mooshak.command_line import command_parser
from mooshak.errors import InputError, command
from mooshak.files import write_atomically
from mooshak.report.html import COLORS, TEMPLATES, svg, themed
from mooshak.tables import print_table
from mooshak.training.metrics import environment

Measured = dict[str, dict[str, Any]]
"""Contestant -> `seconds`, `figures`, `median`, `low`, `high`, `others`, `memory`, or `missing`."""


class Contestant:
    """The process of a contestant (benchmarks/contestant.py), ready to measure."""

    def __init__(self, entry: str, size: Size, errors: IO[str]):
        self.entry, self.errors = entry, errors
        words = [sys.executable, "-m", "benchmarks.worker", entry, json.dumps(size)]
        self.process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
        )
        self.missing = self._answer().get("missing")

    def __enter__(self) -> "Contestant":
        return self

    def __exit__(self, *error: object) -> None:
        # Without input it ends by itself, and removes its files.
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def repeat(self) -> dict[str, float]:
        """`seconds` of one repetition, and `others`: what other programs took of a processor."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self._answer()

    def finish(self) -> float:
        """The most memory that it has had, in bytes."""
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
    """One point of a case: every contestant, in turns."""
    result: Measured = {}
    with ExitStack() as stack, Console(stderr=True).status("") as status:
        running = {}
        for name, entry in case.contestants.items():
            status.update(f"{case.name}: {name} sets up")
            errors = stack.enter_context(tempfile.TemporaryFile("w+"))
            contestant = stack.enter_context(Contestant(entry, size, errors))
            if contestant.missing:
                result[name] = {"missing": contestant.missing}
            else:
                running[name] = contestant
        answers: dict[str, list[dict[str, float]]] = {name: [] for name in running}
        for i in range(repetitions):
            # There and back: none comes always after the same one.
            for name, contestant in list(running.items())[:: -1 if i % 2 else 1]:
                status.update(f"{case.name}: {name}, {i + 1} of {repetitions}")
                answers[name].append(contestant.repeat())
        for name, contestant in running.items():
            seconds = [answer["seconds"] for answer in answers[name]]
            others = max(answer["others"] for answer in answers[name])
            more = {"others": others, "memory": contestant.finish()}
            result[name] = summary(case, size, seconds) | more
    return result


def summary(case: Case, size: Size, seconds: Sequence[float]) -> dict[str, Any]:
    """Median, lowest and highest figure of the repetitions."""
    work = None if case.work is None else case.work(size)
    figures = [s if work is None else work / s for s in seconds]
    middle = statistics.median(figures)
    spread = {"median": middle, "low": min(figures), "high": max(figures)}
    return {"seconds": list(seconds), "figures": figures, **spread}


def reached(reach: Reach, measured: Measured) -> dict[str, Any] | None:
    """A reach beside what was measured; None where a contestant is missing."""
    key = "memory" if reach.quantity == "memory" else "median"
    names = [name for name in (reach.ours, reach.other) if name is not None]
    if any("missing" in measured[name] for name in names):
        return None
    values: list[float] = [measured[name][key] for name in names]
    value = values[0] if len(values) == 1 else values[0] / values[1]
    passed = value >= reach.bound if reach.quantity == "speed" else value <= reach.bound
    row = {"ours": reach.ours, "other": reach.other, "quantity": reach.quantity}
    return {**row, "bound": reach.bound, "value": value, "passed": passed}


def run(case: Case, full: bool, repetitions: int | None) -> dict[str, Any]:
    """A case with all its points."""
    base = case.full if full else case.tiny
    points = []
    for change in (case.grid if full else ()) or ({},):
        size = base | change
        measured = measure(case, size, repetitions or case.repetitions)
        rows = [reached(reach, measured) for reach in case.reaches]
        points.append(
            {"change": change, "contestants": measured, "reaches": list(filter(None, rows))}
        )
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
    """What it was measured on and with."""
    names = [line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")]
    known = environment()
    chosen = {key: known[key] for key in ("python", "processors", "versions")}
    return {"processor": names[0] if names else platform.processor(), **chosen}


def _cpuinfo() -> Iterable[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else ()


def print_point(case: Case, point: Mapping[str, Any]) -> None:
    """The tables of one point."""
    what = ", ".join(f"{key} {value}" for key, value in point["change"].items())
    title = f"{case.name}: {case.title}" + (f", {what}" if what else "")
    table = Table("contestant", case.unit, "lowest", "highest", "peak memory, GB", title=title)
    for name, row in point["contestants"].items():
        if "missing" in row:
            table.add_row(name, f"not installed: {row['missing']}", "", "", "")
            continue
        numbers = (row["median"], row["low"], row["high"])
        memory = "" if name == ROOF else f"{row['memory'] / 1e9:.2f}"
        table.add_row(name, *(f"{number:,.4g}" for number in numbers), memory)
    print_table(table)
    for row in point["reaches"]:
        sign, other = ("≥" if row["quantity"] == "speed" else "≤"), row["other"]
        against = f" of {other}" if other else ""
        verdict = "reached" if row["passed"] else "not reached"
        print(
            f"  {row['ours']}, {row['quantity']}: {row['value']:.3g}{against}"
            f" (reach {sign} {row['bound']:g}): {verdict}"
        )


def write_page(out: Path) -> None:
    """One page of all results in the directory, in the order of the cases."""
    files = {case.name: out / f"{case.name}.json" for case in CASES}
    results = [json.loads(file.read_text()) for file in files.values() if file.is_file()]
    here, there = jinja2.FileSystemLoader(Path(__file__).parent), TEMPLATES.loader
    assert there is not None
    pages = TEMPLATES.overlay(loader=jinja2.ChoiceLoader([here, there]))
    figures = {r["case"]: (growth if len(r["points"]) > 1 else bars)(r) for r in results}
    page = pages.get_template("page.html").render(results=results, figures=figures, roof=ROOF)
    write_atomically(out / "index.html", page)


def bars(result: Mapping[str, Any]) -> str:
    """Every contestant's median as a bar, its repetitions as dots."""
    rows = {n: r for n, r in result["points"][0]["contestants"].items() if "missing" not in r}
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


def growth(result: Mapping[str, Any]) -> str:
    """Speed and memory of every contestant over each size that was varied."""
    varied: dict[str, list[Mapping[str, Any]]] = {}
    for point in result["points"]:
        varied.setdefault(next(iter(point["change"])), []).append(point)
    with themed(7.5, 4.2) as figure:
        grid = figure.subplots(2, len(varied), sharey="row", squeeze=False)
        for (top, bottom), (key, points) in zip(grid.T, varied.items(), strict=True):
            sizes = [point["change"][key] for point in points]
            for name in points[0]["contestants"]:
                rows = [point["contestants"][name] for point in points]
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
    usage = "[CASE ...] [--repetitions N] [--size full|tiny] [--out DIR]"
    parser = command_parser("benchmarks", __doc__, usage)
    add = parser.add_argument
    add("cases", nargs="*", metavar="CASE", help=f"some of {', '.join(names)} (all)")
    text = "repetitions of every program (default: that of the case)"
    add("--repetitions", type=int, metavar="N", help=text)
    text = "sizes: full, or tiny, which takes seconds"
    add("--size", choices=("full", "tiny"), default="full", help=text)
    text = "directory of the results"
    add("--out", type=Path, default=Path("benchmarks/results"), metavar="DIR", help=text)
    options = parser.parse_args()
    if unknown := sorted(set(options.cases) - set(names)):
        raise InputError(f"no case {unknown[0]!r}; there are {', '.join(names)}")
    if options.repetitions is not None and options.repetitions < 1:
        raise InputError("--repetitions must be positive")
    options.out.mkdir(parents=True, exist_ok=True)
    for case in CASES:
        if not options.cases or case.name in options.cases:
            result = run(case, options.size == "full", options.repetitions)
            text = json.dumps(result, indent=1, ensure_ascii=False) + "\n"
            write_atomically(options.out / f"{case.name}.json", text)
            write_page(options.out)
    print(f"{options.out / 'index.html'} shows all that has been measured")


if __name__ == "__main__":
    main()
