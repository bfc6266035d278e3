"""Convert a checkpoint between torch (DCP), JAX (Orbax), safetensors and Hugging Face, exactly.

The format of SOURCE is detected. Tensors are streamed by rows. TARGET appears under its name only
when it is complete, on disk, and has been read back (docs/conversion.md).

python -m parity.convert runs/demo/torch/checkpoints/600 converted --to jax
python -m parity.convert runs/demo/torch/checkpoints/600 --describe
"""

import argparse
import importlib.util
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from mooshak.checkpoints import adapters, base, peft, safetensors
from mooshak.checkpoints.base import FULL_SLICE, Checkpoint, size_of
from mooshak.checkpoints.formats import FORMAT_MARKERS, detect_format
from mooshak.command_line import command_parser
from mooshak.config.model import model_description
from mooshak.errors import InputError, command
from mooshak.tables import print_table
from mooshak.tokenizer.files import find_tokenizer

# A conversion computes nothing and must not allocate an accelerator.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def convert(
    source: Path,
    target: Path,
    to: str,
    dtype: str | None = None,
    weights_only: bool = False,
    shard_size: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    force: bool = False,
    base_model: Path | None = None,
    merge_lora: bool = False,
) -> int:
    """Write the checkpoint `source` of any kind as `target` of the kind `to`. Returns its bytes.

    `dtype` casts the weights, not the moments. `shard_size` is the maximum size of a safetensors
    file in bytes. `progress` is called with the bytes of tensors read so far and the total. `force`
    writes an export that differs from its checkpoint. `base_model` is the model of a `source` that
    is an adapter of PEFT's; `merge_lora` merges adapters into the weights. Raises `InputError` when
    the source is incomplete or the target exists.
    """
    checkpoint = open_adapted(source, base_model)
    if merge_lora:
        checkpoint, dtype = merge_lora_of(checkpoint, dtype), None
    if weights_only:
        names = checkpoint.model.parameter_shapes()
        tensors = {name: checkpoint.tensors[name] for name in names}
        checkpoint = replace(checkpoint, tensors=tensors, trainer_state=None)
    checkpoint = with_progress(checkpoint, progress)
    if dtype is not None:
        checkpoint = cast(checkpoint, dtype)
    if to in ("hf", "gguf"):
        _check_installed(to)
    if to == "torch":
        from mooshak_torch.checkpoint import write_checkpoint
    elif to == "jax":
        from mooshak_jax.checkpoint import write_checkpoint
    elif to == "hf":
        from parity import export_hf

        write_checkpoint = partial(export_hf.write_checkpoint, shard_size=shard_size, force=force)
    elif to == "peft":
        write_checkpoint = partial(peft.write_adapter, base=str(base_model or ""))
    elif to == "gguf":
        from parity import export_gguf

        write_checkpoint = partial(export_gguf.write_checkpoint, force=force)
    else:
        write_checkpoint = partial(safetensors.write_checkpoint, shard_size=shard_size)
    if to in ("hf", "gguf") and checkpoint.model.lora is not None:
        raise InputError(f"{source} has adapters, which --to {to} cannot write; add --merge-lora")
    write_checkpoint(target, checkpoint)
    return checkpoint.n_bytes


def open_adapted(path: Path, base_model: Path | None) -> Checkpoint:
    """Open a checkpoint of any kind, or an adapter in PEFT's format with its `base_model`."""
    if not (path / peft.CONFIG_FILE).is_file():
        if base_model is not None:
            raise InputError(f"{path} is not an adapter in PEFT's format: it needs no --base")
        return open_any(path)
    if base_model is None:
        raise InputError(f"{path} is an adapter; name the directory of its model with --base")
    return peft.open_adapter(path, open_any(base_model))


def merge_lora_of(source: Checkpoint, dtype: str | None) -> Checkpoint:
    """Return `adapters.merged`, and print what the adapters and the rounding change."""
    sums = np.zeros(3)

    def report(*squares: float) -> None:
        sums[:] += squares

    wanted = None if dtype is None else base.DTYPES[DTYPES[dtype]]
    result = adapters.merged(source, wanted, report)
    for key in result.tensors:  # Read once for the report, before anything is written.
        for rows in base.row_chunks(result.tensors[key]):
            result.read(key, rows)
    weight, moved, lost = np.sqrt(sums)
    print(
        f"merged: the adapters change the weights by {moved / weight:.2e} of their norm; rounding "
        f"to {result.tensors['layers.0.mlp.w1.weight'][0].name} changes that by "
        f"{lost / max(moved, np.finfo(float).tiny):.1e} of it"
    )
    return result


