"""Extract the Hindi and English LibreOffice help as training text: `hi.jsonl` and `en.jsonl`.

A document is a page. Headings, paragraphs, list items and table cells become lines, and listings
keep their lines. Most of the Hindi help is not translated: a paragraph of a Hindi page is retained
only if at least half of its letters are Devanagari. Pages quote each other: a paragraph of eight
words or more is retained only on the first page that contains it, so that held-out text does not
appear in the training text.

python scripts/libreoffice_help.py libreoffice-help-hi_*.deb libreoffice-help-en-us_*.deb
python scripts/libreoffice_help.py unpacked/ --keep-repeats --out data/with-repeats
"""

import io
import json
import lzma
import tarfile
import textwrap
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path

from rich.table import Table

from mooshak.command_line import command_parser
from mooshak.errors import InputError, command
from mooshak.files import atomic_write
from mooshak.tables import print_table

FOLDERS = {"hi": "help/hi/text/", "en": "help/en-US/text/"}
"""Directory of the pages of each language in its package."""
REPEAT_WORDS = 8
"""Shorter paragraphs ("Example", "Choose Edit - Undo.") may repeat on any number of pages."""

_VOID = frozenset("area base br col embed hr img input link meta source track wbr".split())
_INLINE = frozenset("a b bdo code em i img meta small span strong sub sup u wbr".split())
# Classes of elements that are not text of the page: links to other pages, headings of commands.
_SKIPPED = frozenset({"related", "relatedtopics", "howtogetheader"})
# Some text differs by program (other pages show the text for Writer) and by operating system.
_PROGRAMS = {
    "sbasic": "BASIC",
    "scalc": "CALC",
    "schart": "CHART",
    "sdatabase": "BASE",
    "sdraw": "DRAW",
    "simpress": "IMPRESS",
    "smath": "MATH",
}


class Page(HTMLParser):
    """The paragraphs of a help page, as displayed on Linux."""

    def __init__(self, html: str, module: str) -> None:
        super().__init__()
        self.paragraphs: list[str] = []
        self._variants = {"UNIX", _PROGRAMS.get(module, "WRITER")}
        self._open: list[str] = []  # Open tags.
        # Depths (numbers of open tags) of the help text, and of a part that is skipped.
        self._inside = self._skipped = 0
        self._switches: list[tuple[int, bool]] = []  # Depth, and whether a variant was shown.
        self._text: list[str] = []
        self.feed(html)
        self.close()
        self._end_paragraph()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "br" and "pre" in self._open:
            self.handle_data("\n")
        elif tag not in _INLINE:
            self._end_paragraph()
        if tag in _VOID:
            return
        self._open.append(tag)
        depth, attributes = len(self._open), dict(attrs)
        name = attributes.get("class") or ""
        if attributes.get("id") == "DisplayArea":
            self._inside = depth
        elif self._skipped:
            return
        elif self._switches and depth == self._switches[-1][0] + 1:
            switch, shown = self._switches[-1]
            # The variant without a name is the last one, the default.
            if shown or (name and name not in self._variants):
                self._skipped = depth
            else:
                self._switches[-1] = switch, True
        elif name in ("switch", "switchinline"):
            self._switches.append((depth, False))
        elif name in _SKIPPED or tag in ("script", "style"):
            self._skipped = depth

    def handle_endtag(self, tag: str) -> None:
        if tag not in _INLINE:
            self._end_paragraph(listing=tag == "pre")
        if tag not in self._open:
            return
        while self._open.pop() != tag:
            pass
        depth = len(self._open)
        if depth < self._inside:
            self._inside = 0
        if depth < self._skipped:
            self._skipped = 0
        while self._switches and depth < self._switches[-1][0]:
            self._switches.pop()

    def handle_data(self, data: str) -> None:
        if self._inside and not self._skipped:
            self._text.append(data)

    def _end_paragraph(self, listing: bool = False) -> None:
        text = "".join(self._text)
        self._text.clear()
        if listing:
            lines = textwrap.dedent(text.expandtabs(4)).splitlines()
            text = "\n".join(line.rstrip() for line in lines if line.strip())
        else:
            text = " ".join(text.split())
        if text:
            self.paragraphs.append(text)


def language_of(text: str) -> str | None:
    """Return hi if at least half of the letters are Devanagari, else en; None without letters."""
    # Vowel signs have category M.
    letters = [character for character in text if unicodedata.category(character)[0] in "LM"]
    if not letters:
        return None
    devanagari = sum("\u0900" <= character <= "\u097f" for character in letters)
    return "hi" if 2 * devanagari >= len(letters) else "en"


class Counts(Counter[str]):
    """Numbers of paragraphs and bytes that were kept, or why they were not."""

    def add(self, what: str, text: str) -> None:
        """Count a paragraph."""
        self[f"{what} paragraphs"] += 1
        self[f"{what} bytes"] += len(text.encode())


