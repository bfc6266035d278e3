"""Reference of an objective: log-probabilities of answers under the initial weights.

Mirror: mooshak_torch/reference.py. Shapes: B batch, T time, S segments of a row.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from jax import Array
from jax.sharding import NamedSharding

from mooshak.config.lora import LoraConfig
from mooshak.config.sections import Config
from mooshak.data.packing import Batch
from mooshak.tokenizer.base import Tokenizer
from mooshak_jax.checkpoint import load_init_weights
from mooshak_jax.distributed.mesh import Parallel
from mooshak_jax.objectives import CausalLM, PolicyLM, PreferenceLM, compile_forward
from mooshak_jax.params import initialize, without_adapters


@dataclass(frozen=True)
class Reference:
    """The initial weights, frozen: the reference.

    With adapters they are those of the state, with the adapters left out.
    """

    params: Any
    """None with adapters."""
    sharded: Callable[[Any, Batch[Array]], Array]
    """The compiled function of `make_log_probs`, sharded by rows."""
    replicated: Callable[[Any, Batch[Array]], Array]
    """The same, on every device."""

    def params_of(self, params: Any) -> Any:
        """Return the parameters of the reference of a model with these parameters."""
        return without_adapters(params) if self.params is None else self.params


def make_reference(config: Config, parallel: Parallel, tokenizer: Tokenizer) -> Reference:
    """Return the reference of a run, whose weights are loaded unless it has adapters."""
    params = None
    if config.model.lora is None and config.init.from_:
        params = load_init_weights(config, tokenizer, parallel)
    elif config.model.lora is None:
        params = initialize(config.model, config.train.dtype, config.run.seed, parallel=parallel)
    base = replace(config, model=replace(config.model, lora=None), lora=LoraConfig())
    shardings = parallel.batch_sharding, parallel.replicated
    return Reference(params, *(make_log_probs(base, parallel, one) for one in shardings))


def add_reference(reference: Reference | None, params: Any, batch: Batch[Array]) -> Batch[Array]:
    """Return the batch with the log-probabilities of a live reference, if there is one.

    `params` are those of the model that is trained.
    """
    if reference is None:
        return batch
    return batch._replace(reference=reference.sharded(reference.params_of(params), batch))


def make_log_probs(
    config: Config, parallel: Parallel, sharding: NamedSharding
) -> Callable[[Any, Batch[Array]], Array]:
    """Return the compiled function (params, batch) -> log-probability [B, S] of the segments.

    Of sampled answers it is that of each label, [B, T]. `sharding` is that of the result.
    """

    def measure(objective: CausalLM, params: Any, batch: Batch[Array]) -> Array:
        assert isinstance(objective, PreferenceLM | PolicyLM)
        return objective.log_probs(params, batch)

    return compile_forward(measure, config, parallel, sharding)
