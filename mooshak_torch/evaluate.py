"""Bits per byte of held-out text with the PyTorch model, beside those of a unigram coder.

python -m mooshak_torch.evaluate RUN/checkpoints/600 --evaluate.sequences 256
"""

import os
from functools import partial

from mooshak.checkpoints.formats import ensure_readable_format
from mooshak.errors import command
from mooshak.evaluation.bits_per_byte import compare, options, report
from mooshak_torch.checkpoint import open_checkpoint
from mooshak_torch.distributed.mesh import make_parallel
from mooshak_torch.distributed.parallelize import parallelize
from mooshak_torch.objectives import make_objective, model_of
from mooshak_torch.params import load_params
from mooshak_torch.step import evaluate, set_matmul_precision


@command
def main() -> None:
    os.environ["JAX_PLATFORMS"] = "cpu"  # Grain imports JAX.
    config, arguments = options(__doc__.split("\n")[0])
    parallel = make_parallel(config)
    set_matmul_precision()
    with ensure_readable_format(arguments.source, "torch", parallel) as path:
        source = open_checkpoint(path)
        objective = parallelize(make_objective(source.model, config), parallel, config)
        load_params(dict(model_of(objective).named_parameters()), source)
    score = partial(evaluate, objective, config=config, parallel=parallel)
    scores = compare(score, source.model, config, arguments.source)
    if parallel.is_main:
        report(scores, arguments.json)
    parallel.close()


if __name__ == "__main__":
    main()