def documents(
    pages: dict[str, bytes], language: str, keep_repeats: bool, counts: Counts
) -> Iterator[dict[str, str]]:
    """Yield a document per page with text in its language, in the order of the paths."""
    # English pages retain numbers and formulas, too; Hindi pages do not.
    wanted = {"hi": ("hi",), "en": ("en", None)}[language]
    earlier: set[str] = set()
    for path, html in sorted(pages.items()):
        kept = []
        for text in Page(html.decode("utf-8", "replace"), path.split("/")[0]).paragraphs:
            repeatable = keep_repeats or len(text.split()) < REPEAT_WORDS
            if language_of(text) not in wanted:
                counts.add("other", text)
            elif text in earlier and not repeatable:
                counts.add("repeated", text)
            else:
                counts.add("kept", text)
                kept.append(text)
        earlier.update(kept)
        # A page with only numbers is dropped.
        if any(language_of(text) == language for text in kept):
            counts["pages"] += 1
            yield {"text": "\n".join(kept), "path": path}


def read_pages(package: Path) -> dict[str, dict[str, bytes]]:
    """Read the pages of a package: language -> path below `text/` -> content."""
    found: dict[str, dict[str, bytes]] = {language: {} for language in FOLDERS}
    for name, content in _html_files(package):
        for language, folder in FOLDERS.items():
            if folder in name:
                found[language][name.partition(folder)[2]] = content
    if not any(found.values()):
        raise InputError(
            f"{package} has no help pages (.../{FOLDERS['hi']} or .../{FOLDERS['en']}); give the "
            "Debian packages libreoffice-help-hi and libreoffice-help-en-us"
        )
    return found


def _html_files(package: Path) -> Iterator[tuple[str, bytes]]:
    if package.is_dir():
        for path in package.rglob("*.html"):
            yield path.as_posix(), path.read_bytes()
        return
    try:
        content = package.read_bytes()
    except OSError as error:
        raise InputError(f"{package}: {error.strerror}; give a .deb file or a directory") from None
    try:
        with tarfile.open(fileobj=io.BytesIO(_data_member(content, package))) as archive:
            for member in archive:
                if member.name.endswith(".html") and (file := archive.extractfile(member)):
                    yield member.name, file.read()
    except (tarfile.TarError, lzma.LZMAError, EOFError, OSError) as error:
        raise InputError(
            f"{package}: its data cannot be read ({error}); download it again, or unpack it with "
            "`dpkg-deb -x` and give the directory"
        ) from None


def _data_member(content: bytes, package: Path) -> bytes:
    """Return the member data.tar.* of a .deb file, an `ar` archive (deb(5))."""
    if not content.startswith(b"!<arch>\ndebian-binary"):
        raise InputError(f"{package} is not a Debian package; give a .deb file or a directory")
    at = 8
    while (header := content[at : at + 60])[48:58].strip().isdigit():
        size = int(header[48:58])
        if header.startswith(b"data.tar"):
            return content[at + 60 : at + 60 + size]
        at += 60 + size + size % 2
    raise InputError(f"{package} is truncated: it has no data.tar; download it again")


def _summary(counts: dict[str, Counts]) -> Table:
    table = Table(title="paragraphs (and bytes)")
    columns = ("pages", "pages kept", "kept", "not in this language", "repeated")
    table.add_column("language")
    for column in columns:
        table.add_column(column, justify="right")
    for language, n in counts.items():
        cells = (
            f"{n[f'{what} paragraphs']:,} ({n[f'{what} bytes']:,})"
            for what in ("kept", "other", "repeated")
        )
        table.add_row(language, f"{n['all pages']:,}", f"{n['pages']:,}", *cells)
    return table


@command
def main(argv: Sequence[str] | None = None) -> None:
    usage = "PACKAGE ... [--out DIR] [--keep-repeats]"
    parser = command_parser("scripts/libreoffice_help.py", __doc__, usage)
    text = ".deb files of libreoffice-help-hi and libreoffice-help-en-us, or unpacked directories"
    parser.add_argument("packages", nargs="+", type=Path, metavar="PACKAGE", help=text)
    out = Path("data/libreoffice-help")
    parser.add_argument("--out", type=Path, default=out, metavar="DIR", help="directory to write")
    text = "retain paragraphs that an earlier page contains"
    parser.add_argument("--keep-repeats", action="store_true", help=text)
    options = parser.parse_args(argv)
    pages: dict[str, dict[str, bytes]] = {language: {} for language in FOLDERS}
    for package in options.packages:
        for language, found in read_pages(package).items():
            pages[language] |= found
    for language, found in pages.items():
        if not found:
            raise InputError(f"no package has pages in {language}; give the one that has too")
    counts = {language: Counts({"all pages": len(found)}) for language, found in pages.items()}
    for language, found in pages.items():
        with atomic_write(options.out / f"{language}.jsonl") as file:
            for document in documents(found, language, options.keep_repeats, counts[language]):
                file.write(json.dumps(document, ensure_ascii=False).encode() + b"\n")
    print_table(_summary(counts))


if __name__ == "__main__":
    main()
