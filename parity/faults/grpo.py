"""Mistakes in GRPO, as patches of one framework."""

from dataclasses import replace
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import torch

import mooshak_jax.objectives
import mooshak_torch.objectives
import mooshak_torch.ops.cross_entropy
from mooshak.config.grpo import GRPOConfig
from mooshak.data.packing import Batch
from mooshak.numerics.grpo import Tokens, kl_estimates
from parity.faults.fault import Fault
from parity.faults.model import Patch
from parity.faults.sft import local_denominator_jax, local_denominator_torch

to, jo = mooshak_torch.objectives, mooshak_jax.objectives


def changed_tokens(objectives: ModuleType, change: Any) -> list[Patch]:
    """Compute the losses of `change(tokens)`."""
    original = objectives.token_losses

    def changed(tokens: Tokens, *arguments: Any) -> Any:
        return original(change(tokens), *arguments)

    return [(objectives, "token_losses", changed)]


def late(roll: Any) -> Any:
    """Take the old log-probability of each token for that of the token before."""
    return lambda tokens: tokens._replace(old_log_probs=roll(tokens.old_log_probs, 1, 1))


def own_reference(detach: Any) -> Any:
    """Update the reference in every step: it is the model that is trained."""
    return lambda tokens: tokens._replace(reference_log_probs=detach(tokens.log_probs))


def kl_without_ratio(objectives: ModuleType) -> list[Patch]:
    """Estimate the KL divergence without the ratio of new to old probability."""
    original = objectives.token_losses

    def changed(tokens: Tokens, grpo: GRPOConfig, xp: Any, *rest: Any) -> Any:
        metrics = original(tokens, grpo, xp, *rest)[1]
        losses = original(tokens, replace(grpo, beta=0.0), xp, *rest)[0]
        return losses + grpo.beta * kl_estimates(tokens, xp), metrics

    return [(objectives, "token_losses", changed)]


def without_temperature(module: ModuleType) -> list[Patch]:
    """Take log-probabilities at temperature 1, not at that of the samples."""
    original = module.token_log_probs

    def changed(x_BTD: Any, head: Any, labels_BT: Any, chunk: int, *_: Any) -> Any:
        return original(x_BTD, head, labels_BT, chunk)

    return [(module, "token_log_probs", changed)]


def padding_counted() -> tuple[list[Patch], list[Patch]]:
    """Count all positions as labels, in torch and in JAX."""

    def prepare(self: Any, batch: Batch, *_: Any) -> int:
        return int(batch.labels.shape[0] * batch.labels.shape[1])

    return [(to.PolicyLM, "prepare", prepare)], [(jo.PolicyLM, "prepare", prepare)]


GRPO = {
    "KL estimator without the ratio": Fault(
        "grpo",
        "^the KL estimator has no ratio, in (torch|JAX)$",
        lambda: kl_without_ratio(to),
        lambda: kl_without_ratio(jo),
    ),
    "temperature forgotten in the ratio": Fault(
        "grpo",
        "^the temperature is missing in the ratio, in (torch|JAX)$",
        lambda: without_temperature(mooshak_torch.ops.cross_entropy),
        lambda: without_temperature(jo),
    ),
    "reference updated in every step": Fault(
        "grpo",
        "^the reference is the model that is trained, in (torch|JAX)$",
        lambda: changed_tokens(to, own_reference(torch.Tensor.detach)),
        lambda: changed_tokens(jo, own_reference(jax.lax.stop_gradient)),
    ),
    "old log-probabilities one token late": Fault(
        "grpo",
        "^old log-probabilities one token late, in (torch|JAX)$",
        lambda: changed_tokens(to, late(torch.roll)),
        lambda: changed_tokens(jo, late(jnp.roll)),
    ),
    "denominator of GRPO per micro-batch": Fault(
        "grpo",
        "^step 0: denominator of each micro-batch",
        lambda: local_denominator_torch(to.PolicyLM),
        lambda: local_denominator_jax(jo.PolicyLM, "measure"),
    ),
    "padding counted in the mean over tokens": Fault(
        "grpo",
        "^step 0: prompts and padding count",
        lambda: padding_counted()[0],
        lambda: padding_counted()[1],
    ),
}
"""Name -> fault."""
