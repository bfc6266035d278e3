"""Both frameworks, asked for the same things in the same words: canonical arrays in and out.

Shapes: B batch, T time, S = T + 1 tokens, n steps, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from torch.distributed.tensor import DTensor

import mooshak_jax.decode
import mooshak_jax.distributed.mesh
import mooshak_jax.model
import mooshak_jax.objectives
import mooshak_jax.ops.cross_entropy
import mooshak_jax.param_names
import mooshak_jax.params
import mooshak_jax.step
import mooshak_torch.decode
import mooshak_torch.distributed.mesh
import mooshak_torch.distributed.parallelize
import mooshak_torch.model
import mooshak_torch.objectives
import mooshak_torch.ops.cross_entropy
import mooshak_torch.optimizer
import mooshak_torch.params
import mooshak_torch.step
from mooshak.checkpoints.base import MOMENTS, Checkpoint
from mooshak.config.model import Dtype
from mooshak.config.sections import Config
from mooshak.data.packing import IGNORE_INDEX, Batch, make_batch
from mooshak.numerics.schedule import learning_rate

Arrays = dict[str, np.ndarray]
"""Canonical parameter name -> array in the canonical layout."""


@dataclass(frozen=True)
class Step:
    """What is there to see after one optimizer step."""

    loss: float
    norm: float
    """Of the gradient, before clipping."""
    params: Arrays
    exp_avg: Arrays
    exp_avg_sq: Arrays


class Backend(Protocol):
    """One framework with the weights of one checkpoint."""

    name: str
    source: Checkpoint

    def operations(self, dtype: Dtype, tokens_BT: np.ndarray) -> Arrays:
        """Inputs and outputs of every operation in the order of the forward pass, then `logits`.

        Keys: `layers.0.attention.wq in`, `layers.0.attention.wq out`, `layers.0.attention.wq rope
        out`, ..., `layers.0 out`, `lm_head out`, `logits`.
        """

    def losses(self, config: Config, tokens_nBS: np.ndarray) -> np.ndarray:
        """Mean cross entropy of each batch under the checkpoint's weights, float64 [n]."""

    def padded_loss(self, dtype: Dtype, tokens_BS: np.ndarray, padding_BT: np.ndarray) -> float:
        """Mean cross entropy of the labels that are not padding."""

    def log_probs(
        self, dtype: Dtype, tokens_BS: np.ndarray, padding_BT: np.ndarray, weights_BT: np.ndarray
    ) -> tuple[np.ndarray, Arrays]:
        """Log-probability of every label [B, T] in nats, 0 where the label is padding.

        The gradients are those of the sum with these weights.
        """

    def gradients(self, config: Config, tokens_BS: np.ndarray) -> Arrays:
        """Of the summed cross entropy of one batch."""

    def steps(self, config: Config, tokens_nBS: np.ndarray) -> Iterator[Step]:
        """The optimizer steps on these batches, by the trainer's own step function."""

    def cached_logits(self, dtype: Dtype, tokens_BT: np.ndarray) -> np.ndarray:
        """Logits [B, T, V] with a KV cache: the first half at once, then token by token."""

    def generate(
        self, dtype: Dtype, prompts: Sequence[Sequence[int]], new_tokens: int, temperature: float
    ) -> np.ndarray:
        """Tokens [B, new_tokens] of the framework's `generate`."""


