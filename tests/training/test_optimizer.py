"""Gradient clipping in float32: the sum of many squares is accurate."""

import numpy as np
import pytest
import torch

from mooshak_torch.optimizer import clip_gradients


@pytest.mark.parametrize("shape", [(3000, 1000), (7, 3), (5,)], ids=str)
def test_norm_of_many_gradients_is_exact_to_float32(shape: tuple[int, ...]) -> None:
    values = np.random.default_rng(0).normal(0, 1e-3, shape).astype(np.float32)
    parameter = torch.nn.Parameter(torch.zeros(shape))
    parameter.grad = torch.tensor(values)
    truth = np.linalg.norm(values.astype(np.float64))
    norm = clip_gradients([parameter], max_norm=truth / 2)
    # torch.nn.utils.get_total_norm is off by 2e-4 for the first.
    assert abs(norm.item() / truth - 1) < 1e-7
    assert norm.dtype == torch.float32
    assert np.linalg.norm(parameter.grad.double()) == pytest.approx(truth / 2, rel=1e-6)
