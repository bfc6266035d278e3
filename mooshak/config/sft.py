"""Section `sft` of the configuration: how conversations become training rows."""

from dataclasses import dataclass
from typing import Literal

from mooshak.config.fields import check_fields, number


@dataclass(frozen=True)
class SFTConfig:
    """Supervised fine-tuning on conversations (data.format conversations)."""

    packing: Literal["best_fit", "none"] = "best_fit"
    """best_fit: rows of train.sequence_length tokens, filled with conversations that do not see
    each other (arXiv:2404.10830); none: a conversation per row, in batches of similar lengths."""
    neftune_alpha: float = number(0.0, at_least=0)
    """Uniform noise on the embeddings, at most this / sqrt(tokens of the conversation x model.dim)
    (NEFTune, arXiv:2310.05914; 0: none). Validation has none."""
    max_skipped: int = number(0, at_least=0)
    """Conversations that may be left out because no label is left: an empty answer, or a prompt
    that fills the sequence. More are an error."""

    def __post_init__(self) -> None:
        check_fields(self, "sft")