class TorchBackend:
    """PyTorch with the weights of a checkpoint."""

    name = "torch"

    def __init__(self, source: Checkpoint):
        self.source = source
        self.is_main = True
        """Whether this is the first process, where there are several."""

    def model(self, dtype: Dtype) -> mooshak_torch.model.Model:
        model = mooshak_torch.model.Model(self.source.model, dtype)
        mooshak_torch.params.load_params(dict(model.named_parameters()), self.source)
        return model

    @torch.no_grad()
    def operations(self, dtype: Dtype, tokens_BT: np.ndarray) -> Arrays:
        model = self.model(dtype)
        seen = _Recorder()
        for path, module in model.named_modules():
            if path:
                module.register_forward_pre_hook(
                    lambda _, inputs, path=path: seen.add(path, "in", inputs[0])
                )
                module.register_forward_hook(
                    lambda _, inputs, output, path=path: seen.add(path, "out", output)
                )
        logits = model(torch.from_numpy(tokens_BT).long())
        seen.values["logits"] = logits
        return {key: _numpy(value) for key, value in seen.values.items()}

    @torch.no_grad()
    def losses(self, config: Config, tokens_nBS: np.ndarray) -> np.ndarray:
        objective = mooshak_torch.objectives.CausalLM(
            self.model(config.train.dtype), config.train.loss_chunk
        )
        sums = [objective(_torch_batch(batch_BS)).item() for batch_BS in tokens_nBS]
        return np.array(sums) / tokens_nBS[0, :, 1:].size

    @torch.no_grad()
    def padded_loss(self, dtype: Dtype, tokens_BS: np.ndarray, padding_BT: np.ndarray) -> float:
        model = self.model(dtype)
        tokens = torch.from_numpy(tokens_BS).long()
        labels = tokens[:, 1:].masked_fill(torch.from_numpy(padding_BT), IGNORE_INDEX)
        total = mooshak_torch.ops.cross_entropy.cross_entropy(
            model.hidden_states(tokens[:, :-1]), model.head_VD, labels, tokens.numel() // 3
        )
        return total.item() / int((~padding_BT).sum())

    def log_probs(
        self, dtype: Dtype, tokens_BS: np.ndarray, padding_BT: np.ndarray, weights_BT: np.ndarray
    ) -> tuple[np.ndarray, Arrays]:
        model = self.model(dtype)
        tokens = torch.from_numpy(tokens_BS).long()
        labels = tokens[:, 1:].masked_fill(torch.from_numpy(padding_BT), IGNORE_INDEX)
        log_probs_BT = mooshak_torch.ops.cross_entropy.token_log_probs(
            model.hidden_states(tokens[:, :-1]), model.head_VD, labels, tokens.numel() // 3
        )
        log_probs_BT.backward(torch.from_numpy(weights_BT).to(log_probs_BT.dtype))
        return log_probs_BT.detach().numpy(), _gradients(model)

    def gradients(self, config: Config, tokens_BS: np.ndarray) -> Arrays:
        model = self.model(config.train.dtype)
        objective = mooshak_torch.objectives.CausalLM(model, config.train.loss_chunk)
        objective(_torch_batch(tokens_BS)).backward()
        return _gradients(model)

    def steps(self, config: Config, tokens_nBS: np.ndarray) -> Iterator[Step]:
        """As `Side.steps`; under torchrun every process takes its rows and has the whole result."""
        parallel = mooshak_torch.distributed.mesh.make_parallel(config)
        self.is_main = parallel.is_main
        bare = mooshak_torch.objectives.make_objective(config.model, config)
        objective = mooshak_torch.distributed.parallelize.parallelize(bare, parallel, config)
        model = mooshak_torch.objectives.model_of(objective)
        mooshak_torch.params.load_params(dict(model.named_parameters()), self.source)
        optimizer = mooshak_torch.optimizer.Optimizer(objective, model, config.optimizer)
        for step, batch_BS in enumerate(tokens_nBS):
            mine = _torch_batch(batch_BS).chunk(parallel.dp_size)[parallel.dp_rank]
            loss, norm = mooshak_torch.step.train_step(
                objective, optimizer, mine, learning_rate(config, step), config, parallel
            )
            loss = parallel.sum(loss)
            state = optimizer.state()
            trees = [state[part] for part in ("params", *MOMENTS)]
            arrays = [{name: _whole(tensor) for name, tensor in tree.items()} for tree in trees]
            yield Step(loss.item(), norm.item(), *arrays)
        parallel.close()

    @torch.no_grad()
    def cached_logits(self, dtype: Dtype, tokens_BT: np.ndarray) -> np.ndarray:
        model, tokens = self.model(dtype), torch.from_numpy(tokens_BT).long()
        caches = mooshak_torch.model.make_caches(model, *tokens.shape)
        parts = []
        for here in _halves_then_one_by_one(tokens.shape[1]):
            positions = torch.arange(here.start, here.stop).expand(len(tokens), -1)
            parts.append(model(tokens[:, here], positions, caches))
        return torch.cat(parts, 1).numpy()

    def generate(
        self, dtype: Dtype, prompts: Sequence[Sequence[int]], new_tokens: int, temperature: float
    ) -> np.ndarray:
        return mooshak_torch.decode.generate(self.model(dtype), prompts, new_tokens, temperature)