def _check_installed(to: str) -> None:
    """Raise `InputError` if the packages that an export needs are missing."""
    for package in ("tokenizers", "transformers") if to == "hf" else ("tokenizers", "gguf"):
        if importlib.util.find_spec(package) is None:
            raise InputError(f"--to {to} needs the package {package}; pip install 'mooshak[hf]'")


def open_any(path: Path) -> Checkpoint:
    """Open a checkpoint of any kind for reading."""
    kind = detect_format(path)
    if kind in ("torch", "hf"):
        from mooshak_torch.checkpoint import open_checkpoint
    elif kind == "jax":
        from mooshak_jax.checkpoint import open_checkpoint
    else:
        from mooshak.checkpoints.safetensors import open_checkpoint
    return open_checkpoint(path)


def with_progress(checkpoint: Checkpoint, progress: Callable[[int, int], None]) -> Checkpoint:
    """Return the checkpoint, reporting the bytes read so far and the total."""
    done, total = 0, checkpoint.n_bytes

    def read(key: str, rows: slice = FULL_SLICE) -> np.ndarray:
        nonlocal done
        array = checkpoint.read(key, rows)
        done += array.nbytes
        progress(done, total)
        return array

    return replace(checkpoint, read=read)


def cast(checkpoint: Checkpoint, dtype: str) -> Checkpoint:
    """Return the checkpoint with its weights in another dtype."""
    wanted = base.DTYPES[DTYPES[dtype]]
    weights = checkpoint.model.parameter_shapes()
    tensors = {
        key: (wanted if key in weights else stored, shape)
        for key, (stored, shape) in checkpoint.tensors.items()
    }

    def read(key: str, rows: slice = FULL_SLICE) -> np.ndarray:
        array = checkpoint.read(key, rows)
        return base.cast(array, tensors[key][0], checkpoint.label(key))

    return replace(checkpoint, tensors=tensors, read=read, checksums={})


def describe(path: Path) -> dict[str, Any]:
    """Describe a checkpoint from its metadata only, and what is missing to resume from it."""
    checkpoint = open_any(path)
    weights = checkpoint.model.parameter_shapes()
    moments = [key for key in checkpoint.tensors if key not in weights]
    state = checkpoint.trainer_state or {}
    files = [file.stat().st_size for file in path.rglob("*") if file.is_file()]

    def dtypes(keys: Iterable[str]) -> list[str]:
        return sorted({checkpoint.tensors[key][0].name for key in keys})

    def n_bytes(keys: Iterable[str]) -> int:
        return sum(size_of(checkpoint.tensors[key]) for key in keys)

    missing = {
        "optimizer": not moments,
        "trainer_state.json": checkpoint.trainer_state is None,
        **{key: bool(state) and key not in state for key in STATE},
        "tokenizer.model": not _has_tokenizer(path),
        "checksums": not checkpoint.checksums,
    }
    return {
        "path": str(path),
        "kind": checkpoint.format,
        "model": model_description(checkpoint.model),
        "parameters": sum(math.prod(shape) for shape in weights.values()),
        "dtype": dtypes(weights),
        "optimizer_dtype": dtypes(moments),
        **{key: state.get(key) for key in STATE},
        "weight_bytes": n_bytes(weights),
        "optimizer_bytes": n_bytes(moments),
        "file_bytes": sum(files),
        "files": len(files),
        "tensors": len(checkpoint.tensors),
        "checksums": len(checkpoint.checksums),
        "missing": [name for name, is_missing in missing.items() if is_missing],
    }


STATE = ("step", "seed", "written_by", "schedule", "data", "validation_loss")
"""Keys of `trainer_state.json` in the description."""


def _has_tokenizer(path: Path) -> bool:
    try:
        return find_tokenizer(path, None).is_file()
    except InputError:
        return False


