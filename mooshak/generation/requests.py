"""Prompts of the generate commands: from options, files and standard input."""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from mooshak.config.generate import GenerateConfig
from mooshak.errors import InputError, require
from mooshak.generation.lm import Prompt
from mooshak.generation.settings import make_settings
from mooshak.tokenizer.chat_template import Messages

SETTINGS = tuple(one.name for one in fields(GenerateConfig))

STDIN = "-"
"""Name of standard input, or output, in place of a file."""


@dataclass(frozen=True)
class Request:
    """A prompt, or the messages of a chat, with its own settings."""

    source: str
    """File and line, for errors; empty for an option."""
    prompt: Prompt | None = None
    messages: Messages | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)


def read_requests(args: argparse.Namespace) -> list[Request]:
    """Return the prompts that the arguments name: `--prompt`, then `--prompts`, then `--jsonl`.

    Settings, files and lines are checked as far as no model is needed. Raises `InputError`.
    """
    given = given_settings(args)
    make_settings(given)
    named = [args.prompt, args.prompts, args.jsonl]
    if args.interactive:
        require(not any(named), "--interactive asks for the prompts; remove the other ones")
        require(args.jsonl_out is None, "--interactive prints the replies; remove --jsonl_out")
        require(given.get("n", 1) == 1, "--interactive has one reply for a prompt; set n to 1")
        return []
    one = "--prompt TEXT, --prompts FILE, --jsonl FILE or --interactive"
    require(any(named), f"there is no prompt; give {one}")
    require(
        not args.prompts == args.jsonl == STDIN, "--prompts and --jsonl cannot both read from -"
    )
    found = [Request("", prompt) for prompt in args.prompt or ()]
    if args.prompts:
        found += [Request(source, line) for source, line in _lines(args.prompts)]
    if args.jsonl:
        found += [_parse(source, line, given) for source, line in _lines(args.jsonl)]
    require(bool(found), f"there is no prompt in {args.prompts or args.jsonl}")
    if args.jsonl_out not in (None, STDIN):
        path = Path(args.jsonl_out)
        read = [Path(file).resolve() for file in (args.prompts, args.jsonl) if file]
        require(path.resolve() not in read, f"--jsonl_out {path} is read; name another file")
        require(not path.is_dir(), f"--jsonl_out {path} is a directory; name a file")
        require(path.parent.is_dir(), f"--jsonl_out: there is no directory {path.parent}")
    return found


def given_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return the settings that are among the arguments."""
    return {name: value for name, value in vars(args).items() if name in SETTINGS}


@contextmanager
def errors_of(source: str) -> Iterator[None]:
    """Prepend the file and the line of a request to an `InputError`."""
    try:
        yield
    except InputError as error:
        if not source:
            raise
        raise InputError(f"{source}: {error}") from error


def _lines(file: str) -> list[tuple[str, str]]:
    """Return the lines of a file that are not blank, each with its name."""
    name = "standard input" if file == STDIN else file
    content = sys.stdin.buffer.read() if file == STDIN else Path(file).read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise InputError(f"{name} line {line}: not UTF-8: {error.reason}") from error
    # Not splitlines: U+2028 may be within a JSON text.
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    return [(f"{name} line {i}", line) for i, line in enumerate(lines, 1) if line.strip()]


def _parse(source: str, line: str, given: Mapping[str, Any]) -> Request:
    """Return the request of a line of JSON."""
    with errors_of(source):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"not JSON: {error}") from error
        require(isinstance(row, dict), 'must be an object like {"prompt": "..."}')
        require(("prompt" in row) != ("messages" in row), "must have either prompt or messages")
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise InputError("a text has a lone surrogate; it is not Unicode text") from error
        prompt, messages = row.pop("prompt", None), row.pop("messages", None)
        if messages is None:
            is_ids = isinstance(prompt, list) and all(type(id) is int for id in prompt)
            require(isinstance(prompt, str) or is_ids, "prompt must be a text or token ids")
        if isinstance(row.get("logit_bias"), dict):
            row["logit_bias"] = logit_bias(row["logit_bias"])
        make_settings({**given, **row})
        return Request(source, prompt, messages, row)


def logit_bias(values: Mapping[str, Any]) -> dict[int, float]:
    """Return token ids with numbers, from JSON, whose keys are texts. Raises `InputError`."""
    try:
        return {int(token): float(bias) for token, bias in values.items()}
    except (ValueError, AttributeError, TypeError) as error:
        raise InputError(f'{values!r} is not like {{"17": -5.0}}: {error}') from error
