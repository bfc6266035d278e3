"""Bits per byte of held-out text with the PyTorch model, beside those of a unigram coder.

python -m mooshak_torch.evaluate RUN/checkpoints/600 --evaluate.sequences 256
"""

import os
from functools import partial

from mooshak.errors import command
from mooshak.evaluation import compare, options, report
from mooshak_torch.checkpoint import load
from mooshak_torch.parallel import make_parallel
from mooshak_torch.train import evaluate, precise


@command
def main() -> None:
    os.environ["JAX_PLATFORMS"] = "cpu"  # Grain imports JAX.
    config, arguments = options(__doc__.split("\n")[0])
    parallel = make_parallel(config)
    precise()
    model = load(arguments.source, config.train.dtype).to(parallel.device)
    score = partial(evaluate, model, config=config, parallel=parallel)
    scores = compare(score, model.config, config, arguments.source)
    if parallel.main:
        report(scores, arguments.json)
    parallel.close()


if __name__ == "__main__":
    main()
