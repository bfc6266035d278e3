"""A benchmark case: its sizes, workers and targets, and what follows from its sizes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mooshak.config.model import ModelConfig
from mooshak.config.sections import Config, EvaluateConfig, RunConfig, TrainConfig

Size = dict[str, Any]
"""Sizes of a case by the names of the configuration's fields."""


@dataclass(frozen=True)
class Target:
    """A bound on a figure, as a ratio to another worker's figure of the same run."""

    ours: str
    other: str | None
    bound: float
    quantity: Literal["speed", "memory", "seconds", "ratio"] = "speed"
    """speed: at least `bound` times the other's; all others: at most. Without another worker, the
    bound is on the figure itself."""


@dataclass(frozen=True)
class Case:
    """One comparison."""

    name: str
    title: str
    workers: Mapping[str, str]
    """Name -> module:function."""
    full: Size
    tiny: Size
    """Sizes of the measurement, and sizes for the tests."""
    unit: str = "tokens/s"
    work: Callable[[Size], float] | None = None
    """Work of one repetition, in the unit times seconds; None: the worker returns the figure."""
    targets: tuple[Target, ...] = ()
    repetitions: int = 5
    grid: tuple[Size, ...] = ()
    """Scaling: sizes that replace fields of `full`, one measurement each."""


def config(size: Size) -> Config:
    """Return the configuration of a case: a llama model, which peers can compute too."""
    fields = {k: size[k] for k in ("vocab_size", "dim", "n_layers", "n_heads", "hidden_dim")}
    T = size["sequence_length"]
    model = ModelConfig(architecture="llama", max_seq_len=T, **fields, **size.get("model", {}))
    train = TrainConfig(batch_size=size["batch_size"], **size.get("train", {}))
    return Config(
        model=model,
        train=train,
        evaluate=EvaluateConfig(every=0),
        run=RunConfig(dir=size.get("dir", "unused"), progress=False, tensorboard=False),
    )


def step_flops(size: Size) -> float:
    """Return the FLOPs of forward and backward on a batch, with full attention scores."""
    tokens = size["batch_size"] * size["sequence_length"]
    return float(config(size).model.flops_per_token(size["sequence_length"]) * tokens)


def spread(bounds: Sequence[int], n: int) -> list[int]:
    """Return `n` lengths, spread evenly between two bounds."""
    low, high = bounds
    return [round(low + (high - low) * i / max(n - 1, 1)) for i in range(n)]


def tuned_tokens(size: Size) -> float:
    """Return the tokens of all conversations, with BOS and EOS; of pairs, the prompt twice."""
    n, answers = size["conversations"], 2 if size["format"] == "preferences" else 1
    prompts, completions = (sum(spread(size[key], n)) for key in ("prompt", "completion"))
    return float(answers * (prompts + completions + 2 * n))


def tokens(size: Size) -> float:
    """Return the tokens of a batch."""
    return size["batch_size"] * size["sequence_length"]


def new_tokens(size: Size) -> float:
    """Return the tokens that all sequences get."""
    return size["batch_size"] * size["new_tokens"]


def requested_tokens(size: Size) -> float:
    """Return the tokens that requests of unequal lengths ask for."""
    return float(sum(spread(size["new_tokens"], size["batch_size"])))
