"""Measure both frameworks on a GPU or a TPU, within minutes: equality, speed, memory, curves.

Writes OUT/report.html and OUT/report.json after every part, so that a machine that is taken away
leaves a page. What fails is a row of its part, and the other parts follow. Exits 1 if a row fails.
Without --device both frameworks run on the best device that they find. docs/accelerators.md
explains the parts.

python -m parity.accelerator --out runs/accelerator
python -m parity.accelerator --out runs/accelerator --minutes 8 --wheels wheels
python -m parity.accelerator --out runs/small --device cpu --minutes 3
"""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mooshak.command_line import command_parser
from mooshak.device import add_device_option, device_environment
from mooshak.errors import InputError, command
from mooshak.files import write_atomically
from parity.accelerator.parts import PARTS, PartSpec
from parity.accelerator.rows import Row, Setup
from parity.accelerator.wheels import install_missing

TOTAL = sum(part.seconds for part in PARTS)
PROBE_SECONDS = 120.0
"""To import both frameworks the first time."""
PAGE_SECONDS = 15.0
"""Least time between two versions of the page."""
EXIT_SECONDS = 10.0
"""For the process of a part to exit after its last row."""
USAGE = "--out DIR [--minutes 8] [--wheels FOLDER] [--device cpu|cuda|tpu] [--parts NAME ...]"


@command
def main() -> None:
    parser = command_parser("parity.accelerator", __doc__, USAGE)
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="directory of the report")
    add("--minutes", type=float, default=8.0, metavar="N", help="time for all parts")
    text = "folder of wheels, from which missing packages are installed below DIR"
    add("--wheels", type=Path, metavar="FOLDER", help=text)
    add_device_option(parser)
    names = [part.name for part in PARTS]
    text = f"some of {', '.join(names)} (all)"
    add("--parts", nargs="+", choices=names, default=names, metavar="NAME", help=text)
    args = parser.parse_args()
    if not args.minutes > 0:
        raise InputError(f"--minutes must be positive, not {args.minutes}")
    start = time.monotonic()
    out: Path = args.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    environment = dict(os.environ)
    rows: dict[str, list[Row]] = {}
    seconds: dict[str, float] = {}
    if args.wheels is not None:
        environment, rows["packages"] = install_missing(args.wheels, out, environment)
    # Both frameworks share the memory of a GPU.
    environment |= {**device_environment(args.device), "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    # Parts share compiled programs.
    environment.setdefault("JAX_COMPILATION_CACHE_DIR", str(out / "compiled"))
    environment.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
    devices = _devices(args.device, environment)
    setup = Setup(out, *devices, small=devices == ("cpu", "cpu"))
    chosen = [part for part in PARTS if part.name in args.parts]
    deadline, shown = start + 60 * args.minutes, 0.0
    for i, part in enumerate(chosen):
        available = part_seconds(chosen[i:], deadline - time.monotonic(), args.minutes)
        rows[part.name] = []
        print(f"{part.title}: {available:.0f} s", flush=True)
        began = time.monotonic()
        for row in measure(part, setup, available, environment):
            rows[part.name].append(row)
            seconds[part.name] = time.monotonic() - began
            _write_json(rows, seconds, setup, out)
            print(f"  {_text(row)}", flush=True)
        if i + 1 == len(chosen) or time.monotonic() - shown > PAGE_SECONDS:
            _write_page(out, environment)
            shown = time.monotonic()
    failed = [row for part in rows.values() for row in part if row.passed is False]
    n_rows = sum(map(len, rows.values()))
    total = time.monotonic() - start
    print(f"{out / 'report.html'}: {n_rows} rows, {len(failed)} fail, {total:.0f} seconds")
    if failed:
        sys.exit(1)


def part_seconds(parts: Sequence[PartSpec], left: float, minutes: float) -> float:
    """Return the time of the first of the parts that follow, when `left` seconds remain.

    It has its own share and what earlier parts have not used; where time is short, the first parts
    have their shares and the last ones none.
    """
    scale = 60 * minutes / TOTAL
    own, later = parts[0].seconds * scale, sum(part.seconds for part in parts[1:]) * scale
    return max(0.0, min(left, max(own, left - later)))


def measure(
    part: PartSpec, setup: Setup, seconds: float, environment: Mapping[str, str]
) -> Iterator[Row]:
    """Yield the rows of a part as its process measures them, for at most `seconds`."""
    if seconds < 1:
        yield Row(part.title, "not measured: the time was used up")
        return
    deadline = time.monotonic() + seconds
    logs = setup.out / "logs"
    logs.mkdir(exist_ok=True)
    values = json.dumps(asdict(setup) | {"out": str(setup.out)})
    words = [sys.executable, "-m", "parity.accelerator.worker", part.name, values]
    with (logs / f"{part.name}.log").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(
            words,
            stdout=subprocess.PIPE,
            stderr=log,
            encoding="utf-8",
            env=environment,
            start_new_session=True,
        )
        lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=_read, args=(process, lines), daemon=True).start()
        try:
            while (line := lines.get(timeout=max(0.0, deadline - time.monotonic()))) is not None:
                yield Row(**json.loads(line))
            process.wait(timeout=EXIT_SECONDS)
        except (queue.Empty, subprocess.TimeoutExpired):
            yield Row(part.title, f"ended after its {seconds:.0f} seconds", passed=False)
        finally:
            # With the processes that it has started: training commands, torchrun.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            code = process.wait()
    if code > 0 or (code < 0 and code != -signal.SIGKILL):
        yield Row(part.title, f"exit code {code}, see logs/{part.name}.log", passed=False)


