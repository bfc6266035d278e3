"""Compare loss curves of PyTorch, of JAX, and of runs that change the framework.

Trains from the same seed in PyTorch, in JAX, in PyTorch and then JAX, in JAX and then PyTorch, in
float64 and in float32. The noise floor is the difference of one framework from itself on two
data-parallel ranks or devices, whose reductions have another order. Writes `curve.json` and
`curve.html`; exits 1 when a bound does not hold. Runs that are already complete are reused.

python -m parity.curve --config configs/demo.yaml --steps 200 --switch 100 --out runs/curve
python -m parity.curve --config configs/demo.yaml --steps 20 --switch 10 --dtypes float64
"""

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mooshak.checkpoints.init_from import resolve
from mooshak.config.model import Dtype
from mooshak.config.parse import config_parser, load_config, parse_config
from mooshak.config.sections import Config
from mooshak.errors import InputError, command
from mooshak.files import locked, write_atomically
from mooshak.report.html import COLORS, TEMPLATES, svg, themed
from mooshak.tables import print_table
from mooshak.training.metrics import losses
from parity.distance import curve_differences
from parity.tolerances import FLOAT64, RATIO

DTYPES: tuple[Dtype, ...] = ("float64", "float32")

Losses = dict[int, float]


@dataclass(frozen=True)
class Run:
    """One training run."""

    name: str
    framework: str
    start: str | None = None
    """The run whose checkpoint, at the step of the change, this run resumes from."""
    devices: int = 1
    options: tuple[str, ...] = ()


RUNS = (
    Run("torch", "torch"),
    Run("JAX", "jax"),
    Run("torch to JAX", "jax", start="torch"),
    Run("JAX to torch", "torch", start="JAX"),
    Run("torch on two ranks", "torch", devices=2),
    Run("JAX on two devices", "jax", devices=2),
    # The negative control continues with a different epsilon of AdamW.
    Run("faulty", "torch", start="torch", options=("--optimizer.eps", "1e-6")),
)
PAIRS = (
    ("torch", "JAX"),
    ("torch", "torch to JAX"),
    ("JAX", "JAX to torch"),
    ("torch to JAX", "JAX to torch"),
)
NOISE_FLOORS = (("torch", "torch on two ranks"), ("JAX", "JAX on two devices"))
NEGATIVE_CONTROL = ("torch", "faulty")


@dataclass(frozen=True)
class Line:
    """Two curves and the largest difference between them."""

    dtype: str
    first: str
    second: str
    measured: float
    """Of any step's loss: relative in float64, in nats in float32."""
    step: int
    allowed: float
    noise_floor: float
    negative_control: float

    @property
    def passed(self) -> bool:
        """True if the difference is allowed, and the negative control exceeds what is allowed."""
        return self.measured <= self.allowed < self.negative_control


def curves(
    settings: Sequence[str], config: Config, dtype: Dtype, switch: int, out: Path
) -> dict[str, Losses]:
    """Return the loss of every step of every run, by the run's name.

    `settings` are the options that `config` was parsed from.
    """
    result: dict[str, Losses] = {}
    for run in RUNS:
        directory = out / dtype / run.name.replace(" ", "-")
        own = ("--run.dir", str(directory), *run.options)
        wanted = resolve(parse_config(config_parser(), [*settings, *own])[0])
        start = () if run.start is None else (out / dtype / run.start / f"checkpoints/{switch}",)
        if not _is_complete(directory, wanted):
            shutil.rmtree(directory, ignore_errors=True)
            train(run, (*settings, *own), start)
        found = losses(directory)
        result[run.name] = (result[run.start] if run.start else {}) | found
        if list(result[run.name]) != list(range(1, config.train.steps + 1)):
            raise InputError(
                f"{directory} does not hold every step exactly once; remove it and try again"
            )
    return result


def train(run: Run, settings: Sequence[str], start: Sequence[Path]) -> None:
    """Run the framework's training command. Raises `InputError` when it fails."""
    resume = [word for path in start for word in ("--resume", str(path))]
    words = [sys.executable, "-m"]
    if run.framework == "torch" and run.devices > 1:
        words += ["torch.distributed.run", "--standalone", f"--nproc-per-node={run.devices}", "-m"]
    if run.framework == "jax":
        resume += ["--mesh", f"data={run.devices}"]
    words += [f"mooshak_{run.framework}.train", *settings, *resume]
    done = subprocess.run(words, capture_output=True, encoding="utf-8", errors="replace")
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        reason = lines[-1].removeprefix("error: ") if lines else done.stderr[-2000:]
        raise InputError(f"{run.name}: {reason}")


def _is_complete(directory: Path, wanted: Config) -> bool:
    """Return whether a directory holds a finished run with this configuration."""
    if not (directory / "config.yaml").is_file():
        return False
    there = load_config(directory / "config.yaml")
    # The run's name determines its mesh.
    same = asdict(there) | {"parallel": None} == asdict(wanted) | {"parallel": None}
    return same and max(losses(directory), default=0) == wanted.train.steps


def compare(dtype: str, found: Mapping[str, Losses]) -> Iterator[Line]:
    """Yield the differences of one dtype's curves."""
    relative = dtype == "float64"
    floor = max(worst(found, pair, relative)[0] for pair in NOISE_FLOORS)
    control = worst(found, NEGATIVE_CONTROL, relative)[0]
    allowed = FLOAT64 if relative else RATIO * floor
    for pair in PAIRS:
        measured, step = worst(found, pair, relative)
        yield Line(dtype, *pair, measured, step, allowed, floor, control)


