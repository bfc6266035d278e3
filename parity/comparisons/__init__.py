"""The comparisons of `parity.check`: a function for each part, which yields lines of the report."""

from collections.abc import Callable, Iterator

from parity.comparisons.case import Line, ParityCase
from parity.comparisons.decoding import cache, decoding, engines, roll_back
from parity.comparisons.documents import document_mask, packing
from parity.comparisons.forward_backward import forward, gradients, log_probs, loss, padding
from parity.comparisons.grpo import grpo
from parity.comparisons.preferences import preferences
from parity.comparisons.sft import sft, sft_packing
from parity.comparisons.training import training

COMPARISONS: dict[str, Callable[[ParityCase], Iterator[Line]]] = {
    "forward": forward,
    "loss": loss,
    "padding": padding,
    "log_probs": log_probs,
    "gradients": gradients,
    "document_mask": document_mask,
    "packing": packing,
    "preferences": preferences,
    "grpo": grpo,
    "training": training,
    "sft": sft,
    "sft_packing": sft_packing,
    "cache": cache,
    "roll_back": roll_back,
    "decoding": decoding,
    "engines": engines,
}

WITH_NOISE_FLOOR = tuple(part for part in COMPARISONS if part not in ("decoding", "engines"))
"""Parts whose lines have a noise floor; tokens either differ or do not."""

WITH_ITSELF = ("packing", "sft_packing", "cache", "roll_back")
"""Parts that compare each framework with itself."""
