"""Measure time and memory of `parity.convert`, compared with `cp` of the same bytes.

Before each measurement the source is dropped from the page cache. Memory is the peak of RssAnon
above that after the imports. `seconds` is the conversion with verification and sync,
`process_seconds` the process with its imports. `cp` does not verify or sync; `cp_synced` is its
time until the copy is on disk. A state from Hugging Face has weights only.

python -m benchmarks.conversion --size 8GB --out conversion.json
python -m benchmarks.conversion --size 8GB --from hf --to torch jax hf
"""

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from mooshak.checkpoints import safetensors
from mooshak.checkpoints.base import FULL_SLICE, MOMENTS, Checkpoint
from mooshak.checkpoints.formats import FORMAT_MARKERS, detect_format
from mooshak.command_line import command_parser
from mooshak.config.model import ModelConfig
from mooshak.files import write_atomically
from mooshak.tables import print_table
from parity import export_hf
from parity.convert import convert, size_in_bytes

KINDS = (*FORMAT_MARKERS, "hf")


def model_of(size: int) -> ModelConfig:
    """Return a model shaped as the 2 B one whose float32 training state has `size` bytes."""
    # 12 bytes for each parameter: 2 x 32 D^2 of vocabulary, 8 layers of (3 + 3 x 2.6875) D^2.
    dim = max(64, 64 * round(math.sqrt(size / 12 / (64 + 8 * 11.0625)) / 64))
    return ModelConfig(
        vocab_size=32 * dim,
        dim=dim,
        n_layers=8,
        n_heads=dim // 64,
        hidden_dim=2 * dim + 11 * dim // 16,
        max_seq_len=2048,
    )


def random_state(model: ModelConfig, moments: Sequence[str] = MOMENTS) -> Checkpoint:
    """Return a training state of random bits, different in each tensor; or weights only."""
    pool = np.tile(np.random.default_rng(0).random(1 << 24, np.float32), 2)
    shapes = model.parameter_shapes()
    keys = [prefix + name for prefix in ("", *(f"{m}." for m in moments)) for name in shapes]
    tensors = {
        key: (
            np.dtype(np.float32),
            shapes[key.removeprefix("exp_avg.").removeprefix("exp_avg_sq.")],
        )
        for key in keys
    }

    def read(key: str, rows: slice = FULL_SLICE) -> np.ndarray:
        shape = tensors[key][1]
        start, stop, _ = rows.indices(shape[0])
        width = math.prod(shape[1:])
        first = (start * width + 7919 * keys.index(key)) % (1 << 24)
        return pool[first : first + (stop - start) * width].reshape(stop - start, *shape[1:])

    state = {"format_version": 1, "step": 1, "seed": 0} if moments else None
    return Checkpoint(Path("(random)"), "random", model, state, tensors, read)


def measure(source: Path, target: Path, to: str) -> dict[str, float]:
    """Convert in a separate process. Returns `seconds`, `process_seconds` and `anon_bytes`."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "benchmarks.conversion"]
    command += ["--child", str(source), str(target), to]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    return {**json.loads(done.stdout), "process_seconds": time.perf_counter() - start}


def child(source: Path, target: Path, to: str) -> dict[str, float]:
    """Convert in this process, which `measure` has started."""
    for kind in {detect_format(source), to}:
        if kind in ("torch", "hf"):
            import mooshak_torch.checkpoint  # noqa: F401
        elif kind == "jax":
            import mooshak_jax.checkpoint  # noqa: F401
        if kind == "hf":
            import parity.export_hf  # noqa: F401
    imported = peak = rss_anon()
    done = threading.Event()

    def sample() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, rss_anon())

    sampler = threading.Thread(target=sample)
    sampler.start()
    start = time.perf_counter()
    convert(source, target, to)
    seconds = time.perf_counter() - start
    done.set()
    sampler.join()
    return {"seconds": seconds, "anon_bytes": peak - imported}


def rss_anon() -> int:
    """Return this process's anonymous memory in bytes."""
    status = Path("/proc/self/status").read_text("utf-8")
    (line,) = (line for line in status.splitlines() if line.startswith("RssAnon:"))
    return 1024 * int(line.split()[1])


