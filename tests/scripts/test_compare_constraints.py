"""The comparison of libraries of constrained decoding: a table of those that are installed."""

import subprocess
import sys

import pytest

from mooshak.tokenizer.base import Tokenizer

pytestmark = pytest.mark.slow


def test_comparison_has_a_line_for_each_constraint(tiny_tokenizer: Tokenizer) -> None:
    command = [sys.executable, "scripts/compare_constraints.py", str(tiny_tokenizer.path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if "llguidance" in line]
    assert len(rows) == 2 and all(row.count("us") == 2 for row in rows)
