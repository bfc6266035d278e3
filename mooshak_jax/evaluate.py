"""Bits per byte of held-out text with the JAX model, beside those of a unigram coder.

python -m mooshak_jax.evaluate RUN/checkpoints/600 --evaluate.sequences 256
"""

from functools import partial

from mooshak.errors import command
from mooshak.evaluation import compare, options, report
from mooshak_jax.checkpoint import load
from mooshak_jax.parallel import make_parallel
from mooshak_jax.train import cache_compilations, evaluate, make_evaluate, precise


@command
def main() -> None:
    config, arguments = options(__doc__.split("\n")[0])
    cache_compilations()
    parallel = make_parallel(config)
    precise(config)
    model, params = load(arguments.source, config.train.dtype, parallel, config.model)
    score = partial(evaluate, make_evaluate(config, parallel), params)
    scores = compare(
        partial(score, config=config, parallel=parallel), model, config, arguments.source
    )
    if parallel.main:
        report(scores, arguments.json)


if __name__ == "__main__":
    main()
