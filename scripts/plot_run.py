"""Draw the metrics of a run as SVG: training loss, and bits per byte of the validation text.

Each language is compared with the unigram coder of its training text.

python scripts/plot_run.py runs/demo/torch loss.svg
python scripts/plot_run.py runs/libreoffice-help docs/libreoffice-help.svg --change 750
"""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from mooshak.command_line import command_parser
from mooshak.config.parse import load_config
from mooshak.config.sections import Config
from mooshak.errors import InputError, command
from mooshak.evaluation.bits_per_byte import bits_per_byte, token_counts, unigram_nats
from mooshak.files import atomic_write
from mooshak.tokenizer.load import open_tokenizer
from mooshak.training.metrics import read_metrics

NAMES = {"hi": "Hindi", "en": "English"}


def unigram(config: Config) -> dict[str, float]:
    """Return bits per byte of the validation sequences of each language under its unigram coder."""
    # After the arguments: Grain imports JAX.
    from mooshak.data.batches import validation_sequences

    token_bytes_V = open_tokenizer(config.tokenizer.path).token_bytes()
    result = {}
    for language, batch in validation_sequences(config).items():
        nats = unigram_nats(token_counts(config, language), batch.labels)
        result[language] = bits_per_byte(nats, batch.labels, token_bytes_V)
    return result


def draw(lines: list[dict[str, float]], unigrams: dict[str, float], change: int | None) -> Figure:
    """Return two panels over the steps: loss per token, and bits per byte."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    steps = np.array([line["step"] for line in lines])
    losses = np.array([line["loss"] for line in lines])
    n = min(25, len(losses))
    mean = np.convolve(losses, np.full(n, 1 / n), mode="valid")
    left.plot(steps, losses, color="0.8", linewidth=0.7)
    left.plot(steps[n - 1 :], mean, color="C0", label=f"mean of {n} steps")
    left.set(xlabel="step", ylabel="training loss, nats per token")
    validated = [line for line in lines if "validation_loss" in line]
    for color, (language, baseline) in enumerate(unigrams.items(), 1):
        values = [line[f"bits_per_byte_{language}"] for line in validated]
        name = NAMES.get(language, language)
        label = f"{name}: {values[-1]:.3f} at the end"
        right.plot([line["step"] for line in validated], values, "o-", markersize=3,
                   color=f"C{color}", label=label)  # fmt: skip
        right.axhline(baseline, color=f"C{color}", linestyle=":",
                      label=f"{name}, unigram coder: {baseline:.3f}")  # fmt: skip
    right.set(xlabel="step", ylabel="validation, bits per byte", ylim=(0, None))
    if change is not None:
        left.axvline(change, color="0.4", ls="--", lw=0.8, label="PyTorch before, JAX after")
        right.axvline(change, color="0.4", ls="--", lw=0.8)
    left.legend(frameon=False)
    right.legend(frameon=False, fontsize="small")
    return figure


@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = command_parser("scripts/plot_run.py", __doc__, "RUN SVG [--change STEP]")
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory")
    parser.add_argument("svg", type=Path, metavar="SVG", help="file to write")
    text = "last step in PyTorch of a run that continues in JAX; drawn as a line"
    parser.add_argument("--change", type=int, metavar="STEP", help=text)
    options = parser.parse_args(argv)
    lines = read_metrics(options.run / "metrics.jsonl")
    if not any("validation_loss" in line for line in lines):
        raise InputError(
            f"{options.run} has no metrics with a validation; train with evaluate.every > 0"
        )
    unigrams = unigram(load_config(options.run / "config.yaml"))
    # Reproducible: the same run gives the same file.
    matplotlib.rcParams["svg.hashsalt"] = "mooshak"
    with atomic_write(options.svg) as file:
        draw(lines, unigrams, options.change).savefig(file, format="svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
