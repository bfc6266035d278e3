"""Short bilingual tales: the same tale in Hindi and in English, a pure function of (seed, index).

A tale is a plot (`tale_plots.txt`) whose roles are filled with nouns, adjectives and names
(`tale_words.txt`) and whose sentences are chosen from alternatives, the same in both languages.
Hindi is inflected here: oblique case before a postposition, agreement of verbs and adjectives in
gender and number; the plots mark which word agrees with which role.
"""

import hashlib
import re
import unicodedata
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TypeVar

from mooshak.command_line import command_parser
from mooshak.errors import InputError, command

T = TypeVar("T")

LANGUAGES = ("hi", "en")
SECTIONS = ("title", "opening", "wish", "obstacle", "help", "result", "moral")
_PARAGRAPHS = (("opening", "wish"), ("obstacle", "help"), ("result",))
_MORAL = {"hi": "सीख", "en": "Moral"}


@dataclass(frozen=True)
class Noun:
    """A noun of the tales; `tags` are the roles that it can fill."""

    english: str
    hindi: str
    masculine: bool
    declines: bool
    tags: frozenset[str]


@dataclass(frozen=True)
class Actor:
    """The noun that fills a role. `adjective` and `name` are (English, Hindi) or None."""

    noun: Noun
    adjective: tuple[str, str] | None
    name: tuple[str, str] | None


@dataclass(frozen=True)
class Tale:
    """A tale: its text is `sections[section][language]`; `cast` maps roles to actors."""

    plot: str
    cast: Mapping[str, Actor]
    sections: Mapping[str, Mapping[str, str]]

    def text(self, language: str) -> str:
        """Return title, three paragraphs and the moral."""
        paragraphs = (
            " ".join(self.sections[section][language] for section in sections)
            for sections in _PARAGRAPHS
        )
        moral = f"{_MORAL[language]}: {self.sections['moral'][language]}"
        return "\n".join([self.sections["title"][language], "", *paragraphs, "", moral])


def tale(seed: int, index: int, languages: Sequence[str] = LANGUAGES) -> Tale:
    """Return the tale of an index, which does not depend on the languages or on other tales."""
    draw = _Draw(seed, index)
    plot = draw.pick(plots())
    cast = _cast(plot, draw)
    phrases = {name: draw.pick(choices) for name, choices in _words().phrases.items()}
    sections = {}
    for section, beats in plot.sections.items():
        pairs = [draw.pick(b.pairs) for b in beats if not (b.optional and draw.pick((True, False)))]
        sections[section] = {
            language: " ".join(_filled(pair, language, cast, phrases) for pair in pairs)
            for language in languages
        }
    return Tale(plot.name, cast, sections)


def documents(
    seed: int, count: int, languages: Sequence[str] = LANGUAGES
) -> Iterator[tuple[str, str]]:
    """Yield (language, text) of the tales 0 to `count` - 1, in each of the languages."""
    for language in languages:
        if language not in LANGUAGES:
            raise InputError(f"there are no tales in {language!r}; use hi or en")
    for index in range(count):
        written = tale(seed, index, languages)
        yield from ((language, written.text(language)) for language in languages)


def version() -> int:
    """Return a checksum of the plots, the words and a sample of the tales.

    It changes when the tales change, not with every change of the code.
    """
    here = Path(__file__)
    files = (here.with_name("tale_plots.txt"), here.with_name("tale_words.txt"))
    sample = "".join(text for _, text in documents(seed=0, count=8))
    return zlib.crc32(b"".join([*(file.read_bytes() for file in files), sample.encode()]))


@dataclass(frozen=True)
class Role:
    """A role of a plot: its possible nouns and adjectives, and whether it may have a name."""

    nouns: tuple[Noun, ...]
    adjectives: tuple[tuple[str, str], ...]
    named: bool


