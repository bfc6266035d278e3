"""scripts/libreoffice_help.py: the extracted text of a small pair of packages, to the letter."""

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from mooshak.config.parse import load_config

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "libreoffice_help.py"

PAGE = """<!DOCTYPE html>
<html lang="hi" dir="ltr">
<head><title>Title</title><script src="help.js"></script><style>p {{ color: red }}</style></head>
<body>
<header id="TopLeftHeader"><a class="logo"><p dir="auto">LibreOffice 7.4 Help</p></a></header>
<div id="DisplayArea" itemscope="true"><meta itemprop="keywords" content="keyword">
{body}
</div>
<footer><div class="debug"><h3>Help content debug info:</h3></div></footer>
</body></html>
"""
# What the two packages have in common: an untranslated page, in which the Hindi one has some text.
HINDI = {
    "swriter/guide/undo.html": """
<h1 id="hd1"><a name="undo"></a>पूर्ववत</h1>
<p class="paragraph">पिछला कमांड <span class="emph">रद्द</span>
   करता है; LibreOffice&nbsp;में&nbsp;क्‍या?<br>दूसरी &amp; पंक्ति</p>
<p class="paragraph">To undo, choose Edit - Undo in any of the modules.</p>
<ul><li><p class="listitem">पहला</p></li><li><p class="listitem">Second</p></li></ul>
<table><tr><td><p>नाम</p></td><td><p>12</p></td></tr></table>
<div class="howtoget"><p class="howtogetheader">कमांड तक पहुँचने के लिए...</p>
<div class="howtogetbody"><p>संपादन - पूर्ववत चुनें</p></div></div>
<pre><code>Sub Main
  REM टिप्पणी
End Sub</code></pre>
<div class="relatedtopics"><p class="related">संबंधित विषय</p><p><a href="x">और पढ़ें</a></p></div>
""",
    "swriter/guide/zoom.html": "<h1>Zoom</h1><p>Nothing here is translated.</p>",
}
QUOTED = "यह वाक्य दो पृष्ठों पर एक ही रूप में लिखा गया है."
HINDI["shared/01/a.html"] = f"<p>{QUOTED}</p><p>{QUOTED}</p><p>उदाहरण</p>"
HINDI["shared/01/b.html"] = f"<p>उदाहरण</p><p>{QUOTED}</p><p>नया</p>"
KEPT_HINDI = [
    ("shared/01/a.html", f"{QUOTED}\n{QUOTED}\nउदाहरण"),
    ("shared/01/b.html", "उदाहरण\nनया"),
    (
        "swriter/guide/undo.html",
        "पूर्ववत\nपिछला कमांड रद्द करता है; LibreOffice में क्‍या?\nदूसरी & पंक्ति\nपहला\nनाम\n"
        "संपादन - पूर्ववत चुनें",
    ),
]

ENGLISH = {
    "scalc/01/sum.html": """
<h2>SUM</h2>
<p>Press <span class="switchinline"><span hidden="true" class="MAC">Command</span><span
hidden="true">Ctrl</span></span>+Z to <b>un</b>do.</p>
<span class="switch"> <span hidden="true" class="WRITER"><p>In Writer.</p></span>
<span hidden="true" class="CALC"><p>In Calc, <span class="switchinline"><span hidden="true"
class="UNIX">Linux</span><span hidden="true">elsewhere</span></span>.</p></span>
<span hidden="true"><p>In the others.</p></span></span>
<p class="code">=SUM(1;2)</p><table><tr><th>A</th><td>3</td></tr></table>
<pre>
    If a < b Then
        c = 1<br>
    End If
</pre>
<p></p>""",
    "shared/main.html": "<p>In <span class='switchinline'><span hidden='true' class='WRITER'>Writer"
    "</span><span hidden='true'>all</span></span>: the Hindi word नमस्ते.</p><p>हिन्दी</p>",
    "shared/numbers.html": "<p>1</p><p>2</p>",
}
KEPT_ENGLISH = [
    (
        "scalc/01/sum.html",
        "SUM\nPress Ctrl+Z to undo.\nIn Calc, Linux.\n=SUM(1;2)\nA\n3\n"
        "If a < b Then\n    c = 1\nEnd If",
    ),
    ("shared/main.html", "In Writer: the Hindi word नमस्ते."),
]


