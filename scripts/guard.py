"""Compare two revisions on this machine: all that must not change, to the last bit.

    python scripts/guard.py BASE [HEAD]        revisions of git; HEAD: the working tree by default
    python scripts/guard.py BASE --only torch/llama,generate --lowered
    python scripts/guard.py BASE --only time --time 3

Small models of both architectures (scripts/guard.yaml) are trained in both frameworks, on one
process, two FSDP ranks and a JAX mesh, converted to every checkpoint format, and asked for logits
and for greedy and sampled text. HEAD takes the data and the checkpoints of BASE, so a part that
changed does not hide the others. Each revision runs by the commands of its own tree; names that
have changed are translated in scripts/guard_revision.py and scripts/guard_lower.py.
BASE's results are cached by commit. Exit status 1: a result differs, or a command of HEAD failed.
"""

import argparse
import contextlib
import fcntl
import hashlib
import json
import shutil
import signal
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib import metadata
from pathlib import Path

import numpy as np
import sentencepiece
from guard_compare import differences
from guard_revision import (
    HERE,
    SETTINGS,
    CommandFailed,
    Revision,
    Sections,
    checkout,
    git,
    is_done,
    report,
)

SOURCES = ("torch", "jax")
READERS = ("generate", "convert", "logits")
"""Parts that read the checkpoints of BASE, which SOURCES make."""
PARTS = ("data", *SOURCES, *READERS, "lowered", "time")


def data(revision: Revision, out: Path) -> None:
    """Train a tokenizer and tokenize the corpus."""
    places = {"tokenizer": {"path": str(out / "tokenizer.model")}, "data": {"dir": str(out)}}
    config = revision.config(out / "config.yaml", "mooshak", places)
    revision.run("mooshak.tokenizer", "train", "--config", config)
    revision.run("mooshak.data", "prepare", "--config", config)


def inputs(revision: Revision, out: Path) -> None:
    """Copy the data of BASE; this revision accepts it, or tokenizes the corpus again."""
    shutil.copytree(revision.base / "data", out, dirs_exist_ok=True)
    (out / "done").unlink()
    imported = revision.python("-c", "import mooshak; print(mooshak.__file__)")[0]
    if not Path(imported.strip()).is_relative_to(str(revision.tree)):
        raise SystemExit(f"commands import {imported.strip()}, not the tree {revision.tree}")
    manifests = {file: file.read_bytes() for file in out.glob("*/manifest.json")}
    config = revision.config(out / "config.yaml", "mooshak")
    revision.run("mooshak.data", "prepare", "--config", config)
    if any(file.read_bytes() != before for file, before in manifests.items()):
        report(f"{revision.name}  does not accept the shards of BASE: it tokenized again")


def train(revision: Revision, out: Path, framework: str, model: str, layout: str) -> None:
    """Train, and convert the last checkpoint of the run to safetensors."""
    config = revision.config(out / "config.yaml", model, {"run": {"dir": str(out / "run")}})
    options = SETTINGS["layouts"][framework][layout]
    ranks = 2 if layout == "fsdp" else 1
    revision.run(f"mooshak_{framework}.train", "--config", config, *options, ranks=ranks)
    metrics = shutil.copy(out / "run" / "metrics.jsonl", out)
    norms = [
        json.loads(line)["grad_norm"] for line in Path(metrics).read_text("utf-8").splitlines()
    ]
    if max(norms) <= SETTINGS["common"]["optimizer"]["max_grad_norm"]:
        raise CommandFailed("no gradient was clipped: a fault of clipping would not be seen")
    checkpoint = out / "run" / "checkpoints" / str(revision.steps)
    add_tokenizer(revision, checkpoint)
    revision.run("parity.convert", checkpoint, out / "weights", "--to", "safetensors")


def add_tokenizer(revision: Revision, checkpoint: Path) -> None:
    """Copy the tokenizer into a checkpoint: nothing then needs the old keys of its run."""
    shutil.copy(revision.base / "data" / "tokenizer.model", checkpoint)


def generate(revision: Revision, out: Path, framework: str, model: str, how: str) -> None:
    """Generate, and write the text as tokens, one a line; older revisions print no token ids."""
    checkpoint = revision.checkpoint(framework, model)
    text, *_ = revision.generate(framework, checkpoint, *SETTINGS["generate"][how])
    tokenizer = str(revision.base / "data" / "tokenizer.model")
    pieces = sentencepiece.SentencePieceProcessor(model_file=tokenizer)
    (out / "tokens.txt").write_text("\n".join(pieces.encode(text, out_type=str)), "utf-8")


