"""Mistakes in preference objectives and adapters, as patches of one framework."""

from dataclasses import replace
from types import ModuleType
from typing import Any

from mooshak.numerics.preference import Pairs
from parity.faults.model import Patch


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


def log_probs_one_late(objectives: ModuleType, roll: Any) -> list[Patch]:
    """Sum the log-probabilities of the positions before those of the answers."""
    original = objectives.sum_segments

    def late(values_BT: Any, batch: Any) -> Any:
        return original(roll(values_BT, 1, 1), batch)

    return [(objectives, "sum_segments", late)]


def scale_doubled(model: ModuleType) -> list[Patch]:
    """Multiply the output of the adapters by twice their scale."""
    original = model.add_adapter

    def doubled(y: Any, x: Any, layer: Any, lora: Any) -> Any:
        return original(y, x, layer, replace(lora, alpha=2 * lora.alpha))

    return [(model, "add_adapter", doubled)]
