"""Bits per byte of held-out text with the JAX model, beside those of a unigram coder.

python -m mooshak_jax.evaluate RUN/checkpoints/600 --evaluate.sequences 256
"""

from functools import partial

from mooshak.errors import command
from mooshak.evaluation.bits_per_byte import compare, options, report
from mooshak_jax.checkpoint import load_model
from mooshak_jax.distributed.mesh import make_parallel
from mooshak_jax.step import cache_compilations, evaluate, make_evaluate, set_matmul_precision


@command
def main() -> None:
    config, arguments = options(__doc__.split("\n")[0])
    cache_compilations()
    parallel = make_parallel(config)
    set_matmul_precision(config)
    model, params = load_model(arguments.source, config.train.dtype, parallel, config.model)
    score = partial(evaluate, make_evaluate(config, parallel), params)
    scores = compare(
        partial(score, config=config, parallel=parallel), model, config, arguments.source
    )
    if parallel.is_main:
        report(scores, arguments.json)


if __name__ == "__main__":
    main()