@dataclass(frozen=True)
class Beat:
    """One or two sentences: alternative pairs (Hindi, English) of templates."""

    optional: bool
    pairs: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Plot:
    """Roles and sections of a tale."""

    name: str
    roles: Mapping[str, Role]
    sections: Mapping[str, tuple[Beat, ...]] = field(repr=False)


class _Draw:
    """Choices from the bits of a hash, which no release of Python changes."""

    def __init__(self, seed: int, index: int) -> None:
        self.bits = int.from_bytes(hashlib.shake_256(f"tale {seed} {index}".encode()).digest(96))

    def pick(self, choices: Sequence[T]) -> T:
        self.bits, i = divmod(self.bits, len(choices))
        return choices[i]


def _cast(plot: Plot, draw: _Draw) -> dict[str, Actor]:
    cast: dict[str, Actor] = {}
    for letter, role in plot.roles.items():
        taken = {actor.noun for actor in cast.values()}
        noun = draw.pick([noun for noun in role.nouns if noun not in taken])
        adjective = draw.pick(role.adjectives) if role.adjectives else None
        name = None
        if role.named and draw.pick((True, True, False)):
            name = draw.pick(_words().names["m" if noun.masculine else "f"])
        cast[letter] = Actor(noun, adjective, name)
    return cast


# Templates: `{a}`, `{a.case}`, `{a:agreeing}`, `{a/agreeing in the oblique}`, `{a+b:m|f}`, `{day}`.
_SLOT = re.compile(r"\{(\w+)(?:\+(\w+))?(?:([.:/])([^{}]*))?\}")
_POSTPOSITION = re.compile(
    r"\{(\w)(\.a|\.bare)?\}(?= (?:ने|को|से|का|की|के|में|पर|तक)(?![\u0900-\u097f]))"
)
_JOINED = re.compile(r"\{(\w)(\.a|\.bare)?\}(?= और \{\w\.\w*o\})")  # "and" takes the same case.
_SENTENCE_START = re.compile(r"(?:^|(?<=[.!?] )|(?<=[.!?]” )|(?<=“))[a-z]")


def _filled(
    pair: tuple[str, str],
    language: str,
    cast: Mapping[str, Actor],
    phrases: Mapping[str, tuple[str, str]],
) -> str:
    """Return the sentence of a pair (Hindi, English) of templates with its slots filled."""
    hindi = language == "hi"

    def fill(slot: re.Match) -> str:
        who, other, kind, rest = slot.groups()
        if who not in cast:
            return phrases[who][1 if hindi else 0]
        if kind not in (":", "/"):
            return (_hindi_noun if hindi else _english_noun)(cast[who], rest)
        masculine = cast[who].noun.masculine or bool(other and cast[other].noun.masculine)
        first, *second = rest.split("|")
        if masculine:
            return _agree(first, _OBLIQUE) if kind == "/" else first
        return second[0] if second else _agree(first, _FEMININE)

    if hindi:
        return _SLOT.sub(fill, pair[0])
    return _SENTENCE_START.sub(lambda letter: letter[0].upper(), _SLOT.sub(fill, pair[1]))


def _hindi_noun(actor: Actor, case: str | None) -> str:
    """Return a noun phrase; `case`: None direct, "o" oblique, "a", "ao" with article, "bare",
    "bareo" without the name.
    """
    case = case or ""
    oblique, full = case.endswith("o"), case.startswith("a")
    if actor.name and not case.startswith(("a", "bare")):
        return actor.name[1]
    noun = actor.noun
    word = noun.hindi
    if oblique and noun.masculine and noun.declines:
        word = _agree(word.replace(" का ", " के "), _OBLIQUE, only_last=True)
    if not full:
        return word
    endings = () if noun.masculine and not oblique else _OBLIQUE if noun.masculine else _FEMININE
    adjective = f"{_agree(actor.adjective[1], endings)} " if actor.adjective else ""
    of = f"{actor.name[1]} नाम {_agree('का', endings)} " if actor.name else ""
    return f"{of}एक {adjective}{word}"


