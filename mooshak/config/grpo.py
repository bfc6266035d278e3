"""Section `grpo` of the configuration: reinforcement learning with verifiable rewards."""

from dataclasses import dataclass
from typing import Literal

from mooshak.config.fields import check_fields, number
from mooshak.config.generate import MAX_TOP_K, MIN_TEMPERATURE

PREFILL_CHUNK = 32
"""Tokens of a prompt that are read at once: the samples of a prompt share its complete chunks."""


@dataclass(frozen=True)
class GRPOConfig:
    """Group relative policy optimization on sampled answers (docs/align.md); keys as in TRL."""

    reward: str = "mooshak.training.rewards:exact_match"
    """Reward, MODULE:FUNCTION: called as in TRL with prompts, completions and the fields of their
    records, it returns a number for each completion."""
    num_generations: int = number(8, at_least=2)
    """Samples of a prompt: the group that its rewards are compared within."""
    steps_per_generation: int = number(1, at_least=1)
    """Optimizer steps, of train.batch_size samples each, that one rollout is divided into."""
    num_iterations: int = number(1, at_least=1)
    """Times that the samples of a rollout are trained on."""
    max_completion_length: int = number(128, at_least=1)
    """Maximum number of sampled tokens; a sample without its end token is cut there."""
    temperature: float = number(1.0, at_least=MIN_TEMPERATURE)
    """Divisor of the logits, when sampling and in all log-probabilities of the loss."""
    top_k: int = number(0, at_least=0, at_most=MAX_TOP_K)
    """Sample from the k most probable tokens (0: all)."""
    top_p: float = number(1.0, above=0, at_most=1)
    """Nucleus sampling: sample from the smallest set of tokens with this total probability."""
    loss_type: Literal["dapo", "grpo", "dr_grpo"] = "dapo"
    """Mean of the loss: over all tokens of the step (dapo, arXiv:2503.14476), over the tokens of
    each sample and then over samples (grpo, arXiv:2402.03300), or the sum over tokens divided by
    samples x max_completion_length (dr_grpo, arXiv:2503.20783)."""
    importance_sampling_level: Literal["token", "sequence"] = "token"
    """Ratio of new to old probability: of each token, or of the sample, as the geometric mean over
    its tokens (sequence: GSPO, arXiv:2507.18071; with loss_type grpo)."""
    epsilon: float = number(0.2, above=0, below=1)
    """The ratio is clipped at 1 - epsilon and 1 + epsilon_high."""
    epsilon_high: float | None = number(None, above=0)
    """Upper clipping (null: epsilon; DAPO recommends 0.28)."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """Divide advantages by the standard deviation of the rewards of their group, or of the rollout
    (arXiv:2508.08221), or not (none: Dr. GRPO)."""
    beta: float = number(0.0, at_least=0)
    """Weight of the KL divergence from the model before the first step (0: none, and no reference
    model in memory)."""
    rollout_framework: Literal["same", "torch", "jax"] = "same"
    """Framework that samples; same: the one that trains."""
    rollout_batch_size: int = number(16, at_least=1)
    """Samples that are decoded at once."""
    max_skipped: int = number(0, at_least=0)
    """Prompts that may be left out because they do not fit into train.sequence_length together with
    max_completion_length. More are an error."""

    def __post_init__(self) -> None:
        check_fields(self, "grpo")

    @property
    def clip_bounds(self) -> tuple[float, float]:
        """The lowest and the highest ratio that is not clipped."""
        high = self.epsilon if self.epsilon_high is None else self.epsilon_high
        return 1 - self.epsilon, 1 + high

    @property
    def updates_per_rollout(self) -> int:
        """Optimizer steps between two rollouts."""
        return self.steps_per_generation * self.num_iterations