def copy(source: Path, target: Path) -> dict[str, float]:
    """Copy with `cp -r`. Returns `seconds`, and `synced` including the sync to the disk."""
    start = time.perf_counter()
    subprocess.run(["cp", "-r", source, target], check=True)
    seconds = time.perf_counter() - start
    os.sync()
    return {"seconds": seconds, "synced": time.perf_counter() - start}


def drop_cache(path: Path) -> None:
    """Drop the files of a directory from the page cache."""
    os.sync()
    for file in filter(Path.is_file, path.rglob("*")):
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def compare(source: Path, to: str, repeats: int) -> dict[str, Any]:
    """Measure both in turns. Returns medians of the times and the largest memory."""
    target = source.parent / "target"
    copies, runs = [], []
    for _ in range(repeats):
        for is_copy in (True, False):
            shutil.rmtree(target, ignore_errors=True)
            drop_cache(source)
            if is_copy:
                copies.append(copy(source, target))
            else:
                runs.append(measure(source, target, to))
    shutil.rmtree(target)
    seconds = {
        key: statistics.median(run[key] for run in runs) for key in ("seconds", "process_seconds")
    }
    copied, synced = (
        statistics.median(run[key] for run in copies) for key in ("seconds", "synced")
    )
    return {
        "from": source.name,
        "to": to,
        "bytes": sum(file.stat().st_size for file in source.rglob("*") if file.is_file()),
        "cp_seconds": copied,
        "cp_synced": synced,
        **seconds,
        "ratio": seconds["seconds"] / copied,
        "anon_bytes": max(run["anon_bytes"] for run in runs),
        "copies": copies,
        "runs": runs,
    }


def main() -> None:
    usage = "[--size SIZE] [--from FORMAT ...] [--to FORMAT ...] [--out FILE] [--OPTION ...]"
    parser = command_parser("benchmarks.conversion", __doc__, usage)
    add = parser.add_argument
    text = "bytes of the training state"
    add("--size", type=size_in_bytes, default="8GB", metavar="SIZE", help=text)
    all_formats = list(FORMAT_MARKERS)
    text = "formats of the source"
    add("--from", dest="sources", nargs="+", choices=KINDS, default=all_formats, help=text)
    text = "formats of the target"
    add("--to", nargs="+", choices=KINDS, default=all_formats, help=text)
    add("--repeats", type=int, default=3, metavar="N", help="measurements of every pair")
    text = "directory of the states"
    add("--directory", type=Path, default=Path("runs/conversion"), metavar="DIR", help=text)
    add("--keep", action="store_true", help="do not delete the states, for another run")
    text = "JSON file of the results; pairs of earlier runs are preserved"
    add("--out", type=Path, metavar="FILE", help=text)
    add("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        source, target, to = args.child
        print(json.dumps(child(Path(source), Path(target), to)))
        return
    results = json.loads(args.out.read_text("utf-8")) if args.out and args.out.is_file() else {}
    first = args.directory / "safetensors"
    for kind in args.sources:
        source = args.directory / kind
        if kind == "hf" and not source.exists():
            export_hf.write_checkpoint(source, random_state(model_of(3 * args.size), moments=()))
        elif not first.exists():
            safetensors.write_checkpoint(first, random_state(model_of(args.size)))
        if not source.exists():
            measure(first, source, kind)
        for to in args.to:
            results[f"{kind} -> {to}"] = compare(source, to, args.repeats)
            if args.out:
                write_atomically(args.out, json.dumps(results, indent=2) + "\n")
    if not args.keep:
        shutil.rmtree(args.directory)
    names = ("cp_seconds", "cp_synced", "seconds", "process_seconds", "ratio")
    columns = ("cp, s", "synced, s", "conversion, s", "process, s", "ratio", "GB/s", "RssAnon, MiB")
    table = Table("pair", "GB", *columns)
    for pair, result in results.items():
        size = result["bytes"] / 1e9
        numbers = (size, *(result[name] for name in names), size / result["seconds"])
        cells = [f"{number:.2f}" for number in numbers]
        table.add_row(pair, *cells, f"{result['anon_bytes'] / 2**20:.0f}")
    print_table(table)


if __name__ == "__main__":
    main()
