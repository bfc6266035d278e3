"""Flax NNX as a backend of the parity check.

Shapes: B batch, T time, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import mooshak_jax.device
import mooshak_jax.distributed.mesh
import mooshak_jax.engine
import mooshak_jax.lm
import mooshak_jax.model
import mooshak_jax.objectives
import mooshak_jax.ops.cross_entropy
import mooshak_jax.param_names
import mooshak_jax.params
import mooshak_jax.step
from mooshak.checkpoints.base import MOMENTS, Checkpoint
from mooshak.config.model import Dtype
from mooshak.config.sections import Config
from mooshak.data.packing import Batch
from mooshak.generation.lm import LM
from mooshak.numerics.schedule import learning_rate
from mooshak.serving.engine import Engine
from parity.backends.base import (
    Arrays,
    CacheCall,
    ForwardBackward,
    Recorder,
    Step,
    cache_shape,
    count_labels,
)


class JaxBackend:
    """Flax NNX with the weights of a checkpoint, on one device or, for `steps`, a mesh of CPUs."""

    name = "JAX"

    def __init__(self, source: Checkpoint, device: str = "cpu"):
        self.source, self.device = source, device
        self.devices = mooshak_jax.device.find_devices(device)

    def with_source(self, source: Checkpoint) -> "JaxBackend":
        return JaxBackend(source, self.device)

    def params(self, dtype: Dtype) -> Any:
        """Return the parameters on one device; what is computed with them runs there."""
        parallel = mooshak_jax.distributed.mesh.make_mesh("data=1", self.devices)
        abstract = mooshak_jax.params.abstract_params(self.source.model, dtype, parallel)
        return mooshak_jax.params.load_params(abstract, self.source.read)

    def graphdef(self, dtype: Dtype) -> nnx.GraphDef:
        """Return the graph definition that `merge` joins with the parameters."""
        return mooshak_jax.params.make_graphdef(self.source.model, dtype)

    def operations(self, dtype: Dtype, tokens_BT: np.ndarray) -> Arrays:
        graphdef = self.graphdef(dtype)

        # A compiled function sorts the keys of a dictionary: a list preserves the call order.
        keys: list[str] = []

        def record(params: Any, tokens_BT: jax.Array) -> Any:
            model = mooshak_jax.params.merge(graphdef, params)
            recorder = Recorder()
            with _recording(model, recorder):
                logits = model(tokens_BT)
            keys[:] = [*recorder.values, "logits"]
            return [*recorder.values.values(), logits]

        values = jax.jit(record)(self.params(dtype), tokens_BT)
        return {key: np.asarray(value) for key, value in zip(keys, values, strict=True)}

    def losses(self, config: Config, batches: Sequence[Batch[np.ndarray]]) -> np.ndarray:
        function = jax.jit(self._objective(config))
        params = self.params(config.train.dtype)
        return np.array([float(function(params, b)) / count_labels(b) for b in batches])

    def forward_backward(self, config: Config, batch: Batch[np.ndarray]) -> ForwardBackward:
        objective = self._objective(config)

        def compute(params: Any, batch: Batch[jax.Array]) -> Any:
            loss, grads = jax.value_and_grad(objective)(params, batch)
            model = mooshak_jax.params.merge(objective.graphdef, params)
            return model(batch.tokens, **batch.context), loss, grads

        # One program: compiling takes most of the time of a check.
        logits_BTV, loss, grads = jax.jit(compute)(self.params(config.train.dtype), batch)
        return ForwardBackward(np.asarray(logits_BTV), float(loss), canonical(grads))

    def _objective(self, config: Config) -> mooshak_jax.objectives.CausalLM:
        graphdef, chunk = self.graphdef(config.train.dtype), config.train.loss_chunk
        if config.data.format == "preferences":
            return mooshak_jax.objectives.PreferenceLM(graphdef, chunk, config.dpo)
        if config.data.format == "prompts":
            return mooshak_jax.objectives.PolicyLM(graphdef, chunk, config.grpo)
        return mooshak_jax.objectives.CausalLM(graphdef, chunk)

    def log_probs(
        self, dtype: Dtype, batch: Batch[np.ndarray], weights_BT: np.ndarray
    ) -> tuple[np.ndarray, Arrays]:
        graphdef = self.graphdef(dtype)

        def weighted_sum(params: Any) -> tuple[jax.Array, jax.Array]:
            model = mooshak_jax.params.merge(graphdef, params)
            log_probs_BT = mooshak_jax.ops.cross_entropy.token_log_probs(
                model.hidden_states(jnp.asarray(batch.tokens)),
                model.head_DV,
                jnp.asarray(batch.labels),
                batch.labels.size // 3,
            )
            return (log_probs_BT * weights_BT.astype(log_probs_BT.dtype)).sum(), log_probs_BT

        function = jax.jit(jax.grad(weighted_sum, has_aux=True))
        grads, log_probs_BT = function(self.params(dtype))
        return np.asarray(log_probs_BT), canonical(grads)

    def steps(self, config: Config, batches: Sequence[Batch[np.ndarray]]) -> Iterator[Step]:
        parallel = mooshak_jax.distributed.mesh.make_parallel(config, self.devices)
        update = mooshak_jax.step.make_train_step(config, parallel)
        abstract = mooshak_jax.params.abstract_params(config.model, config.train.dtype, parallel)
        params = mooshak_jax.params.load_params(abstract, self.source.read)
        state = mooshak_jax.step.initial_state(params, config.frozen)
        metrics = mooshak_jax.step.abstract_metrics(config, parallel)
        if metrics:
            state["metrics"] = {name: jnp.zeros((), like.dtype) for name, like in metrics.items()}
        for step, batch in enumerate(batches):
            rate = learning_rate(config, step)
            state, loss, norm = update(state, parallel.shard_local_batch(batch), rate)
            trees = (state[part] for part in ("params", *MOMENTS))
            yield Step(float(loss), float(norm), *map(canonical, trees))

    def cached_logits(self, dtype: Dtype, calls: Sequence[CacheCall]) -> list[np.ndarray]:
        params, graphdef = self.params(dtype), self.graphdef(dtype)

        @jax.jit
        def step(params: Any, tokens: jax.Array, positions: jax.Array, caches: list) -> Any:
            caches = list(caches)
            return mooshak_jax.params.merge(graphdef, params)(tokens, positions, caches), caches

        model, length, results = mooshak_jax.params.merge(graphdef, params), 0, []
        caches = mooshak_jax.model.make_caches(model, *cache_shape(calls))
        for start, tokens_BT in calls:
            if start < length:
                caches = [cache.truncate([start] * len(tokens_BT)) for cache in caches]
            positions_BT = caches[0].lengths[:, None] + np.arange(tokens_BT.shape[1])
            logits_BTV, caches = step(params, tokens_BT, positions_BT, caches)
            results.append(np.asarray(logits_BTV))
            length = start + tokens_BT.shape[1]
        return results

    def lm(self, dtype: Dtype) -> LM:
        parallel = mooshak_jax.distributed.mesh.make_mesh("data=1", self.devices)
        return mooshak_jax.lm.LM(self.source.model, dtype, self.params(dtype), None, parallel)

    def engine(self, lm: LM) -> Engine:
        assert isinstance(lm, mooshak_jax.lm.LM)
        return mooshak_jax.engine.Engine(lm, n_slots=4, chunk=5)


def canonical(tree: Any) -> Arrays:
    """Return the leaves of a tree of Flax parameters by canonical name, in canonical layout."""
    arrays = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        for part in mooshak_jax.param_names.canonical_tensors(path, leaf.shape):
            arrays[part.name] = part.canonical(np.asarray(leaf))
    return arrays


@contextmanager
def _recording(model: nnx.Module, recorder: Recorder) -> Iterator[None]:
    """Record inputs and outputs of the modules of `model` inside the block."""
    paths = {id(m): ".".join(map(str, path)) for path, m in nnx.iter_modules(model) if path}
    with ExitStack() as stack:
        m = mooshak_jax.model
        blocks = m.BLOCKS.values()
        for kind in (m.Linear, m.Embedding, m.RMSNorm, m.Rope, m.Attention, m.MLP, *blocks):

            def call(self: Any, x: Any, *args: Any, original: Any = kind.__call__) -> Any:
                recorder.add(paths[id(self)], "in", x)
                output = original(self, x, *args)
                first = output[0] if isinstance(output, tuple) else output
                recorder.add(paths[id(self)], "out", first)
                return output

            stack.enter_context(mock.patch.object(kind, "__call__", call))
        yield
