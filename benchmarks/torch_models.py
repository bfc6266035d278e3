"""Workers in PyTorch: ours, transformers (eager and compiled) and litgpt."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.case import Size, config
from benchmarks.serving import decode_tales, engine_options, load_pair, make_requests, serve
from benchmarks.worker import Repeat, by_turns, timed
from mooshak.data.packing import Batch
from mooshak.training.malloc import WARMUP_STEPS, retain_freed_memory, use_single_arena
from mooshak_torch import load
from mooshak_torch.checkpoint import start_saving
from mooshak_torch.decode import generate as our_generate
from mooshak_torch.distributed.mesh import make_parallel
from mooshak_torch.distributed.parallelize import parallelize
from mooshak_torch.engine import Engine
from mooshak_torch.lm import LM
from mooshak_torch.model import Model
from mooshak_torch.objectives import make_objective, model_of
from mooshak_torch.optimizer import Optimizer
from mooshak_torch.params import initialize
from mooshak_torch.step import set_matmul_precision, train_step

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def train(size: Size) -> Repeat:
    """Time an optimizer step of our trainer."""
    step = _our_step(size)
    batch = _our_batch(size)
    return _warm(lambda: step(batch), WARMUP_STEPS)


def train_compiled(size: Size) -> Repeat:
    """Time an optimizer step of our trainer with `--train.compile true`."""
    return train(size | {"train": size.get("train", {}) | {"compile": True}})


def train_remat(size: Size) -> Repeat:
    """Time an optimizer step of our trainer with `--train.remat dots`."""
    return train(size | {"train": size.get("train", {}) | {"remat": "dots"}})


def train_with_pipeline(size: Size) -> Repeat:
    """Compare the time of steps with the input pipeline with that on a constant batch."""
    from benchmarks.pipeline import our_batches

    step, batches = _our_step(size), our_batches(size)
    batch = next(batches)
    work = (lambda: step(_from_numpy(next(batches))), lambda: step(_from_numpy(batch)))
    _warm(work[0], WARMUP_STEPS)
    return lambda: by_turns(*work, size["steps"])


def gradients(size: Size) -> Repeat:
    """Time loss and gradients of our model, as in a step."""
    objective, batch = _our_objective(size)[0], _our_batch(size)

    def work() -> None:
        objective.zero_grad(set_to_none=True)
        (objective(batch) / batch.labels.numel()).backward()

    return _warm(work)


def block(size: Size) -> Repeat:
    """Time forward and backward of our layer."""
    use_single_arena()  # As the trainer's command does.
    model = initialize(Model(config(size).model).to(DEVICE), 0)
    positions_BT = torch.arange(size["sequence_length"], device=DEVICE)[None]
    return _layer(
        size,
        model.layers[0],
        lambda layer, x: layer(x, model.rope, model.rope.lookup(positions_BT)),
    )


def generate(size: Size, compiled: bool = False) -> Repeat:
    """Time our greedy decoding."""
    model = initialize(Model(config(size).model).to(DEVICE), 0)
    prompts = _batch(size)[:, : size["prompt"]].tolist()
    return _warm(lambda: our_generate(model, prompts, size["new_tokens"], compiled=compiled))


def generate_compiled(size: Size) -> Repeat:
    """Time our greedy decoding with `--compile`."""
    return generate(size, compiled=True)


def engine(size: Size) -> Repeat:
    """Time our engine on requests of unequal lengths."""
    lm = _random_lm(size)
    return serve(lm, Engine(lm, **engine_options(size)), size)


def engine_on_batch(size: Size) -> Repeat:
    """Time our engine on the batch of `generate`."""
    return engine(size | {name: (size[name], size[name]) for name in ("prompt", "new_tokens")})


def plain(size: Size) -> Repeat:
    """Time greedy decoding of tales."""
    return decode_tales(load_pair(size, load, _random_lm)[0], None, size)


def speculative(size: Size) -> Repeat:
    """Time greedy decoding of tales with a draft."""
    return decode_tales(*load_pair(size, load, _random_lm), size)


def _random_lm(size: Size) -> LM:
    return LM(initialize(Model(config(size).model).to(DEVICE), 0), None)


def prefill(size: Size) -> Repeat:
    """Time our generation of a single token, which is the prefill of the prompt."""
    return generate(size | {"new_tokens": 1})


def save(size: Size) -> Repeat:
    """Time how long a save in the background blocks training."""
    return _save(size, blocking=False)


def save_blocking(size: Size) -> Repeat:
    """Time a save until the state is on the disk."""
    return _save(size, blocking=True)


def hf_train(size: Size) -> Repeat:
    """Time the usual training step of transformers' Llama."""
    return _plain_train(size, hf_llama(size))


