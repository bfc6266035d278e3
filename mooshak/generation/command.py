"""Command line of both `generate` commands: completions as text or JSON lines, and a chat."""

import argparse
import ast
import inspect
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, TextIO, get_args, get_type_hints

from mooshak.command_line import command_parser
from mooshak.config.generate import EarlyStopping, GenerateConfig
from mooshak.config.model import Dtype
from mooshak.device import add_device_option
from mooshak.errors import InputError, require
from mooshak.generation.adjustments import check_token_settings
from mooshak.generation.completion import Completion
from mooshak.generation.lm import LM
from mooshak.generation.requests import STDIN, Request, errors_of, given_settings, logit_bias
from mooshak.generation.settings import check_stream
from mooshak.tokenizer.chat_template import encode_chat, end_of_turn, find_template

OTHER_NAMES = {"max_new_tokens": ("--tokens",)}
"""Setting -> older names of its option."""

FROM_FILE = ("json_schema", "grammar")
"""Settings whose option may name a file: `@FILE`."""

BATCH_ROWS = 64
"""Maximum number of completions that are generated as one batch; the samples of a prompt are."""

ONLY_IF_ASKED = (
    "top_logprobs",
    "prompt_logprobs",
    "prompt_top_logprobs",
    "score",
    "n_drafted",
    "n_accepted",
)
"""Fields of a completion that are in `--jsonl_out` where the settings ask for them."""


def generate_parser(module: str, doc: str | None) -> argparse.ArgumentParser:
    """Return the parser of `python -m MODULE CHECKPOINT --prompt TEXT`; `doc` is its docstring."""
    prompts = "(--prompt TEXT | --prompts FILE | --jsonl FILE | --interactive)"
    parser = command_parser(module, doc, f"CHECKPOINT {prompts} [--SETTING VALUE ...]")
    add = parser.add_argument
    add("--prompt", action="append", metavar="TEXT", help="prompt; may be repeated")
    add("--prompts", metavar="FILE", help="file with a prompt on each line; - is standard input")
    text = "file with an object on each line: prompt or messages, and settings; - is standard input"
    add("--jsonl", metavar="FILE", help=text)
    text = "write an object for each completion to this file; - is standard output"
    add("--jsonl_out", "--jsonl-out", metavar="FILE", help=text)
    text = "chat: Ctrl-C ends a reply, Ctrl-D or /exit the chat"
    add("--interactive", action="store_true", help=text)
    add_model_options(parser)
    group = parser.add_argument_group("settings (default: those of generation_config.json, or)")
    for name, options in setting_options():
        dashed = f"--{name.replace('_', '-')}"
        names = dict.fromkeys((f"--{name}", *OTHER_NAMES.get(name, ()), dashed))
        group.add_argument(*names, dest=name, **options)
    return parser


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the checkpoint, and the options with which it is loaded."""
    add = parser.add_argument
    text = "directory of a checkpoint, of any format"
    add("checkpoint", type=Path, metavar="CHECKPOINT", help=text)
    add("--dtype", choices=get_args(Dtype), default="float32", help="dtype of the computation")
    add_device_option(parser)
    text = "tokenizer.model or tokenizer.json, if the checkpoint has none"
    add("--tokenizer", metavar="FILE", help=text)


def setting_options() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each field of `GenerateConfig` with the arguments of its option.

    What is not given is absent from the parsed arguments.
    """
    types, texts = get_type_hints(GenerateConfig), field_docstrings()
    for one in fields(GenerateConfig):
        kind, text = types[one.name], texts[one.name].replace("%", "%%")
        default = None if one.default is MISSING else one.default
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": text}
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction if default else "store_true"
        elif kind in (int, float):
            options |= {"type": kind, "metavar": "N" if kind is int else "X"}
            options["help"] += f" (default: {default})"
        elif kind == tuple[str, ...]:
            options |= {"action": "append", "metavar": "TEXT"}
            options["help"] += "; may be repeated"
        elif kind == tuple[int, ...]:
            options |= {"type": int, "nargs": "+", "metavar": "ID"}
        elif kind is str:
            options["metavar"] = "TEXT"
        elif kind is Any:
            options["metavar"] = "CHECKPOINT"
        elif kind == EarlyStopping:
            options |= {"type": _early_stopping, "metavar": "false|true|never"}
            options["help"] += " (default: false)"
        elif one.name in FROM_FILE:
            options |= {"type": _text_or_file, "metavar": "TEXT|@FILE"}
        elif kind == str | None:
            options["metavar"] = "TEXT"
        else:
            options |= {"type": _logit_bias if one.name == "logit_bias" else _json}
            options["metavar"] = "JSON"
        yield one.name, options