def print_description(facts: dict[str, Any]) -> None:
    """Print a description as a table."""
    table = Table(title=facts["path"], show_header=False)
    written, data = facts["written_by"] or {}, facts["data"] or {}
    mesh = f", mesh {written['mesh']}" if written.get("mesh") else ""
    sources = ", ".join(str(source.get("name")) for source in data.get("sources", ()))
    batch = f"{data.get('batch_size')} sequences of {data.get('sequence_length')} tokens per step"
    plural = "" if written.get("processes") == 1 else "es"
    rows = {
        "format": facts["kind"],
        "model": ", ".join(f"{k} {v}" for k, v in facts["model"].items() if v not in (None, False)),
        "parameters": f"{facts['parameters']:,} in {', '.join(facts['dtype'])}",
        "optimizer": f"AdamW moments in {', '.join(facts['optimizer_dtype'])}"
        if facts["optimizer_dtype"]
        else None,
        "step": facts["step"],
        "seed": facts["seed"],
        "schedule": facts["schedule"]
        and ", ".join(f"{key} {value}" for key, value in facts["schedule"].items()),
        "data": data and f"{sources}; {batch}",
        "validation loss": facts["validation_loss"],
        "written by": written
        and f"{written['framework']}, {written['processes']} process{plural}{mesh}",
        "size": f"{facts['weight_bytes'] / 1e9:.3f} GB of weights, "
        f"{facts['optimizer_bytes'] / 1e9:.3f} GB of moments; "
        f"{facts['files']} files of {facts['file_bytes'] / 1e9:.3f} GB",
        "checksums": f"{facts['checksums']} of {facts['tensors']} tensors",
        "missing": ", ".join(facts["missing"]) or "nothing",
    }
    for name, value in rows.items():
        if value not in (None, {}):
            table.add_row(name, str(value))
    print_table(table)


def size_in_bytes(text: str) -> int:
    """Parse a size: `2GB` is 2_000_000_000; `MiB` and `GiB` are powers of two."""
    units = {"": 1, "MB": 10**6, "GB": 10**9, "MIB": 1 << 20, "GIB": 1 << 30}
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Z]*)", text.strip().upper())
    if not match or match[2] not in units or not float(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size like 2GB or 500MB")
    return int(float(match[1]) * units[match[2]])


@contextmanager
def _bar() -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar with throughput and remaining time on standard error."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("converting", total=None)

        def update(done: int, total: int) -> None:
            label = "converting" if done < total else "reading back"
            bar.update(task, completed=done, total=total, description=label)

        yield update


@command
def main() -> None:
    usage = "SOURCE TARGET [--to FORMAT] [--OPTION ...] | SOURCE --describe [--json]"
    parser = command_parser("parity.convert", __doc__, usage)
    add = parser.add_argument
    add("source", type=Path, metavar="SOURCE", help="checkpoint of any format")
    text = "directory to write (gguf: file); it must not exist"
    add("target", type=Path, nargs="?", metavar="TARGET", help=text)
    formats = [*sorted(FORMAT_MARKERS), "hf", "peft", "gguf"]
    add("--to", choices=formats, default="safetensors", help="format of TARGET")
    text = "dtype of the weights; moments keep theirs (default: that of SOURCE)"
    add("--dtype", choices=sorted(DTYPES), help=text)
    add("--weights-only", action="store_true", help="omit the optimizer and the trainer state")
    text = "split safetensors files that are larger, for instance 2GB"
    add("--shard-size", type=size_in_bytes, metavar="SIZE", help=text)
    text = "merge adapters into the weights, in float64, rounded once to the dtype of TARGET"
    add("--merge-lora", action="store_true", help=text)
    text = "directory of the model of SOURCE, which is an adapter in PEFT's format"
    add("--base", type=Path, metavar="MODEL", help=text)
    text = "hf, gguf: write an export whose check finds a difference, with a note in it"
    add("--force", action="store_true", help=text)
    text = "print what SOURCE contains; convert nothing"
    add("--describe", action="store_true", help=text)
    add("--json", action="store_true", help="print the description as JSON")
    args = parser.parse_args()
    if args.describe:
        facts = describe(args.source)
        print(json.dumps(facts, indent=2, ensure_ascii=False)) if args.json else print_description(
            facts
        )
        return
    if args.target is None:
        parser.error("name the directory to write, or --describe")
    if args.shard_size and args.to not in ("safetensors", "hf"):
        parser.error("--shard-size needs --to safetensors or --to hf")
    start = time.perf_counter()
    with _bar() as progress:
        n_bytes = convert(
            args.source,
            args.target,
            args.to,
            args.dtype,
            args.weights_only,
            args.shard_size,
            progress,
            args.force,
            args.base,
            args.merge_lora,
        )
    seconds = time.perf_counter() - start
    print(
        f"{args.source} -> {args.target} ({args.to}): {n_bytes / 1e9:.3f} GB in {seconds:.1f} s, "
        f"{n_bytes / 1e9 / seconds:.2f} GB/s"
    )


if __name__ == "__main__":
    main()
