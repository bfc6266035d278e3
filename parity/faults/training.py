"""Patches of the loss, the optimizer and the training step.

Each function returns the replacements in one framework, or one of them.
"""

from collections.abc import Callable
from typing import Any

import jax
import optax
import torch

import mooshak_jax.objectives
import mooshak_jax.params
import mooshak_jax.step
import mooshak_torch.objectives
import mooshak_torch.optimizer
import mooshak_torch.step
from mooshak.data.packing import IGNORE_INDEX, Batch
from mooshak.numerics.schedule import learning_rate
from parity.faults.model import Patch

ts, to = mooshak_torch.step, mooshak_torch.objectives
js, jo = mooshak_jax.step, mooshak_jax.objectives


def unshifted_torch() -> list[Patch]:
    def forward(self: Any, batch: Batch) -> torch.Tensor:
        loss: torch.Tensor = self.loss(self.model.hidden_states(batch.tokens), batch.tokens)
        return loss

    return [(to.CausalLM, "forward", forward)]


def unshifted_jax() -> list[Patch]:
    def call(self: Any, params: Any, batch: Batch) -> jax.Array:
        model = mooshak_jax.params.merge(self.graphdef, params)
        hidden = model.hidden_states(batch.tokens)
        return jo.cross_entropy(hidden, model.head_DV, batch.tokens, self.chunk)

    return [(jo.CausalLM, "__call__", call)]


def count_padding(*places: tuple[Any, str]) -> list[Patch]:
    """Replace functions of a loss: ignored labels count as token 0."""

    def counting(original: Any) -> Any:
        return lambda x, w, labels, chunk: original(x, w, labels * (labels != IGNORE_INDEX), chunk)

    return [(module, name, counting(getattr(module, name))) for module, name in places]


def clip_jax(change: Callable[[Any, Any, float], Any]) -> list[Patch]:
    """Clip in JAX by `change(gradients, norm, max_norm)`."""

    def clip(grads: Any, max_norm: float) -> tuple[Any, Any]:
        norm = optax.tree.norm(grads)
        return change(grads, norm, max_norm), norm

    return [(js, "clip_gradients", clip)]


def clip_afterwards_torch() -> list[Patch]:
    def clip(parameters: Any, max_norm: float, scale: float) -> torch.Tensor:
        return torch.nn.utils.get_total_norm([p.grad for p in parameters])

    return [(mooshak_torch.optimizer, "clip_gradients", clip)]


def clip_epsilon_torch() -> list[Patch]:
    def clip(parameters: Any, max_norm: float, scale: float) -> torch.Tensor:
        return torch.nn.utils.clip_grad_norm_(parameters, max_norm)

    return [(mooshak_torch.optimizer, "clip_gradients", clip)]


def optimizer_torch(change: Callable[[Any, Any, Any], Any]) -> list[Patch]:
    """Make torch's optimizer by `change(make_optimizer, model, config)`."""
    original = mooshak_torch.optimizer.make_optimizer

    def make(model: Any, config: Any) -> Any:
        return change(original, model, config)

    return [(mooshak_torch.optimizer, "make_optimizer", make)]


def optimizer_jax(change: Callable[..., Any]) -> list[Patch]:
    """Update in JAX by `change(adamw, state, grads, rate, config)`."""
    original = js.adamw
    return [(js, "adamw", lambda *args: change(original, *args))]


def uncorrected_torch(make: Any, model: Any, config: Any) -> Any:
    optimizer = make(model, config)
    mooshak_torch.optimizer.moments(model, optimizer)
    mooshak_torch.optimizer.set_step(optimizer, 10**6)
    return optimizer


def uncorrected_jax(adamw: Any, state: Any, *args: Any) -> Any:
    return adamw(state | {"step": state["step"] + 10**6}, *args) | {"step": state["step"] + 1}


def step_torch(change: Callable[[int, list, Any], tuple[Any, float]]) -> list[Patch]:
    """Replace batch and rate of torch's step by those of `change(step, batches, config)`."""
    original, seen = ts.train_step, []

    def train_step(
        objective: Any, optimizer: Any, batch: Any, rate: Any, config: Any, *rest: Any
    ) -> Any:
        seen.append(batch)
        batch, rate = change(len(seen) - 1, seen, config)
        return original(objective, optimizer, batch, rate, config, *rest)

    return [(ts, "train_step", train_step)]


def step_jax(change: Callable[[int, list, Any], tuple[Any, float]]) -> list[Patch]:
    original = js.make_train_step

    def make_train_step(config: Any, *rest: Any) -> Any:
        update, seen = original(config, *rest), []

        def train_step(state: Any, batch: Any, rate: float) -> Any:
            seen.append(batch)
            batch, rate = change(len(seen) - 1, seen, config)
            return update(state, batch, rate)

        return train_step

    return [(js, "make_train_step", make_train_step)]


def late_batch(step: int, seen: list, config: Any) -> tuple[Any, float]:
    return seen[max(step - 1, 0)], learning_rate(config, step)


def next_rate(step: int, seen: list, config: Any) -> tuple[Any, float]:
    return seen[step], learning_rate(config, step + 1)


def summed_torch() -> list[Patch]:
    original = to.CausalLM.forward

    def forward(self: Any, batch: Batch) -> torch.Tensor:
        # Micro-batches are recognised by their number of rows.
        return original(self, batch) * (2 if len(batch.tokens) == SUMMED_ROWS else 1)

    return [(to.CausalLM, "forward", forward)]


def summed_jax() -> list[Patch]:
    original = jo.CausalLM.__call__

    def call(self: Any, params: Any, batch: Batch) -> jax.Array:
        return original(self, params, batch) * (2 if len(batch.tokens) == SUMMED_ROWS else 1)

    return [(jo.CausalLM, "__call__", call)]


SUMMED_ROWS = 2
"""Rows of a micro-batch in the check, which splits a batch of four in two."""
