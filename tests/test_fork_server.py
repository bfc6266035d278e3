"""Commands that tests start in forked processes run as they would in a new interpreter."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.parametrize("words", [["-m", "there"], ["there.py"]], ids=["module", "file"])
def test_command_runs_in_the_directory_of_its_caller(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "there.py").write_text("import os, sys\nprint(os.getcwd(), *sys.argv[1:])\n")
    # The server runs since an earlier command, which was started elsewhere.
    subprocess.run([sys.executable, "-m", "mooshak.data", "--help"], capture_output=True)
    monkeypatch.chdir(tmp_path)
    done = subprocess.run(
        [sys.executable, *words, "argument"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"{tmp_path} argument\n"