def convert(revision: Revision, out: Path, model: str, to: str) -> None:
    """Convert to a format, and to safetensors what only our own code can read."""
    source = revision.checkpoint("jax" if to == "torch" else "torch", model)
    target = out / ("model.gguf" if to == "gguf" else to)
    revision.run("parity.convert", source, target, "--to", to)
    if to in ("torch", "jax"):
        revision.run("parity.convert", target, out / "weights", "--to", "safetensors")


def logits(revision: Revision, out: Path, framework: str, model: str) -> None:
    """Compute the logits of random tokens."""
    vocab_size = SETTINGS["models"][model]["vocab_size"]
    tokens_BT = np.random.default_rng(0).integers(0, vocab_size, (2, 150), np.int32)
    np.save(out / "tokens.npy", tokens_BT)
    words = ["--backend", framework, "--dtype", SETTINGS["logits"][model]]
    words += ["--tokens", str(out / "tokens.npy"), "--out", str(out / "logits.npy")]
    revision.run("parity.logits", revision.checkpoint(framework, model), *words)


def lowered(revision: Revision, out: Path, model: str) -> None:
    """Lower the train step of JAX."""
    variants = SETTINGS["lowered"].items()
    files = [revision.config(out / f"{name}.yaml", model, changes) for name, changes in variants]
    revision.python(HERE / "guard_lower.py", *files)


def jobs_of(parts: Sequence[str]) -> dict[str, Callable[[Revision, Path], None]]:
    """Return the jobs of some parts: directory of the results -> function that makes them."""
    jobs: dict[str, Callable[[Revision, Path], None]] = {}
    for model in SETTINGS["models"]:
        for framework, layouts in SETTINGS["layouts"].items():
            which = {"framework": framework, "model": model}
            for layout in layouts:
                jobs[f"{framework}/{model}/{layout}"] = partial(train, layout=layout, **which)
            for how in SETTINGS["generate"]:
                jobs[f"generate/{model}/{framework}-{how}"] = partial(generate, how=how, **which)
            jobs[f"logits/{model}/{framework}"] = partial(logits, **which)
        for to in SETTINGS["formats"][model]:
            jobs[f"convert/{model}/{to}"] = partial(convert, model=model, to=to)
        jobs[f"lowered/{model}"] = partial(lowered, model=model)
    return {job: jobs[job] for job in jobs if any(is_in(job, part) for part in parts)}


def is_in(job: str, part: str) -> bool:
    """Return whether a job belongs to a part: torch, torch/llama or torch/llama/fsdp."""
    return f"{job}/".startswith(f"{part}/")


def collect(revision: Revision, parts: Sequence[str], workers: int) -> None:
    """Make the results of some parts; those that read checkpoints come after the training."""
    if "data" in parts:
        revision.attempt("data", data)
    revision.attempt("inputs", inputs)
    for stage in (SOURCES, (*READERS, "lowered")):
        jobs = jobs_of([part for part in parts if part.partition("/")[0] in stage])
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(revision.attempt, jobs, jobs.values()))


def compare_times(base: Revision, head: Revision, turns: int) -> None:
    """Print step time, decoding time and peak memory of both, measured in turns."""
    print(f"{'':24}{'base':>10}{'spread':>8}{'head':>10}{'spread':>8}{'head/base':>11}")
    for framework in SETTINGS["layouts"]:
        figures: dict[str, list[dict[str, float]]] = {"base": [], "head": []}
        with tempfile.TemporaryDirectory(dir=head.out) as directory:
            # The first turn compiles, and its checkpoint is the one that both decode.
            for turn in range(turns + 1):
                for revision in (base, head) if turn % 2 == 0 else (head, base):
                    report(f"{revision.name}  time/{framework}, turn {turn} of {turns}")
                    out = Path(directory) / f"{revision.name}-{turn}"
                    checkpoint = Path(directory) / "base-0" / "run" / "checkpoints" / "40"
                    figures[revision.name].append(measure(revision, out, framework, checkpoint))
        for what in figures["base"][0]:
            measured = {name: [run[what] for run in runs[1:]] for name, runs in figures.items()}
            medians = {name: statistics.median(values) for name, values in measured.items()}
            row = f"{framework + ' ' + what:24}"
            for name, values in measured.items():
                spread = (max(values) - min(values)) / medians[name]
                row += f"{medians[name]:10.2f}{spread:8.1%}"
            print(f"{row}{medians['head'] / medians['base']:11.3f}", flush=True)


