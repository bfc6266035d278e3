"""Mistakes in preference objectives and adapters, as patches of one framework."""

from dataclasses import replace
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import torch

import mooshak_jax.objectives
import mooshak_torch.objectives
import mooshak_torch.ops.cross_entropy
from mooshak.numerics.preference import Pairs
from parity.faults.fault import Fault
from parity.faults.model import Patch, jm, tm
from parity.faults.sft import local_denominator_jax, local_denominator_torch

to, jo = mooshak_torch.objectives, mooshak_jax.objectives


def answers_swapped(objectives: ModuleType) -> list[Patch]:
    """Take the rejected answers for the chosen ones."""
    original = objectives.pair_losses

    def swapped(pairs: Pairs, *arguments: Any) -> Any:
        chosen, rejected, *rest = pairs
        return original(Pairs(rejected, chosen, rest[1], rest[0], rest[3], rest[2]), *arguments)

    return [(objectives, "pair_losses", swapped)]


def reference_is_trained(objectives: ModuleType, detach: Any) -> list[Patch]:
    """Use the model that is trained as its own reference."""
    original = objectives.pair_losses

    def changed(pairs: Pairs, *arguments: Any) -> Any:
        own = {
            "reference_chosen": detach(pairs.chosen),
            "reference_rejected": detach(pairs.rejected),
        }
        return original(pairs._replace(**own), *arguments)

    return [(objectives, "pair_losses", changed)]


def prompt_counts(objectives: ModuleType) -> list[Patch]:
    """Count all tokens of a segment, the prompt's too, as its answer's."""

    def count(batch: Any) -> Any:
        return objectives.sum_segments(0 * batch.labels + 1, batch)

    return [(objectives, "count_labels", count)]


def labels_one_late(module: ModuleType, roll: Any) -> list[Patch]:
    """Take the log-probability of each position for that of the token before."""
    original = module.token_log_probs

    def late(x_BTD: Any, head: Any, labels_BT: Any, *settings: Any) -> Any:
        return original(x_BTD, head, roll(labels_BT, 1, 1), *settings)

    return [(module, "token_log_probs", late)]


def scale_doubled(model: ModuleType) -> list[Patch]:
    """Multiply the output of the adapters by twice their scale."""
    original = model.add_adapter

    def doubled(y: Any, x: Any, layer: Any, lora: Any) -> Any:
        return original(y, x, layer, replace(lora, alpha=2 * lora.alpha))

    return [(model, "add_adapter", doubled)]


def count_pairs(objectives: ModuleType) -> Any:
    """Return the function that counts the pairs of some rows."""
    return lambda batch: (objectives.count_labels(batch)[:, ::2] > 0).sum()


PREFERENCES = {
    "chosen and rejected swapped": Fault(
        "preferences",
        "^chosen and rejected$",
        lambda: answers_swapped(to),
        lambda: answers_swapped(jo),
    ),
    "reference is the model that is trained": Fault(
        "preferences",
        "^the reference",
        lambda: reference_is_trained(to, torch.Tensor.detach),
        lambda: reference_is_trained(jo, jax.lax.stop_gradient),
    ),
    "prompt counts in the length of an answer": Fault(
        "preferences",
        "^log-probabilities of the answers$",
        lambda: prompt_counts(to),
        lambda: prompt_counts(jo),
    ),
    "log-probabilities of answers one late": Fault(
        "preferences",
        "^log-probabilities of the answers$",
        lambda: labels_one_late(mooshak_torch.ops.cross_entropy, torch.roll),
        lambda: labels_one_late(jo, jnp.roll),
    ),
    "scale of adapters doubled": Fault(
        "preferences",
        "^log-probabilities of the answers$",
        lambda: scale_doubled(tm),
        lambda: scale_doubled(jm),
    ),
    "denominator of pairs per micro-batch": Fault(
        "preferences",
        "^step 0: pairs of each micro-batch in the denominator",
        lambda: local_denominator_torch(to.PreferenceLM, count_pairs(to)),
        lambda: local_denominator_jax(jo.PreferenceLM, "measure", count_pairs(jo)),
    ),
}
"""Name -> fault."""
