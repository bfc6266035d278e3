"""Reference of an objective: log-probabilities of answers under the initial weights.

Mirror: mooshak_jax/reference.py. Shapes: B batch, T time, S segments of a row.
"""

import numpy as np
import torch
from torch import Tensor, nn

from mooshak.config.sections import Config
from mooshak.data.packing import Batch
from mooshak.tokenizer.base import Tokenizer
from mooshak_torch.checkpoint import load_init_weights
from mooshak_torch.distributed.mesh import Parallel
from mooshak_torch.distributed.parallelize import parallelize
from mooshak_torch.lora import disable_adapters
from mooshak_torch.objectives import make_objective, model_of, unwrap
from mooshak_torch.params import initialize


def make_reference(
    objective: nn.Module, config: Config, parallel: Parallel, tokenizer: Tokenizer
) -> nn.Module:
    """Return the objective with the initial weights, frozen: the reference.

    With adapters it is `objective` itself, which the trainer calls with them turned off.
    """
    if config.model.lora is not None:
        return objective
    reference = make_objective(config.model, config).requires_grad_(False)
    reference = unwrap(parallelize(reference, parallel, config))
    if config.init.from_:
        load_init_weights(reference.model, config, tokenizer, parallel)
    else:
        initialize(reference.model, config.run.seed)
    return reference


@torch.no_grad()
def add_reference(
    reference: nn.Module | None, batch: Batch[Tensor], config: Config
) -> Batch[Tensor]:
    """Return the batch with the log-probabilities of a live reference, if there is one."""
    if reference is None:
        return batch
    parts = batch.chunk(config.train.gradient_accumulation_steps)
    with disable_adapters(model_of(reference)):
        found = [unwrap(reference)(part, log_probs=True) for part in parts]
    return batch._replace(reference=torch.cat(found))


@torch.no_grad()
def compute_log_probs(
    objective: nn.Module, batch: Batch, config: Config, parallel: Parallel
) -> np.ndarray:
    """Return the log-probability of each segment of pairs, float64 [B, S].

    Of sampled answers it is that of each label, [B, T]. Every process has the batch in full, and
    computes as many rows as of a batch of training.
    """
    values = batch.labels if batch.reference is None else batch.reference
    rows = parallel.rows(len(batch.tokens))
    local = parallel.shard_local_batch(batch.rows(slice(rows.start, rows.stop)))
    found = torch.zeros(values.shape, dtype=torch.float64, device=parallel.device)
    found[rows.start : rows.stop] = unwrap(objective)(local, log_probs=True).double()
    result: np.ndarray = parallel.sum(found).cpu().numpy()
    return result