def hf_train_compiled(size: Size) -> Repeat:
    """Time the usual training step of transformers' Llama, compiled."""
    return _plain_train(size, torch.compile(hf_llama(size)))


def hf_gradients(size: Size) -> Repeat:
    """Time loss and gradients of transformers' Llama, all logits at once."""
    model, batch_BS = hf_llama(size), _batch(size)

    def work() -> None:
        model.zero_grad(set_to_none=True)
        model(input_ids=batch_BS[:, :-1], labels=batch_BS[:, :-1], use_cache=False).loss.backward()

    return _warm(work)


def hf_block(size: Size) -> Repeat:
    """Time forward and backward of transformers' Llama layer."""
    model = hf_llama(size).model
    positions_BT = torch.arange(size["sequence_length"], device=DEVICE)[None]

    def forward(layer: nn.Module, x_BTD: Tensor) -> Tensor:
        rotary = model.rotary_emb(x_BTD, positions_BT)
        out = layer(x_BTD, attention_mask=None, position_embeddings=rotary)
        return out if isinstance(out, Tensor) else out[0]

    return _layer(size, model.layers[0], forward)


@torch.no_grad()
def hf_generate(size: Size, compiled: bool = False) -> Repeat:
    """Time transformers' greedy decoding with its static cache."""
    model = hf_llama(size).eval()
    if compiled:
        model.forward = torch.compile(model.forward)  # As in its documentation.
    prompts_BT = _batch(size)[:, : size["prompt"]]
    options: dict[str, Any] = {
        "max_new_tokens": size["new_tokens"],
        "min_new_tokens": size["new_tokens"],
        "do_sample": False,
        "cache_implementation": "static",
        "attention_mask": torch.ones_like(prompts_BT),
        "pad_token_id": 0,
        "disable_compile": DEVICE.type == "cpu",
    }
    return _warm(lambda: model.generate(prompts_BT, **options))


@torch.no_grad()
def hf_padded(size: Size) -> Repeat:
    """Time transformers' decoding of unequal requests: padded, up to the longest continuation."""
    model, requests = hf_llama(size).eval(), make_requests(size)
    length = max(len(prompt) for prompt, _ in requests)
    rows = [[0] * (length - len(prompt)) + prompt for prompt, _ in requests]
    mask = [[0] * (length - len(prompt)) + [1] * len(prompt) for prompt, _ in requests]
    longest = max(n_new for _, n_new in requests)
    tokens_BT = torch.tensor(rows, device=DEVICE)
    options: dict[str, Any] = {
        "max_new_tokens": longest,
        "min_new_tokens": longest,
        "do_sample": False,
        "attention_mask": torch.tensor(mask, device=DEVICE),
        "pad_token_id": 0,
    }
    return _warm(lambda: model.generate(tokens_BT, **options), 1)


def hf_generate_compiled(size: Size) -> Repeat:
    """Time transformers' greedy decoding with its static cache, compiled."""
    return hf_generate(size, compiled=True)


def hf_prefill(size: Size) -> Repeat:
    """Time transformers' prefill: logits of the last position only."""
    model, prompts_BT = hf_llama(size).eval(), _batch(size)[:, : size["prompt"]]

    @torch.no_grad()
    def work() -> None:
        model(input_ids=prompts_BT, use_cache=True, logits_to_keep=1)

    return _warm(work)


def litgpt_train(size: Size) -> Repeat:
    """Time the usual training step of litgpt's GPT in the shape of a Llama."""
    from litgpt import GPT, Config  # type: ignore[import-not-found]
    from litgpt.utils import chunked_cross_entropy  # type: ignore[import-not-found]

    litgpt = Config(
        block_size=size["sequence_length"],
        padded_vocab_size=size["vocab_size"],
        vocab_size=size["vocab_size"],
        n_layer=size["n_layers"],
        n_head=size["n_heads"],
        n_embd=size["dim"],
        intermediate_size=size["hidden_dim"],
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP",
    )
    model = GPT(litgpt).to(DEVICE)
    return _plain_train(size, model, lambda x_BT, y_BT: chunked_cross_entropy(model(x_BT), y_BT))


