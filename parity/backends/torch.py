"""PyTorch as a backend of the parity check.

Shapes: B batch, T time, V vocabulary.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.distributed.tensor import DTensor

import mooshak_torch.device
import mooshak_torch.distributed.mesh
import mooshak_torch.distributed.parallelize
import mooshak_torch.engine
import mooshak_torch.lm
import mooshak_torch.model
import mooshak_torch.objectives
import mooshak_torch.ops.cross_entropy
import mooshak_torch.optimizer
import mooshak_torch.params
import mooshak_torch.step
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


class TorchBackend:
    """PyTorch with the weights of a checkpoint, on one device."""

    name = "torch"

    def __init__(self, source: Checkpoint, device: str = "cpu"):
        mooshak_torch.step.set_matmul_precision()
        self.source, self.device = source, mooshak_torch.device.find_device(device)
        self.is_main = True
        """True on the first of several processes."""

    def with_source(self, source: Checkpoint) -> "TorchBackend":
        return TorchBackend(source, str(self.device))

    def model(self, dtype: Dtype) -> mooshak_torch.model.Model:
        """Return the model on the device."""
        model = mooshak_torch.model.Model(self.source.model, dtype)
        mooshak_torch.params.load_params(dict(model.named_parameters()), self.source)
        return model.to(self.device)

    @torch.no_grad()
    def operations(self, dtype: Dtype, tokens_BT: np.ndarray) -> Arrays:
        model = self.model(dtype)
        recorder = Recorder()
        for path, module in model.named_modules():
            if path:
                module.register_forward_pre_hook(
                    lambda _, inputs, path=path: recorder.add(path, "in", inputs[0])
                )
                module.register_forward_hook(
                    lambda _, inputs, output, path=path: recorder.add(path, "out", output)
                )
        logits = model(self._tokens(tokens_BT))
        recorder.values["logits"] = logits
        return {key: _to_numpy(value) for key, value in recorder.values.items()}

    @torch.no_grad()
    def losses(self, config: Config, batches: Sequence[Batch[np.ndarray]]) -> np.ndarray:
        objective = self._objective(config)
        return np.array([objective(self._batch(b)).item() / count_labels(b) for b in batches])

    def forward_backward(self, config: Config, batch: Batch[np.ndarray]) -> ForwardBackward:
        objective, here = self._objective(config), self._batch(batch)
        loss = objective(here)
        loss.backward()
        with torch.no_grad():
            logits_BTV = objective.model(here.tokens, **here.context)
        gradients = _gradients(objective.model)
        return ForwardBackward(_to_numpy(logits_BTV), loss.item(), gradients)

    def _objective(self, config: Config) -> mooshak_torch.objectives.CausalLM:
        model, chunk = self.model(config.train.dtype), config.train.loss_chunk
        if config.data.format == "preferences":
            return mooshak_torch.objectives.PreferenceLM(model, chunk, config.dpo)
        if config.data.format == "prompts":
            return mooshak_torch.objectives.PolicyLM(model, chunk, config.grpo)
        return mooshak_torch.objectives.CausalLM(model, chunk)

    def log_probs(
        self, dtype: Dtype, batch: Batch[np.ndarray], weights_BT: np.ndarray
    ) -> tuple[np.ndarray, Arrays]:
        model, here = self.model(dtype), self._batch(batch)
        log_probs_BT = mooshak_torch.ops.cross_entropy.token_log_probs(
            model.hidden_states(here.tokens), model.head_VD, here.labels, batch.labels.size // 3
        )
        log_probs_BT.backward(torch.from_numpy(weights_BT).to(log_probs_BT))
        return _to_numpy(log_probs_BT.detach()), _gradients(model)

    def steps(self, config: Config, batches: Sequence[Batch[np.ndarray]]) -> Iterator[Step]:
        """Yield the steps as `Backend.steps`.

        Under torchrun every process trains on its rows and gets the complete results.
        """
        parallel = mooshak_torch.distributed.mesh.make_parallel(config, self.device)
        self.is_main = parallel.is_main
        objective = mooshak_torch.distributed.parallelize.parallelize(
            mooshak_torch.objectives.make_objective(config.model, config), parallel, config
        )
        model = mooshak_torch.objectives.model_of(objective)
        mooshak_torch.params.load_params(dict(model.named_parameters()), self.source)
        optimizer = mooshak_torch.optimizer.Optimizer(objective, model, config.optimizer)
        for step, batch in enumerate(batches):
            mine = self._batch(batch).chunk(parallel.dp_size)[parallel.dp_rank]
            loss, norm = mooshak_torch.step.train_step(
                objective, optimizer, mine, learning_rate(config, step), config, parallel
            )
            loss = parallel.sum(loss)
            state = optimizer.state()
            trees = [state[part] for part in ("params", *MOMENTS)]
            arrays = [{name: _gather(tensor) for name, tensor in tree.items()} for tree in trees]
            yield Step(loss.item(), norm.item(), *arrays)
        parallel.close()

    @torch.no_grad()
    def cached_logits(self, dtype: Dtype, calls: Sequence[CacheCall]) -> list[np.ndarray]:
        model, length, results = self.model(dtype), 0, []
        caches = mooshak_torch.model.make_caches(model, *cache_shape(calls))
        for start, tokens_BT in calls:
            if start < length:
                caches = [cache.truncate([start] * len(tokens_BT)) for cache in caches]
            steps_T = torch.arange(tokens_BT.shape[1], device=self.device)
            positions_BT = caches[0].lengths.unsqueeze(1) + steps_T
            logits_BTV = model(self._tokens(tokens_BT), positions_BT, caches)
            results.append(_to_numpy(logits_BTV))
            length = start + tokens_BT.shape[1]
        return results

    def lm(self, dtype: Dtype) -> LM:
        return mooshak_torch.lm.LM(self.model(dtype), None)

    def engine(self, lm: LM) -> Engine:
        assert isinstance(lm, mooshak_torch.lm.LM)
        return mooshak_torch.engine.Engine(lm, n_slots=4, chunk=5)

    def _tokens(self, tokens_BT: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(tokens_BT)).to(self.device).long()

    def _batch(self, batch: Batch[np.ndarray]) -> Batch[torch.Tensor]:
        def copy(array: np.ndarray) -> torch.Tensor:
            is_float = np.issubdtype(array.dtype, np.floating)
            return torch.from_numpy(array).to(self.device) if is_float else self._tokens(array)

        return batch.map(copy)


def _gradients(model: torch.nn.Module) -> Arrays:
    return {n: _to_numpy(p.grad) for n, p in model.named_parameters() if p.grad is not None}


def _gather(tensor: torch.Tensor) -> np.ndarray:
    """Copy the full tensor of all processes."""
    tensor = tensor.detach()
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.cpu().numpy().copy()


def _to_numpy(tensor: torch.Tensor) -> np.ndarray:
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).cpu().numpy()