class JaxBackend:
    """Flax NNX with the weights of a checkpoint."""

    name = "JAX"

    def __init__(self, source: Checkpoint):
        self.source = source

    def params(self, dtype: Dtype) -> Any:
        abstract = mooshak_jax.params.abstract_params(self.source.model, dtype)
        return mooshak_jax.params.load_params(abstract, self.source.read)

    def graph(self, dtype: Dtype) -> nnx.GraphDef:
        return mooshak_jax.params.make_graphdef(self.source.model, dtype)

    def operations(self, dtype: Dtype, tokens_BT: np.ndarray) -> Arrays:
        graphdef = self.graph(dtype)

        # A compiled function sorts the keys of a dictionary: they leave by the side, in order.
        keys: list[str] = []

        def named(params: Any, tokens_BT: jax.Array) -> Any:
            model = mooshak_jax.params.merge(graphdef, params)
            seen = _Recorder()
            with _recorded(model, seen):
                logits = model(tokens_BT)
            keys[:] = [*seen.values, "logits"]
            return [*seen.values.values(), logits]

        values = jax.jit(named)(self.params(dtype), tokens_BT)
        return {key: np.asarray(value) for key, value in zip(keys, values, strict=True)}

    def losses(self, config: Config, tokens_nBS: np.ndarray) -> np.ndarray:
        function = jax.jit(self._objective(config))
        params = self.params(config.train.dtype)
        sums = [float(function(params, make_batch(batch_BS))) for batch_BS in tokens_nBS]
        return np.array(sums) / tokens_nBS[0, :, 1:].size

    def padded_loss(self, dtype: Dtype, tokens_BS: np.ndarray, padding_BT: np.ndarray) -> float:
        model = mooshak_jax.params.merge(self.graph(dtype), self.params(dtype))
        labels = jnp.where(padding_BT, IGNORE_INDEX, tokens_BS[:, 1:])
        total = mooshak_jax.ops.cross_entropy.cross_entropy(
            model.hidden_states(jnp.asarray(tokens_BS[:, :-1])),
            model.head_DV,
            labels,
            tokens_BS.size // 3,
        )
        return float(total) / int((~padding_BT).sum())

    def log_probs(
        self, dtype: Dtype, tokens_BS: np.ndarray, padding_BT: np.ndarray, weights_BT: np.ndarray
    ) -> tuple[np.ndarray, Arrays]:
        graphdef = self.graph(dtype)
        labels = jnp.where(padding_BT, IGNORE_INDEX, tokens_BS[:, 1:])

        def weighted_sum(params: Any) -> tuple[jax.Array, jax.Array]:
            model = mooshak_jax.params.merge(graphdef, params)
            log_probs_BT = mooshak_jax.ops.cross_entropy.token_log_probs(
                model.hidden_states(jnp.asarray(tokens_BS[:, :-1])),
                model.head_DV,
                labels,
                tokens_BS.size // 3,
            )
            return (log_probs_BT * weights_BT.astype(log_probs_BT.dtype)).sum(), log_probs_BT

        function = jax.jit(jax.grad(weighted_sum, has_aux=True))
        grads, log_probs_BT = function(self.params(dtype))
        return np.asarray(log_probs_BT), canonical(grads)

    def gradients(self, config: Config, tokens_BS: np.ndarray) -> Arrays:
        function = jax.jit(jax.grad(self._objective(config)))
        return canonical(function(self.params(config.train.dtype), make_batch(tokens_BS)))

    def _objective(self, config: Config) -> Any:
        return mooshak_jax.objectives.CausalLM(
            self.graph(config.train.dtype), config.train.loss_chunk
        )

    def steps(self, config: Config, tokens_nBS: np.ndarray) -> Iterator[Step]:
        parallel = mooshak_jax.distributed.mesh.make_parallel(config)
        update = mooshak_jax.step.make_train_step(config, parallel)
        abstract = mooshak_jax.params.abstract_params(config.model, config.train.dtype, parallel)
        params = mooshak_jax.params.load_params(abstract, self.source.read)
        state = mooshak_jax.step.initial_state(params)
        for step, batch_BS in enumerate(tokens_nBS):
            rate = learning_rate(config, step)
            state, loss, norm = update(
                state, parallel.shard_local_batch(make_batch(batch_BS)), rate
            )
            trees = (state[part] for part in ("params", *MOMENTS))
            yield Step(float(loss), float(norm), *map(canonical, trees))

    def cached_logits(self, dtype: Dtype, tokens_BT: np.ndarray) -> np.ndarray:
        params, graphdef = self.params(dtype), self.graph(dtype)

        @jax.jit
        def step(params: Any, tokens: jax.Array, positions: jax.Array, caches: list) -> Any:
            caches = list(caches)
            return mooshak_jax.params.merge(graphdef, params)(tokens, positions, caches), caches

        model = mooshak_jax.params.merge(graphdef, params)
        caches, parts = mooshak_jax.model.make_caches(model, *tokens_BT.shape), []
        for here in _halves_then_one_by_one(tokens_BT.shape[1]):
            positions = np.broadcast_to(np.arange(here.start, here.stop), tokens_BT[:, here].shape)
            logits, caches = step(params, tokens_BT[:, here], positions, caches)
            parts.append(np.asarray(logits))
        return np.concatenate(parts, 1)

    def generate(
        self, dtype: Dtype, prompts: Sequence[Sequence[int]], new_tokens: int, temperature: float
    ) -> np.ndarray:
        return mooshak_jax.decode.generate(
            self.graph(dtype), self.params(dtype), prompts, new_tokens, temperature
        )


