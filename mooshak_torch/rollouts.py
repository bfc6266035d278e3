"""Sampling for rollouts in PyTorch, with weights of either framework.

Mirror: mooshak_jax/rollouts.py.
"""

from mooshak.checkpoints.base import Checkpoint
from mooshak.config.grpo import PREFILL_CHUNK
from mooshak.config.sections import Config
from mooshak.serving.scheduler import Scheduler
from mooshak.tokenizer.base import Tokenizer
from mooshak_torch.device import find_device
from mooshak_torch.engine import Engine
from mooshak_torch.lm import LM
from mooshak_torch.model import Model
from mooshak_torch.params import load_params


def make_scheduler(
    weights: Checkpoint, config: Config, tokenizer: Tokenizer, max_waiting: int
) -> Scheduler:
    """Return the scheduler of an engine with these weights, on one device."""
    model = Model(weights.model, config.train.dtype)
    load_params(dict(model.named_parameters()), weights)
    lm = LM(model.to(find_device(None)), tokenizer)
    engine = Engine(lm, config.grpo.rollout_batch_size, config.T, PREFILL_CHUNK)
    return Scheduler(lm, engine, max_waiting)
