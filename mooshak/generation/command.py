"""Command line of both `generate` commands: a thin layer over `LM.generate`."""

import argparse
import ast
import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, get_type_hints

from mooshak.command_line import command_parser
from mooshak.config.generate import GenerateConfig
from mooshak.device import add_device_option
from mooshak.errors import InputError
from mooshak.generation.lm import LM

OTHER_NAMES = {"max_new_tokens": ("--tokens",)}
"""Setting -> older names of its option."""


def generate_parser(module: str, doc: str | None) -> argparse.ArgumentParser:
    """Return the parser of `python -m MODULE CHECKPOINT --prompt TEXT`; `doc` is its docstring."""
    parser = command_parser(module, doc, "CHECKPOINT --prompt TEXT [--SETTING VALUE ...]")
    add = parser.add_argument
    text = "directory of a checkpoint, of any format"
    add("checkpoint", type=Path, metavar="CHECKPOINT", help=text)
    add("--prompt", action="append", required=True, metavar="TEXT", help="prompt; may be repeated")
    dtypes = ["float64", "float32", "bfloat16", "float16"]
    add("--dtype", choices=dtypes, default="float32", help="dtype of the computation")
    add_device_option(parser)
    text = "tokenizer.model or tokenizer.json, if the checkpoint has none"
    add("--tokenizer", metavar="FILE", help=text)
    group = parser.add_argument_group("settings (default: those of generation_config.json, or)")
    for name, options in setting_options():
        dashed = f"--{name.replace('_', '-')}"
        names = dict.fromkeys((f"--{name}", *OTHER_NAMES.get(name, ()), dashed))
        group.add_argument(*names, dest=name, **options)
    return parser


def setting_options() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each field of `GenerateConfig` with the arguments of its option.

    What is not given is absent from the parsed arguments.
    """
    types, texts = get_type_hints(GenerateConfig), field_docstrings()
    for one in fields(GenerateConfig):
        if one.name in ("n", "logprobs"):  # The command prints one text for each prompt.
            continue
        kind, text = types[one.name], texts[one.name]
        default = None if one.default is MISSING else one.default
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": text}
        if kind is bool:
            options["action"] = "store_true"
        elif kind in (int, float):
            options |= {"type": kind, "metavar": "N" if kind is int else "X"}
            options["help"] += f" (default: {default})"
        elif kind == tuple[str, ...]:
            options |= {"action": "append", "metavar": "TEXT"}
            options["help"] += "; may be repeated"
        elif kind == tuple[int, ...]:
            options |= {"type": int, "nargs": "+", "metavar": "ID"}
        else:
            options |= {"type": _logit_bias, "metavar": "JSON"}
        yield one.name, options


def _logit_bias(text: str) -> Mapping[int, float]:
    try:
        return {int(token): float(bias) for token, bias in json.loads(text).items()}
    except (ValueError, AttributeError, TypeError) as error:
        raise argparse.ArgumentTypeError(f'{text!r} is not like {{"17": -5.0}}: {error}') from error


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


def generate_text(args: argparse.Namespace, load: Callable[..., LM], **options: Any) -> None:
    """Load the model and print each prompt with its continuation."""
    names = {one.name for one in fields(GenerateConfig)}
    settings = {name: value for name, value in vars(args).items() if name in names}
    GenerateConfig(**settings)  # A value out of range is found before the model is loaded.
    lm = load(args.checkpoint, args.dtype, device=args.device, tokenizer=args.tokenizer)
    prompts: Sequence[str] = args.prompt
    if lm.tokenizer is None:
        raise InputError(f"{args.checkpoint} has no tokenizer; name one with --tokenizer")
    for prompt, completion in zip(
        prompts, lm.generate(list(prompts), **settings, **options), strict=True
    ):
        print(prompt + str(completion))
        print()
