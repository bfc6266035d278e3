"""A command whose output is closed ends without a traceback."""

import subprocess
import sys

CODE = """
from mooshak.errors import command

@command
def main():
    for i in range(100_000):
        print(i)

main()
"""


def test_closed_output_ends_the_command_quietly() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", CODE], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 1