def measure(revision: Revision, out: Path, framework: str, checkpoint: Path) -> dict[str, float]:
    """Measure the training of 40 steps, and the decoding of a text by a checkpoint."""
    out.mkdir()
    sections: Sections = {"run": {"dir": str(out / "run")}, **SETTINGS["time"]}
    sections["train"] = sections["train"] | {"steps": 40, "stop_after_step": None}
    config = revision.config(out / "config.yaml", "mooshak", sections)
    _, _, train_bytes = revision.run(f"mooshak_{framework}.train", "--config", config)
    lines = (out / "run" / "metrics.jsonl").read_text("utf-8").splitlines()
    rates = [json.loads(line)["tokens_per_second"] for line in lines]
    if checkpoint.is_relative_to(out):
        add_tokenizer(revision, checkpoint)
    # Older trees stack what JAX made token by token: many tokens take it gigabytes to compile.
    few, more = 8, 248
    options = ["--prompt", "Once upon a time", "--max_new_tokens"]
    short = revision.generate(framework, checkpoint, *options, str(few))
    long = revision.generate(framework, checkpoint, *options, str(few + more))
    n_tokens = sections["train"]["batch_size"] * sections["train"]["sequence_length"]
    return {
        "step, ms": 1e3 * n_tokens / statistics.median(rates[10:]),
        "train peak, MB": train_bytes / 1e6,
        "decode, ms/token": 1e3 * (long[1] - short[1]) / more,
        "decode peak, MB": long[2] / 1e6,
    }


def cache_key(revision: str, steps: int) -> str:
    """Return the commit, and a hash of what else BASE's results depend on."""
    versions = [metadata.version(name) for name in ("torch", "jax", "flax", "numpy", "gguf")]
    settings = {key: value for key, value in SETTINGS.items() if key != "time"}
    text = json.dumps([settings, steps, versions])
    commit = git("rev-parse", "--verify", f"{revision}^{{commit}}")
    return f"{commit[:12]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def main() -> int:
    """`python scripts/guard.py BASE [HEAD]`; returns the exit status."""
    parser = argparse.ArgumentParser(
        usage="python scripts/guard.py BASE [HEAD] [--only PART,...] [--lowered] [--OPTION ...]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("base", help="the revision to compare with")
    parser.add_argument("head", nargs="?", help="the revision to compare (default: working tree)")
    cache = Path(tempfile.gettempdir()) / "guard-cache"
    parser.add_argument("--cache", type=Path, default=cache, help="directory for BASE's results")
    parser.add_argument("--only", default=",".join(PARTS[:-2]), help=f"some of {', '.join(PARTS)}")
    parser.add_argument("--lowered", action="store_true", help="the lowered train step of JAX too")
    parser.add_argument("--time", type=int, default=0, metavar="N", help="measure, N times each")
    parser.add_argument("--steps", type=int, default=20, help="train steps")
    parser.add_argument("--workers", type=int, default=2, help="commands that run at a time")
    args = parser.parse_args()
    parts = [*args.only.split(","), *(["lowered"] if args.lowered else [])]
    for part in parts:
        if part not in PARTS and not jobs_of([part]):
            parser.error(f"there is no part {part}; parts are {', '.join(PARTS)}, torch/llama, ...")
    base_out = args.cache.resolve() / cache_key(args.base, args.steps)
    base_out.mkdir(parents=True, exist_ok=True)
    turns = args.time or int("time" in parts)
    jobs = ["inputs", *(["data"] if "data" in parts else []), *jobs_of(parts)]
    # The worktrees are removed on a signal, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with contextlib.ExitStack() as stack:
        lock = stack.enter_context((base_out / "lock").open("w", encoding="utf-8"))
        fcntl.flock(lock, fcntl.LOCK_EX)
        reads = any(part.partition("/")[0] in READERS for part in parts)
        base_parts = ["data", *(SOURCES if reads else ()), *parts]
        made = all(is_done(base_out / job) for job in ("data", "inputs", *jobs_of(base_parts)))
        base_tree = stack.enter_context(checkout(args.base)) if turns or not made else None
        base = Revision("base", base_tree, base_out, base_out, args.steps)
        collect(base, base_parts, args.workers)
        if base.failures:
            raise SystemExit("\n".join(base.failures))
        fcntl.flock(lock, fcntl.LOCK_UN)
        here = Path(git("rev-parse", "--show-toplevel"))
        head_tree = stack.enter_context(checkout(args.head)) if args.head else here
        head_out = Path(tempfile.mkdtemp(prefix="head-", dir=base_out.parent))
        head = Revision("head", head_tree, head_out, base_out, args.steps)
        collect(head, parts, args.workers)
        if turns:
            compare_times(base, head, turns)
    found = list(head.failures)
    for job in jobs:
        if is_done(head_out / job):
            found += [f"{job}/{line}" for line in differences(base_out / job, head_out / job)]
    if found:
        print(*found, f"{len(found)} differences: {head_out}, BASE {base_out}", sep="\n")
        return 1
    shutil.rmtree(head_out)
    print(f"equal to the last bit: {', '.join(jobs)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
