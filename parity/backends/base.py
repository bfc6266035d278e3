"""The interface of both frameworks, and what their implementations share.

Shapes: B batch, T time, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import numpy as np

from mooshak.checkpoints.base import Checkpoint
from mooshak.config.model import Dtype
from mooshak.config.sections import Config
from mooshak.data.packing import IGNORE_INDEX, Batch
from mooshak.generation.lm import LM
from mooshak.serving.engine import Engine
from parity.distance import Arrays


@dataclass(frozen=True)
class Step:
    """The observable results of one optimizer step."""

    loss: float
    norm: float
    """Gradient norm before clipping."""
    params: Arrays
    exp_avg: Arrays
    exp_avg_sq: Arrays


class ForwardBackward(NamedTuple):
    """The results of a forward and a backward pass."""

    logits: np.ndarray
    """[B, T, V]."""
    loss: float
    """Cross entropy in nats, summed over the labels that are not ignored; of preference pairs, the
    summed loss of the pairs."""
    gradients: Arrays
    """Of the loss."""


class CacheCall(NamedTuple):
    """One call of a model with KV caches."""

    start: int
    """Tokens in the caches before the call; caches that have more are truncated first."""
    tokens_BT: np.ndarray


class Backend(Protocol):
    """One framework with the weights of one checkpoint."""

    name: str
    source: Checkpoint

    def with_source(self, source: Checkpoint) -> "Backend":
        """Return the same framework on the same device with other weights."""

    def operations(self, dtype: Dtype, tokens_BT: np.ndarray) -> Arrays:
        """Return inputs and outputs of every operation in forward order, then `logits`.

        Keys: `layers.0.attention.wq in`, `layers.0.attention.wq out`, `layers.0.attention.wq rope
        out`, ..., `layers.0 out`, `lm_head out`, `logits`.
        """

    def losses(self, config: Config, batches: Sequence[Batch[np.ndarray]]) -> np.ndarray:
        """Return the mean cross entropy of each batch under the checkpoint's weights, float64."""

    def forward_backward(self, config: Config, batch: Batch[np.ndarray]) -> ForwardBackward:
        """Return logits, summed cross entropy and gradients, under the document mask if any."""

    def log_probs(
        self, dtype: Dtype, batch: Batch[np.ndarray], weights_BT: np.ndarray
    ) -> tuple[np.ndarray, Arrays]:
        """Return the log-probability of every label in nats, [B, T], and gradients.

        Ignored labels have log-probability 0. The gradients are those of the weighted sum.
        """

    def steps(self, config: Config, batches: Sequence[Batch[np.ndarray]]) -> Iterator[Step]:
        """Yield the optimizer steps on these batches, taken by the trainer's step function."""

    def cached_logits(self, dtype: Dtype, calls: Sequence[CacheCall]) -> list[np.ndarray]:
        """Return the logits [B, T, V] of each call, all with the same KV caches.

        The positions of a call start at the length that the caches report.
        """

    def lm(self, dtype: Dtype) -> LM:
        """Return the model behind the Python API, without a tokenizer."""

    def engine(self, lm: LM) -> Engine:
        """Return an engine of four slots, which reads prompts in chunks of five tokens."""


class FixedDtype:
    """A backend that computes in one dtype, whatever dtype it is asked for."""

    def __init__(self, backend: Backend, dtype: Dtype):
        self.name, self.source = f"{backend.name} in {dtype}", backend.source
        self._backend, self._dtype = backend, dtype

    def _config(self, config: Config) -> Config:
        return replace(config, train=replace(config.train, dtype=self._dtype))

    def with_source(self, source: Checkpoint) -> "FixedDtype":
        return FixedDtype(self._backend.with_source(source), self._dtype)

    def operations(self, dtype: Dtype, tokens_BT: np.ndarray) -> Arrays:
        return self._backend.operations(self._dtype, tokens_BT)

    def losses(self, config: Config, batches: Sequence[Batch[np.ndarray]]) -> np.ndarray:
        return self._backend.losses(self._config(config), batches)

    def forward_backward(self, config: Config, batch: Batch[np.ndarray]) -> ForwardBackward:
        return self._backend.forward_backward(self._config(config), batch)

    def log_probs(
        self, dtype: Dtype, batch: Batch[np.ndarray], weights_BT: np.ndarray
    ) -> tuple[np.ndarray, Arrays]:
        return self._backend.log_probs(self._dtype, batch, weights_BT)

    def steps(self, config: Config, batches: Sequence[Batch[np.ndarray]]) -> Iterator[Step]:
        return self._backend.steps(self._config(config), batches)

    def cached_logits(self, dtype: Dtype, calls: Sequence[CacheCall]) -> list[np.ndarray]:
        return self._backend.cached_logits(self._dtype, calls)

    def lm(self, dtype: Dtype) -> LM:
        return self._backend.lm(self._dtype)

    def engine(self, lm: LM) -> Engine:
        return self._backend.engine(lm)


class Recorder:
    """Inputs and outputs of modules in call order; the first value of each name is retained."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self._linear = ""

    def add(self, path: str, end: str, value: Any) -> None:
        """Record the `in` or the `out` of the module at a path."""
        if path == "rope":  # All layers share one module: it is named after its input.
            path = f"{self._linear} rope"
        elif path.endswith(("wq", "wk")):
            self._linear = path
        self.values.setdefault(f"{path} {end}", value)


def count_labels(batch: Batch[np.ndarray]) -> int:
    """Return the number of labels that are not ignored."""
    return int((batch.labels != IGNORE_INDEX).sum())


def cache_shape(calls: Sequence[CacheCall]) -> tuple[int, int]:
    """Return the rows and the slots of caches that hold the tokens of all calls."""
    return len(calls[0].tokens_BT), sum(call.tokens_BT.shape[1] for call in calls)
