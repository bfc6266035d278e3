"""The data of a run, as the training loop sees them: batches by step, validation, a description."""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from mooshak.config.sections import Config
from mooshak.data.conversation_batches import ConversationData
from mooshak.data.manifest import shards_description
from mooshak.data.packing import Batch
from mooshak.data.preference_batches import PreferenceData
from mooshak.data.prompt_batches import PromptData
from mooshak.data.shards import load_or_prepare_shards
from mooshak.tokenizer.base import Tokenizer


class TrainingData(Protocol):
    """Data of a run, for the training loop."""

    tokenizer: Tokenizer
    description: dict[str, Any]
    """Source -> what identifies its training tokens; a resumed run has to have the same."""

    @property
    def summary(self) -> str:
        """A line for the user, printed at the start; may be empty."""
        ...

    def batches(self, rows: Sequence[int], first: int) -> Iterator[Batch[np.ndarray]]:
        """Return these rows of the global batches from step `first` on, arrays int32 [rows, T]."""
        ...

    def validation(self) -> dict[str, Batch[np.ndarray]]:
        """Return the validation rows of each language, arrays int32 [N, T]; always the same."""
        ...


class TextData:
    """Documents in token shards; implements `TrainingData`."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.tokenizer, manifests = load_or_prepare_shards(config)
        self.description = {name: shards_description(one) for name, one in manifests.items()}

    @property
    def summary(self) -> str:
        return ""

    def batches(self, rows: Sequence[int], first: int) -> Iterator[Batch[np.ndarray]]:
        # Grain imports jax and starts threads: only after the framework has made its devices.
        from mooshak.data.batches import batches_of_rows

        return batches_of_rows(self.config, rows, first)

    def validation(self) -> dict[str, Batch[np.ndarray]]:
        # Grain imports jax.
        from mooshak.data.batches import validation_sequences

        return validation_sequences(self.config)


def open_training_data(config: Config) -> TrainingData:
    """Return the data of a configuration, prepared; `data.format` says of which kind."""
    if config.data.format == "preferences":
        return PreferenceData(config)
    if config.data.format == "prompts":
        return PromptData(config)
    return ConversationData(config) if config.data.format == "conversations" else TextData(config)
