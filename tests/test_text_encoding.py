"""Text is UTF-8 in every locale: every open() of text names its encoding, and commands use it."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("mooshak", "mooshak_torch", "mooshak_jax", "parity", "benchmarks", "scripts")
METHODS = {"read_text": 0, "write_text": 1}
"""Method of `Path` -> position of its argument `encoding`."""


def without_encoding(tree: ast.Module) -> Iterator[ast.Call]:
    """Yield the calls that read or write text in the encoding of the locale."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or any(k.arg == "encoding" for k in node.keywords):
            continue
        keywords = {keyword.arg: keyword.value for keyword in node.keywords}
        name = node.func.attr if isinstance(node.func, ast.Attribute) else ""
        owner = node.func.value if isinstance(node.func, ast.Attribute) else None
        if name in METHODS and len(node.args) <= METHODS[name]:
            yield node
        if "text" in keywords and ast.unparse(node.func).startswith("subprocess."):
            yield node
        is_builtin = isinstance(node.func, ast.Name) and node.func.id == "open"
        is_path = name == "open" and ast.unparse(owner) not in ("tarfile", "os", "tensorstore")
        if is_builtin or is_path or name == "fdopen":
            mode = keywords.get("mode", (node.args[0 if is_path else 1 :] or [None])[0])
            is_bytes = isinstance(mode, ast.Constant) and "b" in str(mode.value)
            if not is_bytes:
                yield node


def test_every_text_file_has_an_encoding() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{call.lineno}: {ast.unparse(call)}"
        for folder in FOLDERS
        for path in sorted((ROOT / folder).rglob("*.py"))
        for call in without_encoding(ast.parse(path.read_text("utf-8")))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "line",
    [
        "open(name)",
        "open(name, 'w')",
        "path.open('a')",
        "path.read_text()",
        "path.write_text(text)",
        "os.fdopen(1, 'w')",
        "subprocess.run(words, text=True)",
    ],
)
def test_text_without_an_encoding_is_found(line: str) -> None:
    assert list(without_encoding(ast.parse(line)))
    better = f"{line[:-1]}, encoding='utf-8')".replace("(,", "(")
    assert not list(without_encoding(ast.parse(better)))


CODE = """
import sys
from mooshak.errors import command

@command
def main():
    print(sys.argv[1])
    open(sys.argv[1]).close()

main()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "locale",
    [
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"PYTHONIOENCODING": "ascii"},
    ],
)
def test_command_prints_and_reads_hindi_in_any_locale(locale: dict[str, str]) -> None:
    words = [sys.executable, "-c", CODE, "चूहा"]
    done = subprocess.run(words, env=os.environ | locale, cwd=ROOT, capture_output=True)
    text = "चूहा" if "LC_ALL" in locale else "चूहा".encode("ascii", "backslashreplace").decode()
    assert done.stdout.decode() == text + "\n" and done.returncode == 2
    assert done.stderr.startswith(b"error: No such file or directory: ")
