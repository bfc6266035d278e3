"""Training objectives of the PyTorch model."""

import torch
from torch import Tensor, nn

from mooshak.config.model import ModelConfig
from mooshak.config.sections import Config
from mooshak_torch.distributed.activation_checkpoint import apply_ac
from mooshak_torch.distributed.compile import apply_compile
from mooshak_torch.model import Model
from mooshak_torch.ops.cross_entropy import FusedLinearCrossEntropy


class Objective(nn.Module):
    """The model and its loss in one module, as DDP and FSDP want them."""

    def __init__(self, model: Model, chunk: int):
        super().__init__()
        self.model = model
        self.loss = FusedLinearCrossEntropy(model.lm_head or model.embeddings, chunk)

    def forward(self, batch_BS: Tensor) -> Tensor:
        """Summed cross entropy in nats of tokens 1 .. S - 1, each given those before it."""
        loss: Tensor = self.loss(self.model.hidden_states(batch_BS[:, :-1]), batch_BS[:, 1:])
        return loss


def make_objective(model: ModelConfig, config: Config) -> Objective:
    """The objective on the meta device: shapes without memory, for `parallelize`."""
    with torch.device("meta"):
        objective = Objective(Model(model, config.train.dtype), config.train.loss_chunk)
    apply_ac(objective.model, config.train.remat)
    if config.train.compile:
        apply_compile(objective.model, config)
    return objective


def model_of(objective: nn.Module) -> Model:
    """The model in an objective, wrapped or not."""
    model = getattr(objective, "module", objective).model
    assert isinstance(model, Model)
    return model
