"""The command line of both `generate` commands: a thin layer over `LM.generate`."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mooshak.generation.lm import LM

SETTINGS = ("max_new_tokens", "temperature", "top_p", "seed")
"""Options that are passed on to `LM.generate`."""


def generate_parser(module: str, description: str) -> argparse.ArgumentParser:
    """Return the parser of `python -m MODULE CHECKPOINT --prompt TEXT`."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {module}",
        usage="%(prog)s CHECKPOINT --prompt TEXT [--SETTING VALUE ...]",
        description=description,
        epilog=(
            f"examples:\n  python -m {module} runs/demo/torch/checkpoints/600 --prompt 'एक समय'\n"
            f"  python -m {module} LLAMA --prompt 'the lion' --temperature 0.8 --top_p 0.95\n"
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("checkpoint", type=Path, help="a checkpoint of any kind")
    add("--prompt", action="append", required=True, help="text; may be repeated")
    tokens = ("--max_new_tokens", "--tokens", "--max-new-tokens")
    add(*tokens, type=int, default=128, help="tokens to generate at most (128)")
    text = "divisor of the logits before sampling; 0 is greedy decoding (0)"
    add("--temperature", type=float, default=0.0, help=text)
    text = "nucleus sampling: the smallest set of tokens with total probability >= P (1)"
    add("--top_p", "--top-p", type=float, default=1.0, metavar="P", help=text)
    add("--seed", type=int, default=0, help="seed of the sampling noise (0)")
    add("--dtype", choices=["float64", "float32", "bfloat16", "float16"], default="float32")
    add("--tokenizer", help="tokenizer.model or tokenizer.json, if the checkpoint has none")
    return parser


def generate_text(args: argparse.Namespace, load: Callable[..., LM], **options: Any) -> None:
    """Load the model, continue each prompt and print it with its continuation."""
    lm = load(args.checkpoint, dtype=args.dtype, tokenizer=args.tokenizer)
    settings = {key: getattr(args, key) for key in SETTINGS}
    prompts: Sequence[str] = args.prompt
    for prompt, completion in zip(
        prompts, lm.generate(list(prompts), **settings, **options), strict=True
    ):
        print(prompt + str(completion))
        print()
