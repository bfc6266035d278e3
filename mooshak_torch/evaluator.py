"""Bits per byte of held-out text under a checkpoint. Mirror: mooshak_jax/evaluator.py."""

from pathlib import Path

from mooshak.checkpoints.formats import ensure_readable_format
from mooshak.config.sections import Config
from mooshak.data.packing import Batch
from mooshak.evaluation.bits_per_byte import Scores, compare
from mooshak_torch.checkpoint import open_checkpoint
from mooshak_torch.distributed.mesh import make_parallel
from mooshak_torch.distributed.parallelize import parallelize
from mooshak_torch.objectives import make_objective, model_of
from mooshak_torch.params import load_params
from mooshak_torch.step import evaluate, set_matmul_precision


def evaluate_checkpoint(config: Config, checkpoint: Path) -> Scores | None:
    """Return the scores of a checkpoint by language, on the main process; None on the others.

    Raises `InputError` as `mooshak.evaluation.bits_per_byte.compare` does.
    """
    parallel = make_parallel(config)
    set_matmul_precision()
    with ensure_readable_format(checkpoint, "torch", parallel) as path:
        source = open_checkpoint(path)
        objective = parallelize(make_objective(source.model, config), parallel, config)
        load_params(dict(model_of(objective).named_parameters()), source)

    def score(batch: Batch) -> float:
        return evaluate(objective, batch, config, parallel)["loss"]

    scores = compare(score, source.model, config, checkpoint)
    parallel.close()
    return scores if parallel.is_main else None
