"""Training objectives: the loss of a step, as an unreduced sum and its denominator.

Mirror: mooshak_jax/objectives.py. Shapes: B batch, T time, D model width.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mooshak.config.dpo import DPOConfig
from mooshak.config.grpo import GRPOConfig
from mooshak.config.model import ModelConfig
from mooshak.config.sections import Config
from mooshak.data.packing import IGNORE_INDEX, Batch
from mooshak.numerics.grpo import Tokens, token_losses
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


class PolicyLM(CausalLM):
    """Sampled answers: a policy-gradient loss of `mooshak.numerics.grpo` for each token.

    Each segment of a row is an answer with its prompt. The weights of the tokens in the batch make
    the mean over the labels that of `grpo.loss_type`.
    """

    def __init__(self, model: Model, chunk: int, grpo: GRPOConfig):
        super().__init__(model, chunk)
        self.grpo = grpo

    def forward(self, batch: Batch[Tensor], log_probs: bool = False) -> Tensor:
        """Return the summed loss of the tokens; or `log_probs` [B, T], that of each label."""
        hidden_BTD = self.model.hidden_states(batch.tokens, **batch.context)
        found_BT = self.loss(hidden_BTD, batch.labels, True, self.grpo.temperature)
        if log_probs:
            return found_BT
        tokens, weights_BT = self._tokens(found_BT, batch)
        mean = partial(segment_mean, batch=batch)
        losses_BT, metrics = token_losses(tokens, self.grpo, torch, mean)
        is_label_BT = batch.labels != IGNORE_INDEX
        for name, value_BT in metrics.items():
            total = value_BT.detach().where(is_label_BT, 0).sum()
            self.metrics[name] = self.metrics.get(name, 0) + total
        return (weights_BT * losses_BT).where(is_label_BT, 0).sum()

    def _tokens(self, found_BT: Tensor, batch: Batch[Tensor]) -> tuple[Tokens, Tensor]:
        """Return the tokens of the labels, zeros elsewhere, and their weights [B, T]."""
        assert batch.old_log_probs is not None and batch.advantages is not None
        assert batch.weights is not None and (batch.reference is not None or not self.grpo.beta)
        advantages_BT = spread_segments(batch.advantages, batch)
        reference_BT = found_BT.detach() if batch.reference is None else batch.reference
        constants = (batch.old_log_probs, reference_BT, advantages_BT, batch.weights)
        *tokens, weights_BT = (array_BT.to(found_BT.dtype) for array_BT in constants)
        return Tokens(found_BT, *tokens), weights_BT


def sum_segments(values_BT: Tensor, batch: Batch[Tensor]) -> Tensor:
    """Return the sum [B, S] of the values of each segment of a row."""
    return values_BT.unsqueeze(-1).where(_is_in(batch), 0).sum(1)


def spread_segments(values_BS: Tensor, batch: Batch[Tensor]) -> Tensor:
    """Return the value of the segment of each token [B, T]; 0 for padding."""
    return values_BS.unsqueeze(1).where(_is_in(batch), 0).sum(-1)


def segment_mean(values_BT: Tensor, batch: Batch[Tensor]) -> Tensor:
    """Return the mean [B, T] over the labels of the segment of each token."""
    is_label_BT = batch.labels != IGNORE_INDEX
    total_BS = sum_segments(values_BT.where(is_label_BT, 0), batch)
    return spread_segments(total_BS / count_labels(batch).clamp(min=1), batch)


def _is_in(batch: Batch[Tensor]) -> Tensor:
    """Return which tokens are in which segment, [B, T, S]."""
    assert batch.segments is not None
    number_S = torch.arange(1, batch.n_segments + 1, device=batch.segments.device)
    return batch.segments.unsqueeze(-1) == number_S


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
        if config.data.format == "prompts":
            objective = PolicyLM(inner, chunk, config.grpo)
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
