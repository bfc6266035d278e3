"""Command line of both `generate` commands: a thin layer over `LM.generate`."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mooshak.command_line import command_parser
from mooshak.device import add_device_option
from mooshak.generation.lm import LM

SETTINGS = ("max_new_tokens", "temperature", "top_p", "seed")
"""Options that are passed to `LM.generate`."""


def generate_parser(module: str, doc: str | None) -> argparse.ArgumentParser:
    """Return the parser of `python -m MODULE CHECKPOINT --prompt TEXT`; `doc` is its docstring."""
    parser = command_parser(module, doc, "CHECKPOINT --prompt TEXT [--SETTING VALUE ...]")
    add = parser.add_argument
    text = "directory of a checkpoint, of any format"
    add("checkpoint", type=Path, metavar="CHECKPOINT", help=text)
    add("--prompt", action="append", required=True, metavar="TEXT", help="prompt; may be repeated")
    names = ("--max_new_tokens", "--tokens", "--max-new-tokens")
    add(*names, type=int, default=128, metavar="N", help="maximum number of new tokens")
    text = "divisor of the logits before sampling; 0 is greedy decoding"
    add("--temperature", type=float, default=0.0, metavar="T", help=text)
    text = "nucleus sampling: the smallest set of tokens with total probability >= P"
    add("--top_p", "--top-p", type=float, default=1.0, metavar="P", help=text)
    add("--seed", type=int, default=0, metavar="N", help="seed of the sampling noise")
    dtypes = ["float64", "float32", "bfloat16", "float16"]
    add("--dtype", choices=dtypes, default="float32", help="dtype of the computation")
    add_device_option(parser)
    text = "tokenizer.model or tokenizer.json, if the checkpoint has none"
    add("--tokenizer", metavar="FILE", help=text)
    return parser


def generate_text(args: argparse.Namespace, load: Callable[..., LM], **options: Any) -> None:
    """Load the model and print each prompt with its continuation."""
    lm = load(args.checkpoint, args.dtype, device=args.device, tokenizer=args.tokenizer)
    settings = {key: getattr(args, key) for key in SETTINGS}
    prompts: Sequence[str] = args.prompt
    for prompt, completion in zip(
        prompts, lm.generate(list(prompts), **settings, **options), strict=True
    ):
        print(prompt + str(completion))
        print()
