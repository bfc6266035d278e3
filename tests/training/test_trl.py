"""Losses of preferences and of GRPO against TRL's own functions."""

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mooshak.config.dpo import DPOConfig
from mooshak.config.grpo import GRPOConfig
from mooshak.numerics.grpo import Tokens, group_advantages, token_losses, token_weights
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


GRPO = {
    "dapo": GRPOConfig(epsilon=0.2, epsilon_high=0.28),
    "grpo": GRPOConfig(loss_type="grpo", beta=0.3),
    "dr_grpo": GRPOConfig(loss_type="dr_grpo", max_completion_length=9),
    "gspo": GRPOConfig(loss_type="grpo", importance_sampling_level="sequence", epsilon=0.1),
}
ADVANTAGES = (0.5, -1.2, 0.7, 1.1, -0.4, -0.7)


@pytest.mark.parametrize("name", GRPO)
def test_grpo_losses_are_those_of_trl(name: str) -> None:
    from trl import GRPOTrainer

    grpo, lengths = GRPO[name], torch.tensor(LENGTHS).ravel()
    # Near each other: only some ratios are clipped.
    new, old, reference = (token_log_probs(0) + 0.3 * token_log_probs(seed) for seed in (1, 2, 3))
    accelerator = SimpleNamespace(
        num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x, device="cpu"
    )
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=accelerator,
        args=SimpleNamespace(use_bias_correction_kl=True, delta=None, steps_per_generation=1),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level=grpo.importance_sampling_level,
        beta=grpo.beta,
        epsilon_low=grpo.epsilon,
        epsilon_high=grpo.clip_bounds[1] - 1,
        loss_type=grpo.loss_type,
        use_vllm=False,
        vllm_importance_sampling_correction=False,
        current_gradient_accumulation_steps=1,
        max_completion_length=grpo.max_completion_length,
        _entropy_bonus_enabled=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _get_per_token_logps_and_entropies=lambda *_, **__: (new, torch.zeros(6, 7), None),
    )
    inputs = {
        "prompt_ids": torch.zeros(6, 1).long(),
        "prompt_mask": torch.ones(6, 1).long(),
        "completion_ids": torch.zeros(6, 7).long(),
        "completion_mask": mask().long(),
        "advantages": torch.tensor(ADVANTAGES),
        "old_per_token_logps": old,
        "ref_per_token_logps": reference,
        "num_items_in_batch": lengths.sum(),
    }
    theirs = GRPOTrainer._compute_loss(trainer, None, inputs)
    tokens = Tokens(*(x.double() for x in (new, old, reference)), torch.tensor(ADVANTAGES)[:, None])
    losses, metrics = token_losses(
        tokens, grpo, torch, lambda x: (x.sum(1) / lengths)[:, None].expand(6, 7)
    )
    weights = torch.tensor(token_weights(lengths.tolist(), grpo))
    ours = (losses * mask() * weights[:, None]).sum() / lengths.sum()
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    for key in ("clip_ratio/low_mean", "clip_ratio/high_mean"):
        of_tokens = ((metrics[key] * mask()).sum() / lengths.sum()).item()
        # Of sequences, TRL takes the mean over these.
        of_samples = metrics[key][:, 0].mean().item()
        mean = of_samples if name == "gspo" else of_tokens
        assert mean == pytest.approx(trainer._metrics["train"][key][0])
        assert mean < 1 and (key.endswith("low_mean") or mean > 0)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_are_those_of_trl(scale: str) -> None:
    from trl.trainer.utils import nanstd

    rewards = torch.tensor([[1.0, 0.0, 0.3], [0.2, 0.9, 0.0]])
    theirs = rewards - rewards.mean(1, keepdim=True)
    if scale == "group":
        theirs = theirs / (nanstd(rewards, dim=1)[:, None] + 1e-4)
    if scale == "batch":
        theirs = theirs / (nanstd(rewards) + 1e-4)
    ours = group_advantages(rewards.double().numpy(), GRPOConfig(scale_rewards=scale))
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-6)
