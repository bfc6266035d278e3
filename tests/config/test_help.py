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
        f"mooshak_torch.{name}"
        for name in ("train", "sft", "generate", "serve", "evaluate", "plan")
    ),
    *(f"mooshak_jax.{name}" for name in ("train", "sft", "generate", "serve", "evaluate", "plan")),
    "mooshak.data",
    "mooshak.tokenizer",
    "mooshak.corpus.tales",
    "parity.accelerator",
    "parity.check",
    "parity.convert",
    "parity.logits",
    "parity.texts",
    "parity.curve",
    "parity.demo",
    "parity.report",
    "benchmarks",
    "benchmarks.conversion",
    "benchmarks.pack_weights",
    "scripts/api_docs.py",
    "scripts/libreoffice_help.py",
    "scripts/plot_run.py",
    "scripts/smollm2.py",
]
# Prints the imported modules of the frameworks after the help.
RUN = """
import json, runpy, sys
program = sys.argv[1]
sys.argv[1:] = ["--help"]
try:
    if program.endswith(".py"):
        runpy.run_path(program, run_name="__main__")
    else:
        runpy.run_module(program, run_name="__main__", alter_sys=True)
except SystemExit as stop:
    print(json.dumps([stop.code, sorted({"torch", "jax"} & sys.modules.keys())]))
"""


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
    # The parser of both evaluate commands is made in mooshak/evaluation.
    evaluate = {"mooshak_torch.evaluate", "mooshak_jax.evaluate"}
    assert found - {"parity.rank_worker"} == {*programs} - evaluate


@pytest.mark.parametrize("program", COMMANDS)
def test_help(program: str) -> None:
    words = [sys.executable, "-c", RUN, program]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, check=True)
    *help_lines, last = done.stdout.splitlines()
    start = f"python {program}" if program.endswith(".py") else f"python -m {program}"
    assert help_lines[0].startswith(f"usage: {start} ") and help_lines[1] == ""
    assert "[--model" not in done.stdout
    examples = help_lines[help_lines.index("examples:") + 1 :]
    examples = examples[: examples.index("")]
    assert len(examples) >= 2 and all(line.startswith("  ") for line in examples)
    assert json.loads(last) == [0, []]


def test_help_lists_every_key_with_its_default() -> None:
    words = [sys.executable, "-m", "mooshak_torch.train", "--help"]
    text = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, check=True).stdout
    for name, section in get_type_hints(Config).items():
        assert f"\n{name}: " in text
        for key in fields(section):
            assert f"--{name}.{key.name.rstrip('_')} " in text
    for strategy in ("single", "ddp", "fsdp", "hsdp", "deepspeed", "auto"):
        assert strategy in text
    flat = " ".join(text.split())
    assert "Peak learning rate (at least 0 and finite; default: 0.0003)" in flat
    assert "Write TensorBoard events (default: true)" in flat
    assert "Steps of linear warmup (at least 0; default: 100)" in flat
