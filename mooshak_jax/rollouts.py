"""Sampling for rollouts in JAX, with weights of either framework.

Mirror: mooshak_torch/rollouts.py.
"""

import jax
import numpy as np
from jax.sharding import Mesh

from mooshak.checkpoints.base import Checkpoint
from mooshak.config.grpo import PREFILL_CHUNK
from mooshak.config.sections import Config
from mooshak.mesh import AXES
from mooshak.serving.scheduler import Scheduler
from mooshak.tokenizer.base import Tokenizer
from mooshak_jax.distributed.mesh import Parallel
from mooshak_jax.engine import Engine
from mooshak_jax.lm import LM
from mooshak_jax.params import abstract_params, load_params
from mooshak_jax.step import set_matmul_precision


def make_scheduler(
    weights: Checkpoint, config: Config, tokenizer: Tokenizer, max_waiting: int
) -> Scheduler:
    """Return the scheduler of an engine with these weights, on one device."""
    set_matmul_precision(config)
    # Not `make_mesh`, which takes the devices of all processes: only the first one samples.
    devices = np.array(jax.local_devices()[:1]).reshape(1, 1, 1)
    parallel, dtype = Parallel(Mesh(devices, AXES)), config.train.dtype
    params = load_params(abstract_params(weights.model, dtype, parallel), weights.read)
    lm = LM(weights.model, dtype, params, tokenizer, parallel)
    engine = Engine(lm, config.grpo.rollout_batch_size, config.T, PREFILL_CHUNK)
    return Scheduler(lm, engine, max_waiting)
