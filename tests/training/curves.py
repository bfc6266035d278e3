"""Steps of a trainer on one batch, for tests: loss, gradient norm and metrics of each."""

from mooshak.config.sections import Config
from mooshak.data.packing import Batch
from mooshak_jax import params as jax_params
from mooshak_jax import step as jax_step
from mooshak_torch import step as torch_step
from mooshak_torch.distributed import mesh as torch_mesh

Curve = list[tuple[float, ...]]


def torch_curve(settings: Config, batch: Batch, steps: int = 3) -> Curve:
    """Take steps in PyTorch, from the initial weights of seed 0."""
    parallel, curve = torch_mesh.make_parallel(settings), []
    objective, optimizer = torch_step.make_state(settings, parallel, None, None)
    local = parallel.shard_local_batch(batch)
    for _ in range(steps):
        loss, norm = torch_step.train_step(objective, optimizer, local, 1e-2, settings, parallel)
        curve.append((loss.item(), norm.item(), *map(float, objective.metrics.values())))
    return curve


def jax_curve(settings: Config, batch: Batch, steps: int = 3) -> Curve:
    """Take the same steps in JAX."""
    trainer = jax_step.Trainer(settings)
    trainer.state = jax_step.initial_state(
        jax_params.initialize(settings.model, "float64", 0, parallel=trainer.processes)
    )
    trainer._skipped, curve = 0, []
    trainer._add_metrics()
    for _ in range(steps):
        metrics, _ = trainer.step(batch, 1e-2, lambda: False)
        curve.append(tuple(metrics.values()))
    return curve
