"""Questions about the beginning of a tale, which it answers in one word or phrase."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any

from mooshak.corpus.tales import LANGUAGES, Actor, Tale, adjective, noun_phrase, tale
from mooshak.corpus.tasks.draw import assistant, pick, user


@dataclass(frozen=True)
class Question:
    """A question about a tale, in both languages."""

    kind: str
    """name, who, place or quality."""
    index: int
    """The tale."""
    text: dict[str, str]
    """Language -> beginning of the tale."""
    question: dict[str, str]
    answer: dict[str, str]

    def prompt(self, language: str) -> str:
        """Return the beginning of the tale with the question."""
        return f"{self.text[language]}\n\n{self.question[language]}"


def generate(seed: int, language: str) -> Iterator[dict[str, Any]]:
    """Yield a question about each tale that answers one."""
    for asked in questions(seed):
        yield {
            "prompt": user(asked.prompt(language)),
            "completion": assistant(asked.answer[language]),
            "task": "questions",
            "language": language,
        }


def questions(seed: int) -> Iterator[Question]:
    """Yield the questions of a seed, the same in every language."""
    for index in count():
        if possible := _possible(index, tale(seed, index)):
            kind = pick(sorted({one.kind for one in possible}), "kind", seed, index)
            like = [one for one in possible if one.kind == kind]
            yield pick(like, "question", seed, index)


def _possible(index: int, written: Tale) -> list[Question]:
    """Return the questions that the opening of a tale answers in both languages."""
    text = {language: written.sections["opening"][language] for language in LANGUAGES}
    found = []

    def ask(kind: str, question: tuple[str, str], answer: tuple[str, str]) -> None:
        both = [dict(zip(LANGUAGES, pair, strict=True)) for pair in (question, answer)]
        found.append(Question(kind, index, text, *both))

    place = written.cast.get("p")
    for actor in written.cast.values():
        if not _is_told(actor, text):
            continue
        noun, who = actor.noun, [noun_phrase(actor, language) for language in LANGUAGES]
        lives, like = ("रहता", "कैसा") if noun.masculine else ("रहती", "कैसी")
        bare = noun_phrase(actor, "hi", "bareo"), noun_phrase(actor, "en", "bare")
        if actor.name:
            names = actor.name[1], actor.name[0]
            ask(
                "name",
                (f"{bare[0]} का नाम क्या है?", f"What is the name of the {bare[1]}?"),
                names,
            )
            an = "an" if bare[1].startswith(tuple("aeiou")) else "a"
            ask(
                "who",
                (f"{names[0]} कौन है?", f"Who is {names[1]}?"),
                (f"एक {noun_phrase(actor, 'hi', 'bare')}", f"{an} {bare[1]}"),
            )
        ask(
            "quality",
            (f"{who[0]} {like} है?", f"What is {who[1]} like?"),
            (adjective(actor, "hi"), adjective(actor, "en")),
        )
        if place is not None and actor is written.cast.get("a") and _is_told(place, text):
            ask(
                "place",
                (f"{who[0]} कहाँ {lives} है?", f"Where does {who[1]} live?"),
                (f"{noun_phrase(place, 'hi', 'ao')} में", f"in {noun_phrase(place, 'en', 'a')}"),
            )
    return found


def _is_told(actor: Actor, text: dict[str, str]) -> bool:
    """Return whether a text introduces an actor with its adjective, in both languages."""
    if actor.adjective is None:
        return False
    hindi = (noun_phrase(actor, "hi", case) in text["hi"] for case in ("a", "ao"))
    return any(hindi) and noun_phrase(actor, "en", "a") in text["en"]
