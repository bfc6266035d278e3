"""Training objectives: the loss of a step, as an unreduced sum and its denominator.

Mirror: mooshak_torch/objectives.py. Shapes: B batch, T time, D model width.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import NamedSharding

from mooshak.config.dpo import DPOConfig
from mooshak.config.grpo import GRPOConfig
from mooshak.config.model import ModelConfig
from mooshak.config.sections import Config
from mooshak.data.packing import IGNORE_INDEX, Batch
from mooshak.numerics.grpo import Tokens, token_losses
from mooshak.numerics.preference import Pairs, kto_losses, log_ratios, pair_losses
from mooshak_jax.distributed.mesh import Parallel
from mooshak_jax.model import Model
from mooshak_jax.ops.cross_entropy import cross_entropy, token_log_probs
from mooshak_jax.params import abstract_params, make_graphdef, merge


@dataclass(frozen=True)
class CausalLM:
    """Next-token prediction: the cross entropy of the labels that are not ignored."""

    graphdef: nnx.GraphDef
    chunk: int

    def prepare(self, batch: Batch[Array]) -> int | Array:
        """Return the denominator: the number of labels in the global batch, at least 1.

        With document masks ignored labels do not count. Rows without masks have no ignored labels:
        the number follows from the shape.
        """
        if batch.segments is None:
            return batch.labels.size
        return jnp.maximum(1, jnp.sum(batch.labels != IGNORE_INDEX))

    def complete(self, params: Any, batch: Batch[Array]) -> Batch[Array]:
        """Return the batch with what the objective needs of the whole global batch: nothing."""
        return batch

    def __call__(self, params: Any, batch: Batch[Array]) -> Array:
        """Return the summed cross entropy of some rows of the global batch, in nats."""
        model: Model = merge(self.graphdef, params)
        hidden_BTD = model.hidden_states(batch.tokens, **batch.context)
        return cross_entropy(hidden_BTD, model.head_DV, batch.labels, self.chunk)

    def measure(self, params: Any, batch: Batch[Array]) -> tuple[Array, dict[str, Array]]:
        """Return the sum of `__call__`, and metrics: name -> sum over the rows."""
        return self(params, batch), {}


@dataclass(frozen=True)
class PreferenceLM(CausalLM):
    """Preference pairs: a loss of `mooshak.numerics.preference` for each pair of a row.

    Segments 1, 3, ... of a row are chosen, 2, 4, ... rejected: a pair is never split.
    """

    dpo: DPOConfig

    def prepare(self, batch: Batch[Array]) -> Array:
        """Return the denominator: the number of pairs in the global batch, at least 1."""
        return jnp.maximum(1, jnp.sum(count_labels(batch)[:, ::2] > 0))

    def complete(self, params: Any, batch: Batch[Array]) -> Batch[Array]:
        """Return the batch, of KTO with its `baseline`, from a forward pass over all rows."""
        if batch.weights is None:
            return batch
        pairs, is_pair_BP = self._pairs(self.log_probs(params, batch), batch)
        _, others_BP = log_ratios(pairs, self.dpo)
        total = jnp.sum(jnp.where(is_pair_BP, others_BP, 0))
        baseline = jnp.maximum(total / self.prepare(batch), 0)
        column_B1 = jnp.broadcast_to(jax.lax.stop_gradient(baseline), (len(batch.tokens), 1))
        return batch._replace(baseline=column_B1)

    def __call__(self, params: Any, batch: Batch[Array]) -> Array:
        """Return the summed loss of the pairs of some rows of the global batch."""
        return self.measure(params, batch)[0]

    def log_probs(self, params: Any, batch: Batch[Array]) -> Array:
        """Return the log-probability [B, S] of the labels of each segment."""
        model: Model = merge(self.graphdef, params)
        hidden_BTD = model.hidden_states(batch.tokens, **batch.context)
        token_BT = token_log_probs(hidden_BTD, model.head_DV, batch.labels, self.chunk)
        return sum_segments(token_BT, batch)

    def measure(self, params: Any, batch: Batch[Array]) -> tuple[Array, dict[str, Array]]:
        found_BS = self.log_probs(params, batch)
        pairs, is_pair_BP = self._pairs(found_BS, batch)
        if batch.weights is None:
            losses_BP, metrics = pair_losses(pairs, self.dpo, jnp)
        else:
            weights_BP = batch.weights.astype(found_BS.dtype)
            losses_BP, metrics = kto_losses(pairs, weights_BP, batch.baseline, self.dpo, jnp)
        sums = {name: jnp.sum(jnp.where(is_pair_BP, v, 0)) for name, v in metrics.items()}
        return jnp.sum(jnp.where(is_pair_BP, losses_BP, 0)), sums

    def _pairs(self, found_BS: Array, batch: Batch[Array]) -> tuple[Pairs, Array]:
        """Return the pairs of segments, and which of them exist [B, P]."""
        n_BS = count_labels(batch).astype(found_BS.dtype)
        # No answer has log-probability 0: of missing pairs, every loss and gradient is finite.
        found_BS = jnp.where(n_BS > 0, found_BS, -1.0)
        assert batch.reference is not None
        columns = (found_BS, batch.reference.astype(found_BS.dtype), jnp.maximum(n_BS, 1))
        pairs = Pairs(*(column[:, i::2] for column in columns for i in (0, 1)))
        return pairs, n_BS[:, ::2] > 0


@dataclass(frozen=True)
class PolicyLM(CausalLM):
    """Sampled answers: a policy-gradient loss of `mooshak.numerics.grpo` for each token.

    Each segment of a row is an answer with its prompt. The weights of the tokens in the batch make
    the mean over the labels that of `grpo.loss_type`.
    """

    grpo: GRPOConfig

    def __call__(self, params: Any, batch: Batch[Array]) -> Array:
        """Return the summed loss of the tokens of some rows of the global batch."""
        return self.measure(params, batch)[0]

    def log_probs(self, params: Any, batch: Batch[Array]) -> Array:
        """Return the log-probability [B, T] of each label at the sampling temperature."""
        model: Model = merge(self.graphdef, params)
        hidden_BTD = model.hidden_states(batch.tokens, **batch.context)
        settings = self.chunk, self.grpo.temperature
        return token_log_probs(hidden_BTD, model.head_DV, batch.labels, *settings)

    def measure(self, params: Any, batch: Batch[Array]) -> tuple[Array, dict[str, Array]]:
        tokens, weights_BT = self._tokens(self.log_probs(params, batch), batch)
        mean = partial(segment_mean, batch=batch)
        losses_BT, metrics = token_losses(tokens, self.grpo, jnp, mean)
        is_label_BT = batch.labels != IGNORE_INDEX
        sums = {name: jnp.sum(jnp.where(is_label_BT, v, 0)) for name, v in metrics.items()}
        return jnp.sum(jnp.where(is_label_BT, weights_BT * losses_BT, 0)), sums

    def _tokens(self, found_BT: Array, batch: Batch[Array]) -> tuple[Tokens, Array]:
        """Return the tokens of the labels, zeros elsewhere, and their weights [B, T]."""
        assert batch.old_log_probs is not None and batch.advantages is not None
        assert batch.weights is not None and (batch.reference is not None or not self.grpo.beta)
        advantages_BT = spread_segments(batch.advantages, batch)
        reference_BT = found_BT if batch.reference is None else batch.reference
        reference_BT = jax.lax.stop_gradient(reference_BT)
        constants = (batch.old_log_probs, reference_BT, advantages_BT, batch.weights)
        *tokens, weights_BT = (array_BT.astype(found_BT.dtype) for array_BT in constants)
        return Tokens(found_BT, *tokens), weights_BT


def sum_segments(values_BT: Array, batch: Batch[Array]) -> Array:
    """Return the sum [B, S] of the values of each segment of a row."""
    return jnp.sum(jnp.where(_is_in(batch), values_BT[..., None], 0), axis=1)


def spread_segments(values_BS: Array, batch: Batch[Array]) -> Array:
    """Return the value of the segment of each token [B, T]; 0 for padding."""
    return jnp.sum(jnp.where(_is_in(batch), values_BS[:, None], 0), axis=-1)


def segment_mean(values_BT: Array, batch: Batch[Array]) -> Array:
    """Return the mean [B, T] over the labels of the segment of each token."""
    is_label_BT = batch.labels != IGNORE_INDEX
    total_BS = sum_segments(jnp.where(is_label_BT, values_BT, 0), batch)
    return spread_segments(total_BS / jnp.maximum(count_labels(batch), 1), batch)


def _is_in(batch: Batch[Array]) -> Array:
    """Return which tokens are in which segment, [B, T, S]."""
    assert batch.segments is not None
    return batch.segments[..., None] == jnp.arange(1, batch.n_segments + 1)


def count_labels(batch: Batch[Array]) -> Array:
    """Return the number of labels [B, S] of each segment."""
    return sum_segments((batch.labels != IGNORE_INDEX).astype(jnp.int32), batch)


def make_objective(model: ModelConfig, config: Config) -> CausalLM:
    """Return the objective with its activation checkpointing."""
    graphdef = make_graphdef(model, config.train.dtype, config.train.remat)
    chunk = config.train.loss_chunk
    if config.data.format == "preferences":
        return PreferenceLM(graphdef, chunk, config.dpo)
    if config.data.format == "prompts":
        return PolicyLM(graphdef, chunk, config.grpo)
    return CausalLM(graphdef, chunk)


def compile_forward(
    measure: Callable[[CausalLM, Any, Batch[Array]], Any],
    config: Config,
    parallel: Parallel,
    sharding: NamedSharding,
) -> Callable[[Any, Batch[Array]], Any]:
    """Return the compiled function (params, batch) -> `measure(objective, params, batch)`.

    `sharding` is that of the results.
    """
    forward_only = replace(config.train, remat="none")
    objective = make_objective(config.model, replace(config, train=forward_only))

    def compute(params: Any, batch: Batch[Array]) -> Any:
        with parallel.activate():
            return measure(objective, params, batch)

    abstract = abstract_params(config.model, config.train.dtype, parallel)
    shardings = jax.tree.map(lambda array: array.sharding, abstract)
    return jax.jit(
        compute,
        in_shardings=(shardings, parallel.batch_sharding),
        out_shardings=sharding,
        compiler_options=parallel.compiler_options,
    )
