"""Numbers that are not finite (NaN, infinity): they end a run, or their step is left out.

`train.on_nonfinite` chooses. A float16 run halves its loss scale after a gradient that is not
finite and leaves the step out; that is none of this, until the scale is very small.
"""

import math
import sys
from collections.abc import Mapping

from mooshak.config.sections import Config
from mooshak.errors import InputError

MAX_SKIPPED_IN_SUCCESSION = 20
"""Steps left out one after the other, after which the run ends nevertheless."""
MIN_LOSS_SCALE = 2.0**-16
"""Loss scale below which a gradient that is not finite is not the scale's fault."""


class NonFiniteSteps:
    """The check of every step of a run."""

    def __init__(self, config: Config, is_main: bool):
        self.config, self.is_main = config, is_main
        self.in_succession = 0

    def check(self, step: int, metrics: Mapping[str, float]) -> str:
        """Return why the run has to stop after a step with these metrics, or an empty text.

        `step` counts from 1. The metrics are those of all processes. A step that was left out is
        reported on standard error.
        """
        wrong = [
            f"{key} is {metrics[key]}"
            for key in ("loss", "grad_norm", "validation_loss")
            if key in metrics and not math.isfinite(metrics[key])
        ]
        if metrics.get("loss_scale", 0.0) > MIN_LOSS_SCALE and math.isfinite(metrics["loss"]):
            wrong = [text for text in wrong if not text.startswith("grad_norm")]
        is_left_out = any(not text.startswith("validation") for text in wrong)
        self.in_succession = self.in_succession + 1 if is_left_out else 0
        if not wrong:
            return ""
        B = self.config.train.batch_size
        first = (step - 1) * B
        what = f"step {step}: {' and '.join(wrong)}; its batch is rows {first} .. {first + B - 1}"
        if self.config.train.on_nonfinite == "stop":
            return (
                f"{what}; lower optimizer.learning_rate or optimizer.max_grad_norm, look at the "
                "batch, or leave such steps out with --train.on_nonfinite skip"
            )
        if self.in_succession == MAX_SKIPPED_IN_SUCCESSION:
            return f"{what}; it is the last of {self.in_succession} such steps in succession"
        if self.is_main:
            effect = "; its update is left out" if is_left_out else ""
            print(f"{what}{effect}", file=sys.stderr)
        return ""


def check_state(step: int, names: list[str]) -> None:
    """Raise `InputError` if a tensor of the state after a step is not finite; none is saved then.

    `names` has a tensor of each process that is not finite, or empty texts.
    """
    if wrong := next(filter(None, names), ""):
        raise InputError(
            f"step {step}: {wrong} is not finite, and the checkpoint is not saved; resume from an "
            "earlier one with a lower optimizer.learning_rate"
        )