def _early_stopping(text: str) -> EarlyStopping:
    values: dict[str, EarlyStopping] = {"false": False, "true": True, "never": "never"}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"{text!r} is not false, true or never")
    return values[text.lower()]


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON: {error}") from error


def _text_or_file(text: str) -> str:
    if not text.startswith("@"):
        return text
    try:
        return Path(text[1:]).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise argparse.ArgumentTypeError(f"{text[1:]} cannot be read: {error}") from error


def _logit_bias(text: str) -> Mapping[int, float]:
    try:
        return logit_bias(_json(text))
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def field_docstrings() -> dict[str, str]:
    """Return the text below each field of `GenerateConfig`, on one line, without the full stop."""
    (definition,) = ast.parse(inspect.getsource(GenerateConfig)).body
    assert isinstance(definition, ast.ClassDef)
    found = {}
    for node, after in zip(definition.body, definition.body[1:], strict=False):
        if isinstance(node, ast.AnnAssign) and isinstance(after, ast.Expr):
            assert isinstance(node.target, ast.Name)
            found[node.target.id] = " ".join(ast.literal_eval(after.value).split()).rstrip(".")
    return found


def run_generate(
    args: argparse.Namespace, requests: Sequence[Request], load: Callable[..., LM]
) -> None:
    """Load the model; print or write the completions of the requests, or chat."""
    lm = load(args.checkpoint, args.dtype, device=args.device, tokenizer=args.tokenizer)
    given = given_settings(args)
    only_ids = requests and all(isinstance(one.prompt, list) for one in requests)
    if lm.tokenizer is None and not only_ids:
        raise InputError(f"{args.checkpoint} has no tokenizer; name one with --tokenizer")
    if args.interactive:
        chat(lm, given)
        return
    jobs = [_prepare(lm, request, given) for request in requests]
    if args.jsonl_out is None:
        for job, completion, _ in _completions(lm, jobs):
            print(_shown(lm, job) + str(completion), end="\n\n", flush=True)
        return
    if args.jsonl_out == STDIN:
        _write_rows(sys.stdout, lm, jobs)
        return
    with open(args.jsonl_out, "w", encoding="utf-8") as file:
        _write_rows(file, lm, jobs)


@dataclass(frozen=True)
class _Job:
    """A request as the model takes it."""

    request: Request
    ids: list[int]
    settings: GenerateConfig
    ends: set[int]


def _prepare(lm: LM, request: Request, given: Mapping[str, Any]) -> _Job:
    """Return the token ids and settings of a request. Raises `InputError` with its line."""
    with errors_of(request.source):
        settings = lm.settings({**given, **request.settings})
        ends: set[int] = set()
        if request.messages is not None:
            assert lm.tokenizer is not None
            ids, ends = encode_chat(lm.tokenizer, request.messages), end_of_turn(lm.tokenizer)
        else:
            assert request.prompt is not None
            ids = lm.encode(request.prompt)
        lm.check(ids, settings)  # All lines, before the first one is generated.
        return _Job(request, ids, settings, ends)


