"""Evaluation: rows are divided among processes, `evaluate.batch_size` of all of them at a time."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mooshak.config.sections import Config, EvaluateConfig
from mooshak.data.packing import Batch, make_batch
from mooshak_torch.objectives import CausalLM
from mooshak_torch.step import evaluate


@pytest.mark.parametrize(("rank", "expected"), [(0, [2, 2, 2]), (2, [2, 2, 2]), (3, [2, 2, 1])])
def test_batch_size_is_that_of_all_processes(rank: int, expected: list[int]) -> None:
    n_rows: list[int] = []

    class Counting(CausalLM):
        def __init__(self) -> None:
            torch.nn.Module.__init__(self)

        def forward(self, batch: Batch[torch.Tensor]) -> torch.Tensor:
            n_rows.append(len(batch.tokens))
            self.metrics["rows"] = self.metrics.get("rows", 0) + torch.tensor(len(batch.tokens))
            return batch.tokens.sum()

    parallel = SimpleNamespace(
        dp_rank=rank,
        dp_size=4,
        device="cpu",
        shard_local_batch=lambda batch: batch.map(torch.from_numpy),
        sum=lambda total: total,
    )
    batch = make_batch(np.arange(23 * 3, dtype=np.int32).reshape(23, 3))
    config = Config(evaluate=EvaluateConfig(batch_size=8))
    sums = evaluate(Counting(), batch, config, parallel)  # type: ignore[arg-type]
    assert n_rows == expected and sums["loss"] == batch.tokens[rank::4].sum()
    assert sums["rows"] == sum(expected)
