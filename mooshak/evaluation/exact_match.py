"""Exact match: the share of questions that a model's greedy answer solves word for word."""

import argparse
import json
import sys
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from mooshak.command_line import command_parser
from mooshak.config.sections import Config, DataConfig, SourceConfig
from mooshak.corpus.records import records
from mooshak.corpus.tales import LANGUAGES
from mooshak.data.conversations import Conversation, conversations
from mooshak.errors import InputError, require
from mooshak.evaluation.preferences import preference_accuracy
from mooshak.files import write_atomically
from mooshak.generation.command import add_model_options
from mooshak.generation.lm import LM
from mooshak.tables import print_table
from mooshak.tokenizer.chat_template import Messages, encode_chat, end_of_turn

HELD_OUT_SEED = 1_000_003
"""Seed of the tales that the questions are about; no configuration of this project has it."""

BATCH_ROWS = 64
"""Questions that are answered as one batch."""


@dataclass(frozen=True)
class Question:
    """A prompt with its one right answer."""

    prompt: str | Messages
    answer: str
    language: str


@dataclass(frozen=True)
class Answer:
    """A question with the model's answer."""

    question: Question
    text: str
    finished: bool
    """True if the model ended its answer; one that is cut does not count."""

    @property
    def is_right(self) -> bool:
        """True if the answer is complete and is the expected one."""
        return self.finished and is_match(self.text, self.question.answer)


def is_match(text: str, expected: str) -> bool:
    """Return whether two texts are equal in Unicode NFC, but for white space at the ends."""
    first, second = (unicodedata.normalize("NFC", one).strip() for one in (text, expected))
    return first == second


def read_questions(source: SourceConfig) -> list[Question]:
    """Return the questions of a source, records with `prompt` and `answer` (or `completion`).

    A record may have its own `language`. Raises `InputError` for one without these fields, and for
    a source without records.
    """
    config = Config(data=DataConfig(sources=[source]))
    found = [_parse(where, record, source) for where, record in records(source, config)]
    require(bool(found), f"source {source.name} has no questions; check its path")
    return found


def _parse(where: str, record: dict[str, Any], source: SourceConfig) -> Question:
    prompt, answer = record.get("prompt"), record.get("answer", record.get("completion"))
    if isinstance(answer, list) and len(answer) == 1 and isinstance(answer[0], dict):
        answer = answer[0].get("content")
    if not isinstance(prompt, (str, list)) or not prompt or not isinstance(answer, str):
        raise InputError(
            f"{where}: a question needs the fields prompt (a text or messages) and answer (a text)"
        )
    require(bool(answer.strip()), f"{where}: the answer is empty: no text can match it")
    return Question(prompt, answer, str(record.get("language") or source.language))


def answer_questions(
    lm: LM, questions: Sequence[Question], max_new_tokens: int = 32
) -> Iterator[Answer]:
    """Yield the greedy answer to each question; messages are answered as in a chat.

    Raises `InputError` for a model without a tokenizer, and where a prompt and its answer are
    longer than `max_seq_len`.
    """
    if lm.tokenizer is None:
        raise InputError("the checkpoint has no tokenizer; name one with --tokenizer")
    settings = lm.settings({"temperature": 0.0, "max_new_tokens": max_new_tokens})
    ends = lm.ends(settings) | end_of_turn(lm.tokenizer)
    for start in range(0, len(questions), BATCH_ROWS):
        part = questions[start : start + BATCH_ROWS]
        prompts = [
            lm.encode(one.prompt)
            if isinstance(one.prompt, str)
            else encode_chat(lm.tokenizer, one.prompt)
            for one in part
        ]
        completions = lm._complete(prompts, [0] * len(prompts), settings, ends)
        for one, completion in zip(part, completions, strict=True):
            yield Answer(one, completion.text or "", completion.finish_reason == "stop")


def exact_match(answers: Sequence[Answer]) -> dict[str, dict[str, float]]:
    """Return `exact_match` (a share), `questions` and `unfinished` (numbers) by language."""
    languages = dict.fromkeys(answer.question.language for answer in answers)
    scores = {}
    for language in languages:
        own = [answer for answer in answers if answer.question.language == language]
        scores[language] = {
            "exact_match": sum(answer.is_right for answer in own) / len(own),
            "questions": len(own),
            "unfinished": sum(not answer.finished for answer in own),
        }
    return scores