def _completions(lm: LM, jobs: Sequence[_Job]) -> Iterator[tuple[_Job, Completion, float]]:
    """Yield the completions in order, with the seconds of their batch.

    Successive jobs with equal settings are generated as one batch.
    """
    at = 0
    while at < len(jobs):
        first, end = jobs[at], at + 1
        n, n_rows = first.settings.n_results, first.settings.n * first.settings.num_beams
        while end < len(jobs) and (end + 1 - at) * n_rows <= BATCH_ROWS:
            if (jobs[end].settings, jobs[end].ends) != (first.settings, first.ends):
                break
            end += 1
        rows = [(job, sample) for job in jobs[at:end] for sample in range(first.settings.n)]
        start = time.perf_counter()
        ids, samples = [job.ids for job, _ in rows], [sample for _, sample in rows]
        sources = [job.request.source for job in jobs[at:end] if job.request.source]
        with errors_of(" to ".join(dict.fromkeys(sources[:1] + sources[-1:]))):
            found = lm._complete(ids, samples, first.settings, first.ends)
        seconds = time.perf_counter() - start
        for i, completion in enumerate(found):
            yield jobs[at + i // n], completion, seconds
        at = end


def _shown(lm: LM, job: _Job) -> str:
    """Return the text that is printed before a completion: the prompt, nothing in a chat."""
    if job.request.messages is not None:
        return ""
    if isinstance(job.request.prompt, str):
        return job.request.prompt
    return (
        " ".join(map(str, job.ids)) + " " if lm.tokenizer is None else lm.tokenizer.decode(job.ids)
    )


def _write_rows(file: TextIO, lm: LM, jobs: Sequence[_Job]) -> None:
    """Write an object for each completion, as soon as its batch is there."""
    for job, completion, seconds in _completions(lm, jobs):
        request = job.request
        is_chat = request.messages is not None
        row = {
            **({"messages": request.messages} if is_chat else {"prompt": request.prompt}),
            "text": completion.text,
            "token_ids": completion.token_ids,
            "logprobs": completion.logprobs,
            "finish_reason": completion.finish_reason,
            "index": completion.index,
            **{name: v for name in ONLY_IF_ASKED if (v := getattr(completion, name)) is not None},
            "seconds": round(seconds, 6),
        }
        print(json.dumps(row, ensure_ascii=False), file=file, flush=True)


def chat(lm: LM, given: Mapping[str, Any]) -> None:
    """Chat at the terminal, with history; the oldest turns are dropped where it is too long."""
    with suppress(ImportError):  # Absent on some systems: input is then without editing.
        import readline  # noqa: F401
    assert lm.tokenizer is not None
    settings = lm.settings(given)
    require(settings.n_results == 1, "--interactive has one reply for a prompt; set n to 1")
    check_stream(settings)
    check_token_settings(settings, lm.config.vocab_size)
    find_template(lm.tokenizer)
    messages: list[dict[str, str]] = []
    while True:
        try:
            text = input(">>> ")
        except KeyboardInterrupt:
            print()
            continue
        except EOFError:
            print()
            return
        if text.strip() == "/exit":
            return
        if text.strip():
            messages = _reply(lm, [*messages, {"role": "user", "content": text}], settings)


def _reply(
    lm: LM, messages: list[dict[str, str]], settings: GenerateConfig
) -> list[dict[str, str]]:
    """Print the reply to messages as it is generated; return the conversation after it."""
    assert lm.tokenizer is not None
    parts: list[str] = []
    try:
        ids = encode_chat(lm.tokenizer, messages)
        while len(ids) + settings.max_new_tokens > lm.config.max_seq_len and len(messages) > 2:
            messages = messages[2:]
            ids = encode_chat(lm.tokenizer, messages)
        for part in lm._stream(ids, settings, end_of_turn(lm.tokenizer)):
            print(part, end="", flush=True)
            parts.append(part)
    except KeyboardInterrupt:
        pass
    except InputError as error:
        print(end="\n" if parts else "", flush=True)
        print(f"error: {error}", file=sys.stderr)
        return messages[:-1]
    print()
    return [*messages, {"role": "assistant", "content": "".join(parts)}]
