"""Section `dpo` of the configuration: the objective on preference pairs."""

from dataclasses import dataclass
from typing import Literal

from mooshak.config.fields import check_fields, number
from mooshak.errors import require


@dataclass(frozen=True)
class DPOConfig:
    """Preference optimization on pairs of a chosen and a rejected answer (docs/align.md)."""

    loss: Literal["sigmoid", "robust", "ipo", "apo_zero", "kto", "simpo", "orpo"] = "sigmoid"
    """sigmoid (DPO, arXiv:2305.18290; with label_smoothing: cDPO), robust (arXiv:2403.00409), ipo
    (arXiv:2310.12036), apo_zero (arXiv:2408.06266), kto (arXiv:2402.01306; single answers with a
    label, or pairs); without a reference: simpo (arXiv:2405.14734) and orpo (arXiv:2403.07691)."""
    beta: float = number(0.1, above=0)
    """Scale of the rewards; ipo: the regularization; orpo: weight of the odds ratio."""
    label_smoothing: float = number(0.0, at_least=0, below=0.5)
    """sigmoid, robust, simpo: the probability that a pair's order is wrong."""
    gamma: float = number(0.5, at_least=0)
    """simpo: margin between the rewards of chosen and rejected."""
    desirable_weight: float = number(1.0, above=0)
    """kto: weight of the loss of desirable answers."""
    undesirable_weight: float = number(1.0, above=0)
    """kto: weight of the loss of undesirable answers."""
    length_normalized: bool | None = None
    """Divide a log-probability by the number of tokens of its answer (null: as in the paper, in
    simpo and orpo, and as TRL does, in ipo)."""
    precompute_reference: bool = True
    """Compute the reference's log-probabilities once and save them in the run directory; false: a
    frozen copy of the initial model computes those of each batch. With adapters it takes no memory:
    it is the base model, with the adapters off."""
    max_skipped: int = number(0, at_least=0)
    """Pairs that may be left out because an answer has no label left, or both are equal once cut.
    More are an error."""

    def __post_init__(self) -> None:
        check_fields(self, "dpo")
        smoothed = ("sigmoid", "robust", "simpo")
        require(
            self.label_smoothing == 0 or self.loss in smoothed,
            f"dpo.label_smoothing is one of {', '.join(smoothed)}, not of {self.loss}; set it to 0",
        )

    @property
    def has_reference(self) -> bool:
        """True for a loss that compares with a reference model."""
        return self.loss not in ("simpo", "orpo")

    @property
    def is_normalized(self) -> bool:
        """True if log-probabilities are means over the tokens of an answer."""
        if self.length_normalized is None:
            return self.loss in ("ipo", "simpo", "orpo")
        return self.length_normalized
