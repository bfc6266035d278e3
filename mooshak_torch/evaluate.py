"""Bits per byte of held-out text with the PyTorch model, beside those of a unigram coder.

python -m mooshak_torch.evaluate RUN/checkpoints/600 --evaluate.sequences 256
"""

import os
from functools import partial

from mooshak.checkpoints import readable
from mooshak.errors import command
from mooshak.evaluation import compare, options, report
from mooshak_torch.checkpoint import fill, open_checkpoint
from mooshak_torch.parallel import make_parallel
from mooshak_torch.train import evaluate, make_objective, model_of, precise


@command
def main() -> None:
    os.environ["JAX_PLATFORMS"] = "cpu"  # Grain imports JAX.
    config, arguments = options(__doc__.split("\n")[0])
    parallel = make_parallel(config)
    precise()
    with readable(arguments.source, "torch", parallel) as path:
        source = open_checkpoint(path)
        objective = parallel.wrap(make_objective(source.model, config), config)
        fill(dict(model_of(objective).named_parameters()), source)
    score = partial(evaluate, objective, config=config, parallel=parallel)
    scores = compare(score, source.model, config, arguments.source)
    if parallel.main:
        report(scores, arguments.json)
    parallel.close()


if __name__ == "__main__":
    main()
