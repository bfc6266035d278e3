"""Generate text with the PyTorch model.

python -m mooshak_torch.generate RUN/checkpoints/600 --prompt "एक समय की बात है"
"""

import argparse
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mooshak.errors import command
from mooshak.generation.text import add_options, generate_text, pad_prompts
from mooshak.numerics.sampling_noise import noise
from mooshak_torch.checkpoint import load_model
from mooshak_torch.distributed.compile import require_compiler
from mooshak_torch.model import KVCache, Linear, Model, make_caches
from mooshak_torch.ops.matmul import pack_weights_for_decode


@torch.no_grad()
def generate(
    model: Model,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    compiled: bool = False,
) -> np.ndarray:
    """Continue prompts of token ids, each at its own position; returns int32 [prompts, new_tokens].

    Temperature 0 is greedy. `compiled` tokens come faster, after torch.compile has had its time.
    Raises `InputError` when a prompt is empty or the text would outgrow the model's positions, or
    where there is nothing to compile with.
    """
    step = _compiled_step() if compiled else _step
    tokens_BT, lengths_B = pad_prompts(prompts, new_tokens, model.config)
    uniform_BT = np.stack([noise(seed, b, new_tokens) for b in range(len(prompts))])
    device = model.embeddings.weight.device
    caches = make_caches(model, len(prompts), tokens_BT.shape[1] + new_tokens)
    positions_B = torch.from_numpy(lengths_B).to(device) - 1
    rows_B = torch.arange(len(prompts), device=device)
    # Of the prompts only the last positions go through the output head.
    hidden_BTD = model.hidden_states(torch.from_numpy(tokens_BT).to(device).long(), caches=caches)
    logits_BV = model.logits(hidden_BTD[rows_B, positions_B].unsqueeze(1))[:, 0]
    matrices = (m.weight for m in model.modules() if isinstance(m, Linear))
    decoder = pack_weights_for_decode(model, matrices, len(prompts), new_tokens)
    out = []
    for t in range(new_tokens):
        uniform_B = torch.from_numpy(uniform_BT[:, t]).to(device)
        token_B = sample(logits_BV, uniform_B, temperature, top_p)
        out.append(token_B)
        if t + 1 == new_tokens:
            break
        positions_B = positions_B + 1
        logits_BV = step(decoder, token_B, positions_B, caches)
    return torch.stack(out, dim=1).cpu().numpy().astype(np.int32)


def _step(model: Model, token_B: Tensor, positions_B: Tensor, caches: list[KVCache]) -> Tensor:
    """Logits [B, V] of what follows one more token each."""
    logits_B1V: Tensor = model(token_B.unsqueeze(1), positions_B.unsqueeze(1), caches)
    return logits_B1V[:, 0]


@cache
def _compiled_step() -> Callable[..., Tensor]:
    require_compiler("--compile")
    # The whole model at once, and on a CPU called from C++: a processor that reads all weights for
    # every token has forgotten the interpreter's code by the next operation.
    options: dict[str, Any] = {} if torch.cuda.is_available() else {"cpp_wrapper": True}
    return torch.compile(_step, options=options)


def sample(logits_BV: Tensor, uniform_B: Tensor, temperature: float, top_p: float) -> Tensor:
    """Next tokens: the largest logit, or the inverse CDF over the sorted probabilities.

    Computed in float64, whatever the model's dtype: a uniform number between two close sums would
    fall on different sides otherwise.
    """
    if temperature == 0.0:
        return logits_BV.argmax(-1)
    p_BV = torch.softmax(logits_BV.double() / temperature, dim=-1)
    sorted_BV, order_BV = torch.sort(p_BV, dim=-1, descending=True, stable=True)
    sums_BV = sorted_BV.cumsum(-1)
    # The nucleus (arXiv:1904.09751): the fewest tokens that reach top_p.
    nucleus_B = torch.sum(sums_BV < top_p, -1).clamp(max=sums_BV.shape[1] - 1)
    mass_B1 = sums_BV.gather(1, nucleus_B.unsqueeze(1))
    rank_B = torch.sum(sums_BV <= uniform_B.unsqueeze(1) * mass_B1, -1).minimum(nucleus_B)
    return order_BV.gather(1, rank_B.unsqueeze(1)).squeeze(1)


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_options(parser)
    parser.add_argument(
        "--compile", action="store_true", help="compile the step of a token first: for many tokens"
    )
    args = parser.parse_args()
    model = load_model(Path(args.checkpoint), args.dtype)
    if torch.cuda.is_available():
        model = model.cuda()
    generate_text(args, model.config, partial(generate, model, compiled=args.compile))


if __name__ == "__main__":
    main()