def exact_match_parser(module: str, doc: str | None) -> argparse.ArgumentParser:
    """Return the parser of `python -m MODULE CHECKPOINT`; `doc` is its docstring."""
    usage = "CHECKPOINT [--jsonl FILE | --count N --seed N] [--preferences TASKS] [--out FILE]"
    parser = command_parser(module, doc, usage)
    add = parser.add_argument
    text = "questions: an object on each line with prompt, answer and language (default: built in)"
    add("--jsonl", metavar="FILE", help=text)
    text = "built-in questions about the tales, in each language"
    add("--count", type=int, default=200, metavar="N", help=text)
    add("--seed", type=int, default=HELD_OUT_SEED, metavar="N", help="seed of their tales")
    text = "longest answer; a longer one is wrong"
    add("--max_new_tokens", "--max-new-tokens", type=int, default=32, metavar="N", help=text)
    text = "names of tasks with pairs: also measure how often the chosen answer is the likelier one"
    add("--preferences", metavar="TASKS", help=text)
    add("--out", type=Path, metavar="FILE", help="write each question with its answer as JSONL")
    add("--json", action="store_true", help="print one JSON object, not a table")
    add_model_options(parser)
    return parser


def questions_of(arguments: argparse.Namespace) -> list[Question]:
    """Return the questions that the arguments name. Raises `InputError`, before a model loads."""
    require(arguments.count > 0, f"--count {arguments.count} must be at least 1")
    out = arguments.out
    require(
        out is None or out.parent.is_dir(), f"--out: there is no directory {out and out.parent}"
    )
    if arguments.jsonl:
        return read_questions(SourceConfig("questions", kind="jsonl", path=arguments.jsonl))
    sources = _tasks("known_answers", arguments)
    return [question for source in sources for question in read_questions(source)]


def pairs_of(arguments: argparse.Namespace) -> list[Conversation]:
    """Return the preference pairs that the arguments name. Raises `InputError` for other tasks."""
    if not arguments.preferences:
        return []
    sources = _tasks(arguments.preferences, arguments)
    config = Config(data=DataConfig(sources=sources))
    found = [one for source in sources for one in conversations(source, config)]
    for one in found:
        require(one.shape == "preference", f"--preferences: {one.where} is no pair of answers")
    return found


def _tasks(names: str, arguments: argparse.Namespace) -> list[SourceConfig]:
    """Return a source of built-in tasks for each language."""
    return [
        SourceConfig(
            f"held-out-{language}",
            kind="tasks",
            path=names,
            language=language,
            documents=arguments.count,
            seed=arguments.seed,
        )
        for language in LANGUAGES
    ]


def run_exact_match(
    arguments: argparse.Namespace,
    questions: Sequence[Question],
    pairs: Sequence[Conversation],
    load: Callable[..., LM],
) -> None:
    """Load the model, answer the questions, and print the scores."""
    lm = load(
        arguments.checkpoint,
        arguments.dtype,
        device=arguments.device,
        tokenizer=arguments.tokenizer,
    )
    answers = []
    for answer in answer_questions(lm, questions, arguments.max_new_tokens):
        answers.append(answer)
        if sys.stderr.isatty():
            print(f"\r{len(answers)} of {len(questions)} questions", end="", file=sys.stderr)
    if arguments.out is not None:
        rows = [
            asdict(one.question) | {"text": one.text, "is_right": one.is_right} for one in answers
        ]
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        write_atomically(arguments.out, "\n".join(lines) + "\n")
    scores = exact_match(answers)
    for language, score in preference_accuracy(lm, pairs).items():
        scores.setdefault(language, {}).update(score)
    report(scores, arguments.json)


def report(scores: dict[str, dict[str, float]], as_json: bool) -> None:
    """Print the scores as one JSON object, or as a table."""
    if as_json:
        print(json.dumps(scores))
        return
    columns: dict[str, Callable[[float], str]] = {
        "questions": str,
        "exact_match": "{:.1%}".format,
        "unfinished": str,
        "pairs": str,
        "preference_accuracy": "{:.1%}".format,
    }
    used = [name for name in columns if any(name in score for score in scores.values())]
    titles = [name.replace("_", " ") for name in used]
    table = Table("language", *titles, title="questions and pairs")
    for language, score in scores.items():
        cells = (columns[name](score[name]) if name in score else "" for name in used)
        table.add_row(language, *cells)
    print_table(table)
