"""Bits per byte of held-out text under a checkpoint. Mirror: mooshak_torch/evaluator.py."""

from pathlib import Path

from mooshak.config.sections import Config
from mooshak.data.packing import Batch
from mooshak.evaluation.bits_per_byte import Scores, compare
from mooshak_jax.checkpoint import load_model
from mooshak_jax.distributed.mesh import make_parallel
from mooshak_jax.step import evaluate, make_evaluate, set_matmul_precision


def evaluate_checkpoint(config: Config, checkpoint: Path) -> Scores | None:
    """Return the scores of a checkpoint by language, on the main process; None on the others.

    Raises `InputError` as `mooshak.evaluation.bits_per_byte.compare` does.
    """
    parallel = make_parallel(config)
    set_matmul_precision(config)
    model, params = load_model(checkpoint, config.train.dtype, parallel, config.model)
    measure = make_evaluate(config, parallel)

    def score(batch: Batch) -> float:
        return evaluate(measure, params, batch, config, parallel)["loss"]

    scores = compare(score, model, config, checkpoint)
    return scores if parallel.is_main else None