# Endings of words that agree (the first match is used): masculine direct -> feminine, -> oblique.
_FEMININE = (("िया", "ी"), ("या", "ई"), ("आ", "ई"), ("ा", "ी"))
_OBLIQUE = (("आ", "ए"), ("या", "ये"), ("ा", "े"))


def _agree(phrase: str, endings: Sequence[tuple[str, str]], only_last: bool = False) -> str:
    """Return a phrase with the masculine ending of every word (or the last) replaced."""
    parts = re.split(r"([ -])", phrase)
    for i in range(len(parts) - 1 if only_last else 0, len(parts)):
        for old, new in endings:
            if parts[i].endswith(old):
                parts[i] = parts[i].removesuffix(old) + new
                break
    return "".join(parts)


def noun_phrase(actor: Actor, language: str, case: str | None = None) -> str:
    """Return the noun of an actor as in a tale: "a" with article, adjective and name, "bare".

    A Hindi case may end in "o", oblique. None: the name if there is one, else the noun.
    """
    return (_hindi_noun if language == "hi" else _english_noun)(actor, case)


def adjective(actor: Actor, language: str) -> str:
    """Return the adjective of an actor, in Hindi in its gender; empty if it has none."""
    if actor.adjective is None:
        return ""
    english, hindi = actor.adjective
    if language == "en":
        return english
    return hindi if actor.noun.masculine else _agree(hindi, _FEMININE)


def _english_noun(actor: Actor, case: str | None) -> str:
    """Return a noun phrase; `case`: None definite, "a" with article, adjective and name, "bare", or
    a pronoun.
    """
    if case in _PRONOUNS:
        return _PRONOUNS[case][0 if actor.noun.masculine else 1]
    if case == "bare":
        return actor.noun.english
    if case == "a":
        phrase = f"{actor.adjective[0]} " if actor.adjective else ""
        phrase += actor.noun.english
        article = "an" if phrase.startswith((*"aeiou", "honest")) else "a"
        return f"{article} {phrase}" + (f" named {actor.name[0]}" if actor.name else "")
    return actor.name[0] if actor.name else f"the {actor.noun.english}"


# Only persons and animals have pronouns.
_PRONOUNS = {
    "he": ("he", "she"),
    "him": ("him", "her"),
    "his": ("his", "her"),
    "himself": ("himself", "herself"),
}


@dataclass(frozen=True)
class _Words:
    nouns: tuple[Noun, ...]
    adjectives: Mapping[str, tuple[tuple[str, str], ...]]
    names: Mapping[str, tuple[tuple[str, str], ...]]
    phrases: Mapping[str, tuple[tuple[str, str], ...]]


def _read(name: str) -> list[str]:
    """Return the lines of a data file in NFC, without comments."""
    text = Path(__file__).with_name(name).read_text("utf-8")
    return [x.rstrip() for x in unicodedata.normalize("NFC", text).splitlines() if x[:1] != "#"]


@cache
def _words() -> _Words:
    sections: dict[str, list[str]] = {}
    for line in filter(None, _read("tale_words.txt")):
        if line.startswith("["):
            sections[line.strip("[]")] = lines = []
        else:
            lines.append(line)
    nouns = []
    for line in sections["nouns"]:
        english, hindi, gender, tags = (part.strip() for part in line.split("|"))
        masculine = gender.startswith("m")
        nouns.append(Noun(english, hindi, masculine, "inv" not in gender, frozenset(tags.split())))
    return _Words(
        tuple(nouns),
        dict(_group(line, ",", " ") for line in sections["adjectives"]),
        {sex: _pairs(sections[f"names {sex}"][0], ",", " ") for sex in "mf"},
        dict(_group(line, ";", "=") for line in sections["phrases"]),
    )