def worst(found: Mapping[str, Losses], pair: tuple[str, str], relative: bool) -> tuple[float, int]:
    """Return the largest difference of two curves, and its step."""
    first, second = pair
    different = curve_differences(found[second], found[first], relative)
    step = max(different, key=lambda k: different[k])
    return different[step], step


def plot(found: Mapping[str, Losses], lines: Sequence[Line], switch: int) -> str:
    """Plot the four curves, and their differences and the noise floor below, as SVG."""
    relative = lines[0].dtype == "float64"
    styles = {"torch": ("torch", "-"), "JAX": ("jax", "-")}
    styles |= {"torch to JAX": ("jax", "--"), "JAX to torch": ("torch", "--")}
    with themed(5.0, 4.5) as figure:
        top, bottom = figure.subplots(2, sharex=True, height_ratios=(1.6, 1))
        for i, (name, (color, line)) in enumerate(styles.items()):
            width = 4.5 - 1.1 * i
            alpha = 0.35 if i < 2 else 1.0
            losses = found[name]
            steps, values = list(losses), list(losses.values())
            top.plot(
                steps, values, line, color=COLORS[color], alpha=alpha, linewidth=width, label=name
            )
        top.set_ylabel("loss, nats per token")
        top.legend(frameon=False)
        smallest = lines[0].allowed / 1e5
        for pair in NOISE_FLOORS:
            shown = _shown(curve_differences(found[pair[1]], found[pair[0]], relative), smallest)
            bottom.plot(*shown, color=COLORS["ink"], alpha=0.25, linewidth=3)
        for pair, color in ((PAIRS[0], "ink"), (PAIRS[1], "jax"), (PAIRS[2], "torch")):
            shown = _shown(curve_differences(found[pair[1]], found[pair[0]], relative), smallest)
            bottom.plot(*shown, ".", markersize=2.5, color=COLORS[color], label=" – ".join(pair))
        bottom.axhline(lines[0].allowed, color=COLORS["ink"], linewidth=0.8)
        bottom.set_yscale("log")
        bottom.set_ylabel("difference")
        bottom.set_xlabel("step")
        bottom.minorticks_off()
        for axes in (top, bottom):
            axes.axvline(switch + 0.5, color=COLORS["ink"], linewidth=0.6, linestyle=(0, (2, 2)))
    return svg(figure)


def _shown(different: Losses, smallest: float) -> tuple[list[int], list[float]]:
    return list(different), [max(value, smallest) for value in different.values()]


def _add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--steps", type=int, default=200, metavar="N", help="steps of every run")
    text = "step after which a run changes its framework"
    add("--switch", type=int, default=100, metavar="N", help=text)
    text = "directory of the runs and the report"
    add("--out", type=Path, default=Path("runs/curve"), metavar="DIR", help=text)
    add("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), help="dtypes to train in")


@command
def main() -> None:
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    _add_options(own)
    # The other options are passed to the trainers unchanged.
    options, settings = own.parse_known_args()
    if not 0 < options.switch < options.steps:
        raise InputError(f"--switch {options.switch} must be between 0 and --steps")
    fixed: dict[str, Any] = {
        "train.steps": options.steps,
        "train.log_every": 1,
        "checkpoint.every": options.switch,
        "checkpoint.keep": options.steps,
        "evaluate.every": 0,
        "run.progress": "false",
    }
    settings += [word for key, value in fixed.items() for word in (f"--{key}", str(value))]
    usage = "--config FILE [--steps N] [--switch N] [--out DIR] [--section.key VALUE ...]"
    parser = config_parser("parity.curve", __doc__, usage)
    _add_options(parser)
    parse_config(parser, settings)
    lines: list[Line] = []
    found, figures = {}, {}
    with (
        locked(options.out / ".lock"),
        Console(stderr=True).status("training in both frameworks") as status,
    ):
        for dtype in options.dtypes:
            status.update(f"training in both frameworks, {dtype}")
            here = [*settings, "--train.dtype", dtype]
            config = resolve(parse_config(config_parser(), here)[0])
            found[dtype] = curves(here, config, dtype, options.switch, options.out)
            compared = list(compare(dtype, found[dtype]))
            figures[dtype] = plot(found[dtype], compared, options.switch)
            lines += compared
    _report(lines, found, figures, options)
    if failed := [line for line in lines if not line.passed]:
        first = failed[0]
        print(f"{first.first} and {first.second} differ by {first.measured:.2g} ({first.dtype})")
        sys.exit(1)


def _report(
    lines: list[Line],
    found: dict[str, dict[str, Losses]],
    figures: dict[str, str],
    options: argparse.Namespace,
) -> None:
    """Write curve.json and curve.html, and print the table."""
    rows = [asdict(line) | {"passed": line.passed} for line in lines]
    passed = all(line.passed for line in lines)
    report = {"switch": options.switch, "passed": passed, "lines": rows, "losses": found}
    write_atomically(options.out / "curve.json", json.dumps(report, indent=1) + "\n")
    page = TEMPLATES.get_template("curve.html")
    text = page.render(lines=lines, figures=figures, switch=options.switch, steps=options.steps)
    write_atomically(options.out / "curve.html", text)
    columns = (
        "curves",
        "dtype",
        "largest difference",
        "at step",
        "allowed",
        "noise floor",
        "negative control",
        "",
    )
    table = Table(*columns, title=f"loss curves of {options.steps} steps")
    for line in lines:
        numbers = (line.measured, line.allowed, line.noise_floor, line.negative_control)
        measured, *rest = (f"{number:.2g}" for number in numbers)
        verdict = "pass" if line.passed else "FAIL"
        pair = f"{line.first} – {line.second}"
        table.add_row(pair, line.dtype, measured, str(line.step), *rest, verdict)
    print_table(table)


if __name__ == "__main__":
    main()