def _read(process: "subprocess.Popen[str]", lines: "queue.Queue[str | None]") -> None:
    assert process.stdout is not None
    for line in process.stdout:
        lines.put(line)
    lines.put(None)


def _devices(wanted: str | None, environment: Mapping[str, str]) -> tuple[str, str]:
    """Return the devices of PyTorch and of JAX. Raises `InputError` if neither has `wanted`."""
    words = [sys.executable, "-m", "parity.accelerator.worker", "devices"]
    words.append(json.dumps({"wanted": wanted}))
    done = subprocess.run(
        words,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        env=environment,
        timeout=PROBE_SECONDS,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise InputError(f"a framework cannot be imported: {last}; see --wheels")
    found = json.loads(done.stdout)
    if isinstance(found, dict):
        raise InputError(found["error"])
    return found[0], found[1]


def _text(row: Row) -> str:
    value = f"{row.value:.4g}" if isinstance(row.value, float | int) else row.value or ""
    allowed = "" if row.allowed is None else f", allowed {row.allowed:.2g}"
    verdict = {True: ", pass", False: ", FAIL", None: ""}[row.passed]
    return f"{row.name}: {value} {row.unit}{allowed}{verdict}".rstrip()


def _write_json(
    rows: Mapping[str, Sequence[Row]], seconds: Mapping[str, float], setup: Setup, out: Path
) -> None:
    parts = {name: [asdict(row) for row in part] for name, part in rows.items()}
    report: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "devices": {"torch": setup.torch_device, "jax": setup.jax_device},
        "small": setup.small,
        "seconds": dict(seconds),
        "parts": parts,
    }
    write_atomically(out / "report.json", json.dumps(report, indent=1) + "\n")


def _write_page(out: Path, environment: Mapping[str, str]) -> None:
    """Write the page in a process of its own, which sees the installed wheels."""
    words = [sys.executable, "-m", "parity.accelerator.page", str(out)]
    done = subprocess.run(
        words, capture_output=True, encoding="utf-8", errors="replace", env=environment
    )
    if done.returncode:
        sys.stderr.write(done.stderr)


if __name__ == "__main__":
    main()
