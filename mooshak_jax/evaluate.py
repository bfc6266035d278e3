"""Measure bits per byte of held-out text with the JAX model, compared with a unigram coder.

python -m mooshak_jax.evaluate runs/demo/jax/checkpoints/1200
python -m mooshak_jax.evaluate RUN/checkpoints/600 --evaluate.sequences 256 --json
"""

from mooshak.errors import command
from mooshak.evaluation.bits_per_byte import options, report


@command
def main() -> None:
    config, arguments = options("mooshak_jax.evaluate", __doc__)
    # Imported after parsing: --help and wrong arguments do not need the framework.
    from mooshak_jax.device import find_devices
    from mooshak_jax.evaluator import evaluate_checkpoint
    from mooshak_jax.step import cache_compilations

    cache_compilations()
    if arguments.device and config.parallel.coordinator_address is None:
        find_devices(arguments.device)  # Other processes are joined before a device is used.
    scores = evaluate_checkpoint(config, arguments.source)
    if scores is not None:
        report(scores, arguments.json)


if __name__ == "__main__":
    main()
