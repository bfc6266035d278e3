"""Measure bits per byte of held-out text with the PyTorch model, compared with a unigram coder.

python -m mooshak_torch.evaluate runs/demo/torch/checkpoints/600
python -m mooshak_torch.evaluate RUN/checkpoints/600 --evaluate.sequences 256 --json
"""

import os

from mooshak.errors import command
from mooshak.evaluation.bits_per_byte import options, report


@command
def main() -> None:
    config, arguments = options("mooshak_torch.evaluate", __doc__)
    os.environ["JAX_PLATFORMS"] = "cpu"  # Grain imports JAX, which must not claim the GPU.
    # Imported after parsing: --help and wrong arguments do not need the framework.
    from mooshak_torch.device import find_device
    from mooshak_torch.evaluator import evaluate_checkpoint

    find_device(arguments.device)
    scores = evaluate_checkpoint(config, arguments.source)
    if scores is not None:
        report(scores, arguments.json)


if __name__ == "__main__":
    main()