def _group(line: str, between: str, within: str) -> tuple[str, tuple[tuple[str, str], ...]]:
    name, _, rest = line.partition(":")
    return name, _pairs(rest, between, within)


def _pairs(text: str, between: str, within: str) -> tuple[tuple[str, str], ...]:
    split = (part.strip().split(within, 1) for part in text.split(between))
    return tuple((english.strip(), hindi.strip()) for english, hindi in split)


_Snippet = tuple[list[str], tuple[tuple[str, str], ...]]


@cache
def plots() -> tuple[Plot, ...]:
    """Return all plots, in the order of `tale_plots.txt`."""
    snippets: dict[str, _Snippet] = {}
    found = []
    for block in "\n".join(_read("tale_plots.txt")).split("\n== ")[1:]:
        head, _, body = block.partition("\n")
        name, *roles = head.split()
        if name.startswith("&"):
            snippets[name] = roles, _beat(body.strip().splitlines()).pairs
            continue
        sections = {}
        for part in re.split(r"^-- ", body, flags=re.MULTILINE)[1:]:
            section, _, lines = part.partition("\n")
            beats = re.sub(r"^(\??&.*)$", r"\n\1\n", lines, flags=re.MULTILINE).strip()
            sections[section] = tuple(
                _called(beat, snippets) if "&" in beat[:2] else _beat(beat.splitlines())
                for beat in re.split(r"\n\n+", beats)
            )
        cast = dict(_role(role) for role in roles)
        found.append(Plot(name, cast, {section: sections[section] for section in SECTIONS}))
    return tuple(found)


def _role(text: str) -> tuple[str, Role]:
    letter, _, what = text.rstrip("!").partition("=")
    tags, _, adjectives = what.partition("/")
    wanted = {tag.replace("_", " ") for tag in tags.split("|")}
    nouns = tuple(n for n in _words().nouns if n.tags & wanted or n.english in wanted)
    choices = _words().adjectives[adjectives] if adjectives else ()
    return letter, Role(nouns, choices, text.endswith("!"))


def _beat(lines: list[str]) -> Beat:
    optional = lines[0] == "?"
    lines = lines[optional:]
    hindi = [_JOINED.sub(_oblique, _POSTPOSITION.sub(_oblique, line)) for line in lines[::2]]
    return Beat(optional, tuple(zip(hindi, lines[1::2], strict=True)))


def _oblique(slot: re.Match) -> str:
    return f"{{{slot[1]}.{(slot[2] or '.')[1:]}o}}"


def _called(call: str, snippets: Mapping[str, _Snippet]) -> Beat:
    """Return the beat of a snippet with its roles renamed to those of the call."""
    name, *roles = call.lstrip("?").split()
    letters, pairs = snippets[name]
    rename = dict(zip(letters, roles, strict=True))

    def renamed(text: str) -> str:
        return re.sub(r"(?<=[{+])[A-Z]\b", lambda letter: rename[letter[0]], text)

    return Beat(
        call[0] == "?", tuple((renamed(hindi), renamed(english)) for hindi, english in pairs)
    )


@command
def main() -> None:
    """Print tales in both languages.

    python -m mooshak.corpus.tales --seed 0 --count 3
    python -m mooshak.corpus.tales --start 17 --language hi
    """
    usage = "[--seed N] [--start N] [--count N] [--language hi|en]"
    parser = command_parser("mooshak.corpus.tales", main.__doc__, usage)
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the tales")
    parser.add_argument("--start", type=int, default=0, metavar="N", help="index of the first tale")
    parser.add_argument("--count", type=int, default=1, metavar="N", help="number of tales")
    parser.add_argument("--language", choices=LANGUAGES, help="print one language only")
    args = parser.parse_args()
    languages = (args.language,) if args.language else LANGUAGES
    for index in range(args.start, args.start + args.count):
        written = tale(args.seed, index, languages)
        for language in languages:
            print(written.text(language), end="\n\n\n")


if __name__ == "__main__":
    main()
