"""`--help` of every command: one line of usage, examples, and no framework imported."""

import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import get_type_hints

import pytest

from mooshak.config.sections import Config

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
COMMANDS = [
    *(
        f"mooshak_{framework}.{name}"
        for framework in ("torch", "jax")
        for name in "train sft dpo grpo generate serve evaluate exact_match plan".split()
    ),
    "mooshak.data",
    "mooshak.tokenizer",
    "mooshak.corpus.tales",
    "parity.accelerator",
    "parity.align_report",
    "parity.check",
    "parity.convert",
    "parity.logits",
    "parity.texts",
    "parity.curve",
    "parity.demo",
    "parity.demo_align",
    "parity.report",
    "benchmarks",
    "benchmarks.conversion",
    "benchmarks.pack_weights",
    "scripts/api_docs.py",
    "scripts/compare_rollouts.py",
    "scripts/libreoffice_help.py",
    "scripts/page_picture.py",
    "scripts/plot_run.py",
    "scripts/smollm2.py",
]
# Forks a process for each program, without a framework; it prints the program's help and, in its
# last line, the imported modules of the frameworks.
RUN = """
import contextlib, io, json, os, runpy, sys
from pathlib import Path
import mooshak.config.parse  # Shared by the forked processes.
out = Path(sys.argv[1])
for program in sys.argv[2:]:
    if not (pid := os.fork()):
        sys.argv = [program, "--help"]
        with (out / program.replace("/", ".")).open("w") as text, contextlib.redirect_stdout(text):
            try:
                if program.endswith(".py"):
                    runpy.run_path(program, run_name="__main__")
                else:
                    runpy.run_module(program, run_name="__main__", alter_sys=True)
            except SystemExit as stop:
                print(json.dumps([stop.code, sorted({"torch", "jax"} & sys.modules.keys())]))
        os._exit(0)
    os.waitpid(pid, 0)
"""


@pytest.fixture(scope="module")
def helps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a file for each program: its help, then its imports."""
    out = tmp_path_factory.mktemp("help")
    subprocess.run([sys.executable, "-c", RUN, out, *COMMANDS], cwd=ROOT, check=True)
    return out


def test_commands_are_all_modules_with_a_parser() -> None:
    programs = [program for program in COMMANDS if not program.endswith(".py")]
    found = set()
    for package in ("mooshak", "mooshak_torch", "mooshak_jax", "parity", "benchmarks"):
        for path in (ROOT / package).rglob("*.py"):
            text = path.read_text()
            if '__name__ == "__main__"' in text and "_parser(" in text:
                parts = path.relative_to(ROOT).with_suffix("").parts
                found.add(".".join(part for part in parts if part != "__main__"))
    # Started by parity.layouts on every rank, not by a user.
    # The parser of both evaluate commands is made in mooshak/evaluation, that of sft, dpo and
    # grpo in train.
    names = ("evaluate", "sft", "dpo", "grpo")
    shared = {f"mooshak_{framework}.{name}" for framework in ("torch", "jax") for name in names}
    assert shared < {*programs} and found - {"parity.rank_worker"} == {*programs} - shared


@pytest.mark.parametrize("program", COMMANDS)
def test_help(program: str, helps: Path) -> None:
    text = (helps / program.replace("/", ".")).read_text("utf-8")
    *help_lines, last = text.splitlines()
    start = f"python {program}" if program.endswith(".py") else f"python -m {program}"
    assert help_lines[0].startswith(f"usage: {start} ") and help_lines[1] == ""
    assert "[--model" not in text
    examples = help_lines[help_lines.index("examples:") + 1 :]
    examples = examples[: examples.index("")]
    assert len(examples) >= 2 and all(line.startswith("  ") for line in examples)
    assert json.loads(last) == [0, []]


def test_help_lists_every_key_with_its_default(helps: Path) -> None:
    text = (helps / "mooshak_torch.train").read_text("utf-8")
    for name, section in get_type_hints(Config).items():
        assert f"\n{name}: " in text
        for key in fields(section):
            # The adapters of a model are the section `lora`.
            shown = (name, key.name) != ("model", "lora")
            assert (f"--{name}.{key.name.rstrip('_')} " in text) == shown
    for strategy in ("single", "ddp", "fsdp", "hsdp", "deepspeed", "auto"):
        assert strategy in text
    flat = " ".join(text.split())
    assert "Peak learning rate (at least 0 and finite; default: 0.0003)" in flat
    assert "Write TensorBoard events (default: true)" in flat
    assert "Steps of linear warmup (at least 0; default: 100)" in flat
