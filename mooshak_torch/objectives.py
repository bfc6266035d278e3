"""Training objectives: the loss of a step, as an unreduced sum and its denominator.

Mirror: mooshak_jax/objectives.py. Shapes: B batch, T time, D model width.
"""

from typing import Any

import torch
from torch import Tensor, nn

from mooshak.config.dpo import DPOConfig
from mooshak.config.model import ModelConfig
from mooshak.config.sections import Config
from mooshak.data.packing import IGNORE_INDEX, Batch
from mooshak.numerics.preference import Pairs, kto_losses, log_ratios, pair_losses
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
        self.metrics: dict[str, Any] = {}
        """Name -> sum over the rows since the start of the step, without gradient."""

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

    def complete(self, batch: Batch[Tensor], parallel: Parallel) -> Batch[Tensor]:
        """Return the batch with what the objective needs of the whole global batch: nothing."""
        return batch

    def forward(self, batch: Batch[Tensor]) -> Tensor:
        """Return the summed cross entropy of some rows of the global batch, in nats."""
        hidden_BTD = self.model.hidden_states(batch.tokens, **batch.context)
        loss: Tensor = self.loss(hidden_BTD, batch.labels)
        return loss


class PreferenceLM(CausalLM):
    """Preference pairs: a loss of `mooshak.numerics.preference` for each pair of a row.

    Segments 1, 3, ... of a row are chosen, 2, 4, ... rejected: a pair is never split.
    """

    def __init__(self, model: Model, chunk: int, dpo: DPOConfig):
        super().__init__(model, chunk)
        self.dpo = dpo

    def prepare(self, batch: Batch[Tensor], parallel: Parallel) -> int:
        """Return the denominator: the number of pairs in the global batch, at least 1."""
        n_pairs = (count_labels(batch)[:, ::2] > 0).sum(dtype=torch.float64)
        return max(1, int(parallel.sum(n_pairs).item()))

    @torch.no_grad()
    def complete(self, batch: Batch[Tensor], parallel: Parallel) -> Batch[Tensor]:
        """Return the batch, of KTO with its `baseline`, from a forward pass over all rows."""
        if batch.weights is None:
            return batch
        pairs, is_pair_BP = self._pairs(self(batch, log_probs=True), batch)
        _, others_BP = log_ratios(pairs, self.dpo)
        total = parallel.sum(others_BP.where(is_pair_BP, 0).sum())
        baseline = (total / self.prepare(batch, parallel)).clamp(min=0)
        return batch._replace(baseline=baseline.expand(len(batch.tokens), 1))

    def forward(self, batch: Batch[Tensor], log_probs: bool = False) -> Tensor:
        """Return the summed loss of the pairs; or `log_probs` [B, S], that of each segment."""
        hidden_BTD = self.model.hidden_states(batch.tokens, **batch.context)
        token_BT = self.loss(hidden_BTD, batch.labels, per_token=True)
        found_BS = sum_segments(token_BT, batch)
        if log_probs:
            return found_BS
        pairs, is_pair_BP = self._pairs(found_BS, batch)
        if batch.weights is None:
            losses_BP, metrics = pair_losses(pairs, self.dpo, torch)
        else:
            weights_BP = batch.weights.to(found_BS.dtype)
            losses_BP, metrics = kto_losses(pairs, weights_BP, batch.baseline, self.dpo, torch)
        for name, value_BP in metrics.items():
            total = value_BP.detach().where(is_pair_BP, 0).sum()
            self.metrics[name] = self.metrics.get(name, 0) + total
        return losses_BP.where(is_pair_BP, 0).sum()

    def _pairs(self, found_BS: Tensor, batch: Batch[Tensor]) -> tuple[Pairs, Tensor]:
        """Return the pairs of segments, and which of them exist [B, P]."""
        n_BS = count_labels(batch).to(found_BS.dtype)
        # No answer has log-probability 0: of missing pairs, every loss and gradient is finite.
        found_BS = found_BS.where(n_BS > 0, -1.0)
        assert batch.reference is not None
        columns = (found_BS, batch.reference.to(found_BS.dtype), n_BS.clamp(min=1))
        pairs = Pairs(*(column[:, i::2] for column in columns for i in (0, 1)))
        return pairs, n_BS[:, ::2] > 0


def sum_segments(values_BT: Tensor, batch: Batch[Tensor]) -> Tensor:
    """Return the sum [B, S] of the values of each segment of a row, for S of `batch.reference`."""
    assert batch.segments is not None and batch.reference is not None
    number_S = torch.arange(1, batch.reference.shape[1] + 1, device=values_BT.device)
    is_in_BTS = batch.segments.unsqueeze(-1) == number_S
    return values_BT.unsqueeze(-1).where(is_in_BTS, 0).sum(1)


def count_labels(batch: Batch[Tensor]) -> Tensor:
    """Return the number of labels [B, S] of each segment."""
    return sum_segments((batch.labels != IGNORE_INDEX).long(), batch)


def make_objective(model: ModelConfig, config: Config) -> CausalLM:
    """Return the objective with its activation checkpointing and compilation of the layers.

    Its parameters are on the meta device, for `parallelize`.
    """
    with torch.device("meta"):
        inner, chunk = Model(model, config.train.dtype), config.train.loss_chunk
        objective = CausalLM(inner, chunk)
        if config.data.format == "preferences":
            objective = PreferenceLM(inner, chunk, config.dpo)
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
