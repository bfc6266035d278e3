"""Preference losses against TRL's own functions."""

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mooshak.config.dpo import DPOConfig
from mooshak.numerics.preference import Pairs, pair_losses

pytest.importorskip("trl")
pytestmark = pytest.mark.slow  # The import takes seconds.

CASES = {
    "sigmoid": DPOConfig(beta=0.3),
    "robust": DPOConfig("robust", beta=0.3, label_smoothing=0.1),
    "ipo": DPOConfig("ipo", beta=0.4),
    "apo_zero": DPOConfig("apo_zero", beta=0.2),
    "sigmoid_norm": DPOConfig(beta=2.0, length_normalized=True),
}
LENGTHS = [[3, 5, 2], [4, 1, 6]]
"""Tokens of the chosen and of the rejected answers."""


def token_log_probs(seed: int) -> Tensor:
    """Log-probabilities of the tokens [6, 7] of three chosen and three rejected answers."""
    values = -torch.rand(6, 7, generator=torch.Generator().manual_seed(seed)) * 3
    return values * mask()


def mask() -> Tensor:
    return (torch.arange(7) < torch.tensor(LENGTHS).view(6, 1)).float()


def our_losses(dpo: DPOConfig) -> Tensor:
    logps, reference = (token_log_probs(seed).sum(1).double().chunk(2) for seed in (0, 1))
    n = torch.tensor(LENGTHS, dtype=torch.float64)
    losses: Tensor = pair_losses(Pairs(*logps, *reference, *n), dpo, torch)[0]
    return losses


@pytest.mark.parametrize("name", CASES)
def test_dpo_losses_are_those_of_trl(name: str) -> None:
    from trl import DPOTrainer

    accelerator = SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x, device="cpu")
    outputs = {"entropy": 0, "mean_logits": 0, "is_top1": 0}
    outputs = {key: torch.zeros(6, 7) for key in outputs} | {"is_top1": torch.zeros(6, 7).bool()}
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False),
        accelerator=accelerator,
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=[name],
        loss_weights=[1.0],
        beta=CASES[name].beta,
        label_smoothing=CASES[name].label_smoothing,
        use_weighting=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
    )
    reference = token_log_probs(1).sum(1).chunk(2)
    inputs: dict[str, Any] = {
        "input_ids": torch.zeros(6, 8, dtype=torch.long),
        "completion_mask": torch.cat([torch.zeros(6, 1), mask()], 1),
        "ref_chosen_logps": reference[0],
        "ref_rejected_logps": reference[1],
    }
    model = lambda **_: SimpleNamespace(log_probs=token_log_probs(0), **outputs)  # noqa: E731
    theirs = DPOTrainer._compute_loss(trainer, model, inputs, False)
    assert our_losses(CASES[name]).mean().item() == pytest.approx(theirs.item(), rel=1e-6)


def test_simpo_and_orpo_are_those_of_trl() -> None:
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    n = torch.tensor(LENGTHS)
    means = [one / k for one, k in zip(token_log_probs(0).sum(1).chunk(2), n, strict=True)]
    common = {"accelerator": SimpleNamespace(device="cpu"), "alpha": 0.0, "beta": 2.0}
    simpo = SimpleNamespace(**common, loss_type="simpo", simpo_gamma=0.3, label_smoothing=0.1)
    theirs = CPOTrainer.cpo_loss(simpo, *means)[0]
    ours = our_losses(DPOConfig("simpo", beta=2.0, gamma=0.3, label_smoothing=0.1))
    torch.testing.assert_close(ours, theirs.double(), rtol=1e-6, atol=1e-6)
    # TRL subtracts the loss of the odds from the cross entropy.
    theirs = -means[0] - ORPOTrainer.odds_ratio_loss(SimpleNamespace(**common), *means)[0]
    ours = our_losses(DPOConfig("orpo", beta=2.0))
    torch.testing.assert_close(ours, theirs.double(), rtol=1e-6, atol=1e-6)
