"""The case that both frameworks compute, and a line of the report.

Shapes: B batch, T time, S = T + 1 tokens, n steps.
"""

from dataclasses import dataclass

import numpy as np

from mooshak.config.model import Dtype
from mooshak.config.sections import (
    Config,
    OptimizerConfig,
    ParallelConfig,
    ScheduleConfig,
    TrainConfig,
)
from mooshak.data.packing import Batch, make_batch
from parity.backends import Backend
from parity.tolerances import EPS

STEPS = 20


@dataclass(frozen=True)
class Line:
    """One line of the report."""

    name: str
    dtype: str
    measured: float
    allowed: float
    noise_floor: float | None = None
    """The effect of rounding on this quantity: the other framework's own distance from float64
    where `measured` is one framework's; in float64, the larger of both frameworks' distances of
    float32 from float64, times the ratio of the roundings (`ROUNDING`)."""
    negative_control: float | None = None
    """The same measurement with the fault `fault` injected."""
    fault: str = ""
    where: str = ""
    """First place that is wrong; of a line that passes, the place of the largest difference."""
    layout: str = ""
    """The mesh or the processes that the line is about."""

    documents: bool = False
    """True for a line about a layout on packed documents."""

    @property
    def passed(self) -> bool:
        """True if the difference is allowed, and an injected fault exceeds what is allowed."""
        blind = self.negative_control is not None and self.negative_control <= self.allowed
        return bool(np.isfinite(self.measured) and self.measured <= self.allowed and not blind)


@dataclass(frozen=True)
class ParityCase:
    """Both backends and the tokens that they are compared on."""

    torch: Backend
    jax: Backend
    tokens_nBS: np.ndarray
    decode: int
    max_grad_norm: float = 1.0
    on_cpu: tuple[Backend, Backend] | None = None
    """PyTorch and JAX on the CPU, where the frameworks of the case compute on an accelerator."""

    @property
    def inputs_BT(self) -> np.ndarray:
        return self.tokens_nBS[0][:, :-1]

    @property
    def prompts(self) -> list[list[int]]:
        """Return the prompts of decoding, of unequal lengths up to eight tokens."""
        rows = self.tokens_nBS[0].tolist()
        return [row[: 8 - i % 3] for i, row in enumerate(rows)]

    @property
    def batches(self) -> list[Batch[np.ndarray]]:
        """Return one batch per step."""
        return [make_batch(tokens_BS) for tokens_BS in self.tokens_nBS]

    @property
    def packed(self) -> list[Batch[np.ndarray]]:
        """Return the same tokens as rows of packed documents, with document masks."""
        return [make_batch(tokens_BS, segments(tokens_BS.shape)) for tokens_BS in self.tokens_nBS]

    def config(self, dtype: Dtype) -> Config:
        """Return a recipe that uses clipping, weight decay, a schedule and accumulation."""
        _, batch, tokens = self.tokens_nBS.shape
        return Config(
            model=self.torch.source.model,
            optimizer=OptimizerConfig(
                learning_rate=1e-3, eps=EPS, weight_decay=0.1, max_grad_norm=self.max_grad_norm
            ),
            schedule=ScheduleConfig(warmup_steps=5),
            train=TrainConfig(
                steps=STEPS,
                batch_size=batch,
                sequence_length=tokens - 1,
                gradient_accumulation_steps=2 if batch % 2 == 0 else 1,
                dtype=dtype,
                loss_chunk=batch * 24,
            ),
            parallel=ParallelConfig(mesh="data=1"),
        )


def segments(shape: tuple[int, ...]) -> np.ndarray:
    """Return the documents of rows of T + 1 tokens, one of a single token in most rows.

    Every fifth row is one document: data-parallel ranks get unequal numbers of labels.
    """
    n_rows, n_tokens = shape
    T = n_tokens - 1
    short, long = T // 3, T - 1 - T // 3
    rows = [(short, 1, long), (1, long, short), (long, short, 1), (long, 1, short), (T,)]
    segments_BS = np.ones(shape, np.int32)
    for row in range(n_rows):
        for border in np.cumsum(rows[row % 5])[:-1]:
            segments_BS[row, border:] += 1
    return segments_BS