def _our_objective(size: Size) -> tuple[nn.Module, Any]:
    use_single_arena()  # As the trainer's command does.
    parallel = make_parallel(config(size))
    set_matmul_precision()
    objective: nn.Module = make_objective(config(size).model, config(size))
    objective = parallelize(objective, parallel, config(size))
    initialize(model_of(objective), 0)
    return objective, parallel


def _our_step(size: Size) -> Callable[[Batch], Any]:
    objective, parallel = _our_objective(size)
    optimizer = Optimizer(objective, model_of(objective), config(size).optimizer)
    return lambda batch: train_step(objective, optimizer, batch, 1e-4, config(size), parallel)


def hf_llama(size: Size) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    set_matmul_precision()
    torch.manual_seed(0)
    llama: Any = LlamaConfig
    model: Any = LlamaForCausalLM(
        llama(
            vocab_size=size["vocab_size"],
            hidden_size=size["dim"],
            intermediate_size=size["hidden_dim"],
            num_hidden_layers=size["n_layers"],
            num_attention_heads=size["n_heads"],
            max_position_embeddings=size["sequence_length"],
            attn_implementation="sdpa",
        )
    )
    return model.to(DEVICE)


def _plain_train(
    size: Size, model: Any, loss: Callable[[Tensor, Tensor], Tensor] | None = None
) -> Repeat:
    """Time a plain training step with torch's fused AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1, fused=True)
    batch_BS = _batch(size)

    def work() -> None:
        optimizer.zero_grad(set_to_none=True)
        x_BT, y_BT = batch_BS[:, :-1], batch_BS[:, 1:]
        if loss is None:
            # transformers shifts the labels itself.
            value = model(input_ids=x_BT, labels=x_BT, use_cache=False).loss
        else:
            value = loss(x_BT, y_BT)
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return _warm(work)


def _layer(size: Size, layer: nn.Module, forward: Callable[[nn.Module, Tensor], Tensor]) -> Repeat:
    set_matmul_precision()
    shape = (size["batch_size"], size["sequence_length"], size["dim"])
    x_BTD = torch.randn(shape, device=DEVICE, requires_grad=True)
    out_BTD = torch.randn(shape, device=DEVICE)

    def work() -> None:
        layer.zero_grad(set_to_none=True)
        x_BTD.grad = None
        forward(layer, x_BTD).backward(out_BTD)

    return _warm(work, WARMUP_STEPS)


def _save(size: Size, blocking: bool) -> Repeat:
    use_single_arena()
    retain_freed_memory()
    model = initialize(Model(config(size).model).to(DEVICE), 0)
    optimizer = Optimizer(model, model, config(size).optimizer)
    directory = tempfile.TemporaryDirectory()
    numbers = iter(range(10**6))

    def repeat() -> float:
        path = Path(directory.name) / str(next(numbers))
        waits: list[Callable[[], None]] = []

        def work() -> None:
            waits.append(start_saving(optimizer.state(), path))
            if blocking:
                waits[0]()

        seconds = timed(work)
        waits[0]()
        return seconds

    repeat()
    return repeat


def _warm(work: Callable[[], Any], times: int = 2) -> Repeat:
    """Run the work before it is measured, to compile it and to allocate its memory."""

    def finished() -> None:
        work()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    for _ in range(times):
        finished()
    retain_freed_memory()  # Where a single arena is used.
    return lambda: timed(finished)


def _batch(size: Size) -> Tensor:
    """Return the same random tokens every time, [B, T + 1]."""
    shape = (size["batch_size"], size["sequence_length"] + 1)
    tokens_BS = np.random.default_rng(0).integers(0, size["vocab_size"], shape)
    return torch.from_numpy(tokens_BS).to(DEVICE)


def _our_batch(size: Size) -> Batch[Tensor]:
    tokens_BS = _batch(size)
    return Batch(tokens_BS[:, :-1], tokens_BS[:, 1:])


def _from_numpy(batch: Batch) -> Batch[Tensor]:
    return batch.map(lambda array: torch.from_numpy(array).to(DEVICE).long())
