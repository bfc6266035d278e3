"""The engine of a framework: slots of one fixed shape, in which requests are decoded together.

`mooshak_torch.engine.Engine` and `mooshak_jax.engine.Engine` implement it; the scheduler decides
which request is in which slot. Every computation has one shape: a chunk of one prompt, or one token
in each slot. So the bits of a request do not depend on its slot and its neighbours, and JAX
compiles everything when the engine starts.
Shapes: B slots, C tokens of a chunk, V vocabulary, N most probable tokens.
"""

import abc
import dataclasses
from collections.abc import Sequence

import numpy as np

from mooshak.config.generate import GenerateConfig
from mooshak.config.model import ModelConfig
from mooshak.errors import require
from mooshak.generation.adjustments import Adjustments
from mooshak.generation.log_probs import TokenLogProbs
from mooshak.generation.parameters import SamplingParameters

CACHE_BLOCK = 512
"""Cache slots that are attended to at once: SDPA on a CPU has blocks of this size."""


@dataclasses.dataclass
class StepInputs:
    """Arguments of a step: one token in each slot."""

    position_B: np.ndarray
    """Position of the token that is sampled, int [B]; in unused slots one that may be written."""
    visible: int
    """Number of tokens of the longest text in use, with the token that is sampled."""
    uniform_B: np.ndarray
    """Sampling noise, float64 [B]."""
    parameters: SamplingParameters
    adjustments: Adjustments | None
    log_probs: bool
    """Return the log-probabilities of the sampled tokens."""
    top: bool
    """Return the most probable tokens, too."""
    processed_B: np.ndarray
    """True in slots whose log-probabilities are those of the filtered distribution."""
    continues: bool
    """False if no token follows in any slot: the model is not called."""


class Engine(abc.ABC):
    """A model with a KV cache of `n_slots` rows; calls come from one thread."""

    def __init__(
        self, model: ModelConfig, n_slots: int = 16, max_len: int | None = None, chunk: int = 128
    ):
        """Check the shape. `max_len` is the length of a prompt and its continuation in tokens.

        Raises `InputError` for numbers that the model does not allow.
        """
        limit = model.max_seq_len
        max_len = limit if max_len is None else max_len
        require(n_slots >= 1, f"n_slots {n_slots} must be at least 1")
        require(chunk >= 1, f"chunk {chunk} must be at least 1")
        require(2 <= max_len <= limit, f"max_len {max_len} is not in 2 .. {limit}, the model's")
        self.config, self.n_slots, self.max_len = model, n_slots, max_len
        self.chunk = min(chunk, max_len)
        self.block = min(CACHE_BLOCK, max_len)
        self.cache_len = -(-max_len // self.block) * self.block

    @abc.abstractmethod
    def prefill(
        self,
        slot: int,
        tokens: Sequence[int],
        start: int,
        targets: Sequence[int] | None = None,
        top: bool = False,
    ) -> TokenLogProbs | None:
        """Write the keys and values of at most `chunk` tokens from position `start` on.

        The slot's next token is sampled after the last one. With `targets`, a token for each of
        `tokens`, return the log-probability of each target after its token, and with `top` the most
        probable tokens in its place.
        """

    @abc.abstractmethod
    def copy_slot(self, source: int, target: int) -> None:
        """Copy all keys and values of a slot to another one."""

    @abc.abstractmethod
    def step(self, inputs: StepInputs) -> tuple[np.ndarray, TokenLogProbs | None]:
        """Sample a token in each slot, int64 [B], and compute the logits of the next one."""

    def close(self) -> None:
        """End what the engine started; no call follows."""
        return

    def warm_up(self) -> None:
        """Run every computation once; nothing is compiled afterwards."""
        tokens = [0] * self.chunk
        self.prefill(0, tokens, 0)
        self.prefill(0, tokens, 0, tokens, top=True)
        self.copy_slot(0, self.n_slots - 1)
        neutral = np.zeros((self.n_slots, self.config.vocab_size))
        adjustments = Adjustments(neutral, neutral + 1, neutral)
        filtered = GenerateConfig(temperature=1.0, top_k=1, top_p=0.5, min_p=0.5, typical_p=0.5)
        for settings in (GenerateConfig(), GenerateConfig(temperature=1.0), filtered):
            for given in (None, adjustments):
                for processed in (False, True):
                    self.step(
                        StepInputs(
                            np.zeros(self.n_slots, np.int64),
                            visible=1,
                            uniform_B=np.zeros(self.n_slots),
                            parameters=SamplingParameters.of([settings] * self.n_slots),
                            adjustments=given,
                            log_probs=True,
                            top=True,
                            processed_B=np.full(self.n_slots, processed),
                            continues=True,
                        )
                    )

    def pad_chunk(self, tokens: Sequence[int], start: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the tokens and positions of a chunk, int64 [C] each.

        Padding repeats the last token. Beyond `max_len` it repeats the last position too, so that
        it writes there what the last token writes.
        """
        tokens_C = np.full(self.chunk, tokens[-1], np.int64)
        tokens_C[: len(tokens)] = tokens
        return tokens_C, np.minimum(start + np.arange(self.chunk), self.max_len - 1)
