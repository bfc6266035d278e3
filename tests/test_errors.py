"""Errors of files and Ctrl-C end a command in one line, a closed output without a traceback."""

import subprocess
import sys
from pathlib import Path

import pytest

from mooshak.errors import command
from mooshak.files import write_atomically

CODE = """
from mooshak.errors import command

@command
def main():
    for i in range(100_000):
        print(i)

main()
"""


@pytest.mark.slow
def test_closed_output_ends_the_command_quietly() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", CODE], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 1


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("file/below", "File exists"),
        ("directory", "Is a directory"),
        ("x" * 300, "File name too long"),
        ("/proc/none/here", "No such file or directory"),
    ],
)
def test_file_error_is_one_line_with_the_path(
    path: str, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "directory").mkdir()

    @command
    def main() -> None:
        write_atomically(tmp_path / path, "text")

    with pytest.raises(SystemExit) as stopped:
        main()
    (line,) = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and line.startswith("error: ")
    assert reason in line and ("/proc/none" if path[0] == "/" else str(tmp_path)) in line


def test_interrupt_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    @command
    def main() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 130 and capsys.readouterr().err == "error: interrupted\n"


def test_error_without_a_file_stays_a_traceback() -> None:
    @command
    def main() -> None:
        raise FileNotFoundError("not of the user's making")

    with pytest.raises(FileNotFoundError):
        main()
