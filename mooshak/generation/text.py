"""From prompts to padded token ids, and back to text: what both `generate` commands share."""

import argparse
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from mooshak.config.model import ModelConfig
from mooshak.errors import InputError
from mooshak.files import read_object
from mooshak.tokenizer.base import Tokenizer
from mooshak.tokenizer.files import find_tokenizer
from mooshak.tokenizer.load import open_tokenizer


def generate_text(
    args: argparse.Namespace, model: ModelConfig, generate: Callable[..., np.ndarray]
) -> None:
    """Tokenise the prompts, generate, and print each text up to its end of text."""
    tokenizer = open_tokenizer(find_tokenizer(Path(args.checkpoint), args.tokenizer))
    # A model that was not made here may have rows to spare; its tokenizer stands beside it.
    own = tokenizer.path.parent == Path(args.checkpoint)
    needed = tokenizer.vocab_size if own else tokenizer.padded_vocab_size
    if needed > model.vocab_size or (needed < model.vocab_size and not own):
        raise InputError(
            f"the tokenizer has {tokenizer.vocab_size} pieces, the model's vocabulary is "
            f"{model.vocab_size}; name the right one with --tokenizer"
        )
    prompts = [tokenizer.encode(text, bos=True) for text in args.prompt]
    ids = generate(prompts, args.tokens, args.temperature, args.top_p, args.seed)
    for prompt, row in zip(prompts, ids, strict=True):
        print(decode_until_eos(tokenizer, prompt, row.tolist()))
        print()


def decode_until_eos(tokenizer: Tokenizer, prompt: Sequence[int], ids: Sequence[int]) -> str:
    """The prompt and what follows it, up to an end of text; rows without a piece stand for none.

    A text ends with the tokenizer's own token, or one that the generation settings beside it name.
    """
    named = read_object(tokenizer.path.parent / "generation_config.json").get("eos_token_id")
    ends = {tokenizer.eos_id, *(named if isinstance(named, list) else [named])}
    kept = itertools.takewhile(lambda id: id not in ends, ids)
    return tokenizer.decode([id for id in (*prompt, *kept) if id < tokenizer.vocab_size])


def pad_prompts(
    prompts: Sequence[Sequence[int]], new_tokens: int, model: ModelConfig
) -> tuple[np.ndarray, np.ndarray]:
    """Prompts as int32 [B, T], padded at the end with 0, and their lengths, int64 [B]."""
    lengths_B = np.array([len(prompt) for prompt in prompts], np.int64)
    if not len(prompts) or lengths_B.min() == 0:
        raise InputError("a prompt is empty; it needs one token at least")
    if (longest := int(lengths_B.max()) + new_tokens) > model.max_seq_len:
        raise InputError(
            f"prompt and continuation are {longest} tokens, the model has {model.max_seq_len} "
            "positions; use fewer --tokens or a shorter prompt"
        )
    tokens_BT = np.zeros((len(prompts), int(lengths_B.max())), np.int32)
    for row, prompt in zip(tokens_BT, prompts, strict=True):
        row[: len(prompt)] = prompt
    return tokens_BT, lengths_B


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of both `generate` commands."""
    parser.add_argument("checkpoint", help="a checkpoint of any kind")
    parser.add_argument("--prompt", action="append", required=True, help="text; may be repeated")
    parser.add_argument("--tokens", type=int, default=128, help="tokens to generate")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument(
        "--top-p", type=float, default=1.0, help="sample from this much probability"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling noise")
    parser.add_argument(
        "--dtype", choices=["float64", "float32", "bfloat16", "float16"], default="float32"
    )
    parser.add_argument("--tokenizer", help="tokenizer.model, if the checkpoint has none")
