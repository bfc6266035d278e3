"""Training objectives: the loss of a step, as an unreduced sum and its denominator.

Mirror: mooshak_jax/objectives.py. Shapes: B batch, T time, D model width.
"""

import torch
from torch import Tensor, nn

from mooshak.config.model import ModelConfig
from mooshak.config.sections import Config
from mooshak.data.packing import IGNORE_INDEX, Batch
from mooshak_torch.distributed.activation_checkpoint import apply_ac
from mooshak_torch.distributed.compile import apply_compile
from mooshak_torch.distributed.mesh import Parallel
from mooshak_torch.model import Model
from mooshak_torch.ops.cross_entropy import FusedLinearCrossEntropy


class CausalLM(nn.Module):
    """Next-token prediction: the cross entropy of the labels that are not ignored.

    Model and loss in one module: DDP and FSDP wrap the forward pass of a module.
    """

    def __init__(self, model: Model, chunk: int):
        super().__init__()
        self.model = model
        self.loss = FusedLinearCrossEntropy(model.lm_head or model.embeddings, chunk)

    def prepare(self, batch: Batch[Tensor], parallel: Parallel) -> int:
        """Return the denominator: the number of labels in the global batch, at least 1.

        `batch` is this process's rows. With document masks the labels that are not ignored are
        summed over the processes. Rows without masks have no ignored labels: the number follows
        from the shape.
        """
        if batch.segments is None:
            return batch.labels.numel() * parallel.dp_size
        count = (batch.labels != IGNORE_INDEX).sum(dtype=torch.float64)  # Exact below 2^53.
        return max(1, int(parallel.sum(count).item()))

    def forward(self, batch: Batch[Tensor]) -> Tensor:
        """Return the summed cross entropy of some rows of the global batch, in nats."""
        hidden_BTD = self.model.hidden_states(batch.tokens, **batch.context)
        loss: Tensor = self.loss(hidden_BTD, batch.labels)
        return loss


def make_objective(model: ModelConfig, config: Config) -> CausalLM:
    """Return the objective with its activation checkpointing and compilation of the layers.

    Its parameters are on the meta device, for `parallelize`.
    """
    with torch.device("meta"):
        objective = CausalLM(Model(model, config.train.dtype), config.train.loss_chunk)
    frozen = config.frozen
    for name, parameter in objective.model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    apply_ac(objective.model, config.train.remat)
    if config.train.compile:
        apply_compile(objective.model, config)
    return objective


def unwrap(objective: nn.Module) -> CausalLM:
    """Return the objective inside DDP's or DeepSpeed's wrapper."""
    inner = getattr(objective, "module", objective)
    assert isinstance(inner, CausalLM)
    return inner


def model_of(objective: nn.Module) -> Model:
    """Return the model of an objective, wrapped or not."""
    return unwrap(objective).model