def unpacked(root: Path, folder: str, pages: dict[str, str]) -> Path:
    """A directory as `dpkg-deb -x` makes it."""
    for path, body in pages.items():
        file = root / "usr/share/libreoffice/help" / folder / "text" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(PAGE.format(body=body))
    (root / "usr/share/libreoffice/help" / folder / "noscript.html").write_text("<p>Other</p>")
    return root


def packed(root: Path) -> Path:
    """The same as a .deb file: an `ar` archive with a tar archive in it."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:xz") as archive:
        archive.add(root, ".")
    parts = {"debian-binary": b"2.0\n", "control.tar.xz": b"odd", "data.tar.xz": data.getvalue()}
    content = b"!<arch>\n"
    for name, part in parts.items():
        header = f"{name:16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(part):<10}`\n"
        content += header.encode() + part + b"\n" * (len(part) % 2)
    package = root.with_suffix(".deb")
    package.write_bytes(content)
    return package


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Call the script as a user does."""
    return subprocess.run(
        [sys.executable, SCRIPT, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def read(path: Path) -> list[tuple[str, str]]:
    """(path, text) of the documents in a JSONL file."""
    documents = map(json.loads, path.read_text().splitlines())
    return [(document["path"], document["text"]) for document in documents]


@pytest.fixture
def packages(tmp_path: Path) -> tuple[Path, Path]:
    """The two packages, unpacked."""
    return (
        unpacked(tmp_path / "help-hi", "hi", HINDI),
        unpacked(tmp_path / "help-en-us", "en-US", ENGLISH),
    )


@pytest.mark.slow
@pytest.mark.parametrize("deb", [False, True], ids=["directories", "packages"])
def test_extracted_text(packages: tuple[Path, Path], tmp_path: Path, deb: bool) -> None:
    result = run(*(map(packed, packages) if deb else packages), "--out", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert read(tmp_path / "out" / "hi.jsonl") == KEPT_HINDI
    assert read(tmp_path / "out" / "en.jsonl") == KEPT_ENGLISH
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["en.jsonl", "hi.jsonl"]


@pytest.mark.slow
def test_printed_figures(packages: tuple[Path, Path], tmp_path: Path) -> None:
    output = run(*packages, "--out", tmp_path / "out").stdout
    hindi, english = (line for line in output.splitlines() if line[2:4] in ("hi", "en"))
    kept = sum(len(text.encode()) - text.count("\n") for _, text in KEPT_HINDI)
    quoted = len(QUOTED.encode())
    assert [cell.strip() for cell in hindi.strip("│").split("│")] == [
        "hi", "4", "3", f"11 ({kept:,})", "6 (133)", f"1 ({quoted})"
    ]  # fmt: skip
    assert english.split("│")[2:4] == [" " * 5 + "3 ", " " * 10 + "2 "]


@pytest.mark.slow
def test_repeats_are_kept_when_asked(packages: tuple[Path, Path], tmp_path: Path) -> None:
    assert run(*packages, "--out", tmp_path / "out", "--keep-repeats").returncode == 0
    documents = dict(read(tmp_path / "out" / "hi.jsonl"))
    assert documents["shared/01/b.html"] == f"उदाहरण\n{QUOTED}\nनया"


@pytest.mark.slow
def test_bad_input_is_one_line(packages: tuple[Path, Path], tmp_path: Path) -> None:
    hindi, english = packages
    deb, out = packed(hindi), tmp_path / "out"
    (no_package := tmp_path / "text.deb").write_text("not a package")
    (empty := tmp_path / "empty").mkdir()
    (cut := tmp_path / "cut.deb").write_bytes(deb.read_bytes()[:400])
    (short := tmp_path / "short.deb").write_bytes(deb.read_bytes()[:100])
    for packages_, reason in (
        ((no_package, english), "is not a Debian package"),
        ((tmp_path / "nowhere.deb", english), "No such file"),
        ((empty, english), "has no help pages"),
        ((cut, english), "cannot be read"),
        ((short, english), "is truncated"),
        ((hindi,), "no package has pages in en"),
    ):
        result = run(*packages_, "--out", out)
        assert result.returncode == 2, reason
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1
        assert reason in result.stderr
        assert not out.exists()


def test_config_reads_what_the_script_writes() -> None:
    config = load_config(ROOT / "configs" / "libreoffice-help.yaml")
    assert {source.language: source.path for source in config.data.sources} == {
        "hi": "data/libreoffice-help/hi.jsonl",
        "en": "data/libreoffice-help/en.jsonl",
    }
