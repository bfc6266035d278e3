"""Learning rate of a step, computed in float64 for both frameworks; weight decay by name."""

import math

from mooshak.config.sections import Config


def learning_rate(config: Config, step: int) -> float:
    """Return the learning rate of optimizer step `step`, counted from 0.

    Linear warmup to the peak, then cosine (arXiv:1608.03983), constant, or warmup-stable-decay
    (arXiv:2404.06395) with a linear decay. wsd's last step has `min_lr_ratio` of the peak; cosine
    reaches it at `total_steps`, one step after its last, as in transformers.
    """
    schedule, peak = config.schedule, config.optimizer.learning_rate
    total = schedule.total_steps
    assert total is not None
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    start = schedule.warmup_steps
    if schedule.kind == "wsd":
        # Step `start` is the last one at the peak, also where the fraction is less than a step.
        first = min(round(total * (1 - schedule.decay_fraction)), total - 1)
        start = max(start, first if schedule.decay_fraction else total) - 1
        total -= 1
    done = min(max(step - start, 0) / max(total - start, 1), 1.0)
    remaining = {
        "cosine": (1 + math.cos(math.pi * done)) / 2,
        "wsd": 1 - done,
        "constant": 1.0,
    }[schedule.kind]
    return peak * (schedule.min_lr_ratio + (1 - schedule.min_lr_ratio) * remaining)


def has_weight_decay(name: str) -> bool:
    """Return whether weight decay applies to a parameter: to matrices, not to gains or biases."""
    return not name.endswith(("norm.weight", ".bias", ".dora_magnitude"))