class FixedDtype:
    """A side that computes in one dtype, whatever it is asked for."""

    def __init__(self, side: Backend, dtype: Dtype):
        self.name, self.source = f"{side.name} in {dtype}", side.source
        self._side, self._dtype = side, dtype

    def _config(self, config: Config) -> Config:
        return replace(config, train=replace(config.train, dtype=self._dtype))

    def operations(self, dtype: Dtype, tokens_BT: np.ndarray) -> Arrays:
        return self._side.operations(self._dtype, tokens_BT)

    def losses(self, config: Config, tokens_nBS: np.ndarray) -> np.ndarray:
        return self._side.losses(self._config(config), tokens_nBS)

    def padded_loss(self, dtype: Dtype, tokens_BS: np.ndarray, padding_BT: np.ndarray) -> float:
        return self._side.padded_loss(self._dtype, tokens_BS, padding_BT)

    def log_probs(
        self, dtype: Dtype, tokens_BS: np.ndarray, padding_BT: np.ndarray, weights_BT: np.ndarray
    ) -> tuple[np.ndarray, Arrays]:
        return self._side.log_probs(self._dtype, tokens_BS, padding_BT, weights_BT)

    def gradients(self, config: Config, tokens_BS: np.ndarray) -> Arrays:
        return self._side.gradients(self._config(config), tokens_BS)

    def steps(self, config: Config, tokens_nBS: np.ndarray) -> Iterator[Step]:
        return self._side.steps(self._config(config), tokens_nBS)

    def cached_logits(self, dtype: Dtype, tokens_BT: np.ndarray) -> np.ndarray:
        return self._side.cached_logits(self._dtype, tokens_BT)

    def generate(
        self, dtype: Dtype, prompts: Sequence[Sequence[int]], new_tokens: int, temperature: float
    ) -> np.ndarray:
        return self._side.generate(self._dtype, prompts, new_tokens, temperature)


def canonical(tree: Any) -> Arrays:
    """The leaves of a tree of Flax parameters by canonical name and in the canonical layout."""
    arrays = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        for part in mooshak_jax.param_names.canonical_tensors(path, leaf.shape):
            arrays[part.name] = part.canonical(np.asarray(leaf))
    return arrays


def _gradients(model: torch.nn.Module) -> Arrays:
    return {n: p.grad.numpy() for n, p in model.named_parameters() if p.grad is not None}


class _Recorder:
    """Inputs and outputs in the order in which they come; the first of each name stays."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self._linear = ""

    def add(self, path: str, end: str, value: Any) -> None:
        if path == "rope":  # One module for all layers: named after what it turns.
            path = f"{self._linear} rope"
        elif path.endswith(("wq", "wk")):
            self._linear = path
        self.values.setdefault(f"{path} {end}", value)


@contextmanager
def _recorded(model: nnx.Module, seen: _Recorder) -> Iterator[None]:
    """Record what goes through the modules of `model` inside the block."""
    paths = {id(m): ".".join(map(str, path)) for path, m in nnx.iter_modules(model) if path}
    with ExitStack() as stack:
        m = mooshak_jax.model
        blocks = m.BLOCKS.values()
        for kind in (m.Linear, m.Embedding, m.RMSNorm, m.Rope, m.Attention, m.MLP, *blocks):

            def call(self: Any, x: Any, *args: Any, original: Any = kind.__call__) -> Any:
                seen.add(paths[id(self)], "in", x)
                output = original(self, x, *args)
                seen.add(paths[id(self)], "out", output[0] if isinstance(output, tuple) else output)
                return output

            stack.enter_context(mock.patch.object(kind, "__call__", call))
        yield


def _halves_then_one_by_one(length: int) -> list[slice]:
    half = length // 2
    return [slice(0, half), *(slice(t, t + 1) for t in range(half, length))]


def _whole(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).numpy().copy()


def _torch_batch(tokens_BS: np.ndarray) -> Batch[torch.Tensor]:
    return make_batch(tokens_BS).map(lambda array: torch.from_numpy(array).long())


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
