"""Bits per byte of held-out text, compared with a unigram coder."""

import json
import math
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import jsonargparse
import numpy as np
from rich.table import Table

from mooshak.checkpoints import formats, resume
from mooshak.checkpoints.init_from import resolve
from mooshak.config.model import ModelConfig
from mooshak.config.parse import config_parser, parse_config
from mooshak.config.sections import Config, ParallelConfig
from mooshak.data.conversation_batches import ConversationData
from mooshak.data.packing import IGNORE_INDEX, Batch
from mooshak.data.shards import TokenShards, open_shards
from mooshak.device import add_device_option, restrict_to
from mooshak.errors import InputError
from mooshak.mesh import parse_mesh
from mooshak.tables import print_table
from mooshak.tokenizer.base import Tokenizer

Scores = dict[str, dict[str, float]]
"""Language -> bits_per_byte, unigram_bits_per_byte, ratio of these, loss, tokens, bytes."""


USAGE = "CHECKPOINT [--config FILE] [--device NAME] [--json] [--section.key VALUE ...]"

CHECKPOINT = "directory of a checkpoint, of any format"


def options(module: str, doc: str | None) -> tuple[Config, jsonargparse.Namespace]:
    """Parse the arguments of both `evaluate` commands: the configuration, `source` and `json`.

    The process is restricted to the option `--device`: call this before a framework is imported.
    Without `--config`, the configuration is that of the run that the checkpoint belongs to.
    """
    parser = config_parser(module, doc, USAGE)
    parser.add_argument("source", type=Path, metavar="CHECKPOINT", help=CHECKPOINT)
    add_device_option(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object, not a table")
    found: list[Path] = []

    def config_of_run(arguments: jsonargparse.Namespace) -> Path:
        found.append(_config_of_run(arguments))
        return found[0]

    draft, arguments = parse_config(parser, find_config=config_of_run)
    restrict_to(arguments.device)
    config = resolve(draft)
    layout_given = any(word.startswith(("--mesh", "--parallel")) for word in sys.argv[1:])
    if found and not layout_given and not _layout_fits(config, module):
        config = replace(config, parallel=ParallelConfig())
    if config.data.validation_fraction == 0:
        raise InputError("data.validation_fraction is 0: no text is held out to evaluate on")
    return config, arguments


def _layout_fits(config: Config, module: str) -> bool:
    """Return False for a layout of several processes, or of JAX's devices, in PyTorch alone.

    Evaluation gives the same numbers on any layout.
    """
    n_processes = math.prod(max(1, size) for size in parse_mesh(config.parallel.mesh).values())
    world = os.environ.get("WORLD_SIZE") or "1"
    strategy = config.parallel.strategy
    alone = strategy in ("auto", "single") and n_processes == 1
    return alone if module.startswith("mooshak_torch") and world == "1" else True


def _config_of_run(arguments: jsonargparse.Namespace) -> Path:
    """Return `RUN/config.yaml` of the checkpoint `RUN/checkpoints/STEP`."""
    formats.detect_format(arguments.source)
    path: Path = arguments.source.absolute().parent.parent / "config.yaml"
    if not path.is_file():
        raise InputError(f"{arguments.source} is not in a run directory; give --config")
    return path


def compare(
    evaluate: Callable[[Batch], float], model: ModelConfig, config: Config, checkpoint: Path
) -> Scores:
    """Return bits per byte, loss and counts by language, for the model and a unigram baseline.

    `evaluate` returns the cross entropy of a batch: the sum over labels that are not ignored, in
    nats. `model` is the model of the checkpoint. Raises `InputError` if it is not that of the
    configuration, or the tokenizer is not that of the checkpoint.
    """
    resume.check_model(checkpoint, model, config)
    tokenizer, held_out, counts = _held_out(config)
    resume.check_tokenizer(checkpoint, tokenizer)
    token_bytes_V = tokenizer.token_bytes()
    scores: Scores = {}
    for language, batch in held_out.items():
        nats = evaluate(batch)
        unigram = unigram_nats(counts(language), batch.labels)
        n_tokens = len(valid_labels(batch.labels))
        scores[language] = {
            "bits_per_byte": bits_per_byte(nats, batch.labels, token_bytes_V),
            "unigram_bits_per_byte": bits_per_byte(unigram, batch.labels, token_bytes_V),
            "ratio": unigram / nats,
            "loss": nats / n_tokens,
            "tokens": n_tokens,
            "bytes": text_bytes(batch.labels, token_bytes_V),
        }
    return scores


def _held_out(
    config: Config,
) -> tuple[Tokenizer, Mapping[str, Batch], Callable[[str], np.ndarray]]:
    """Return tokenizer, held-out sequences by language, and the function that counts tokens."""
    if config.data.format == "conversations":
        data = ConversationData(config)
        return data.tokenizer, data.validation(), data.token_counts
    # Grain imports jax.
    from mooshak.data.batches import validation_sequences

    tokenizer = open_shards(config)
    return tokenizer, validation_sequences(config), partial(token_counts, config)


def report(scores: Scores, as_json: bool) -> None:
    """Print the scores as one JSON object, or as a table."""
    if as_json:
        print(json.dumps(scores))
        return
    table = Table(title="held-out text")
    table.add_column("language")
    for column in ("tokens", "loss", "bits per byte", "unigram coder", "ratio"):
        table.add_column(column, justify="right")
    for language, score in scores.items():
        table.add_row(
            language,
            f"{score['tokens']:,}",
            f"{score['loss']:.4f}",
            f"{score['bits_per_byte']:.4f}",
            f"{score['unigram_bits_per_byte']:.4f}",
            f"{score['ratio']:.2f}",
        )
    print_table(table, width=100)


def token_counts(config: Config, language: str) -> np.ndarray:
    """Count each token in the training text of a language, int64 [vocab_size]."""
    counts_V = np.zeros(config.model.vocab_size, np.int64)
    for source in config.data.sources:
        if source.language == language:
            tokens = TokenShards(Path(config.data.dir) / source.name, "train")
            for start in range(0, len(tokens), 2**20):
                part = tokens.window(start, min(2**20, len(tokens) - start))
                counts_V += np.bincount(part, minlength=len(counts_V))
    return counts_V


def validation_metrics(
    evaluate: Callable[[Batch], float],
    validation: Mapping[str, Batch],
    token_bytes_V: np.ndarray,
) -> dict[str, float]:
    """Return `validation_loss` per token over all languages, and `bits_per_byte_{language}`.

    `evaluate` returns the cross entropy of a batch, as for `compare`.
    """
    nats = {language: evaluate(batch) for language, batch in validation.items()}
    n_tokens = sum(len(valid_labels(batch.labels)) for batch in validation.values())
    return {
        "validation_loss": sum(nats.values()) / n_tokens,
        **{
            f"bits_per_byte_{language}": bits_per_byte(nats[language], batch.labels, token_bytes_V)
            for language, batch in validation.items()
        },
    }


def valid_labels(labels_NT: np.ndarray) -> np.ndarray:
    """Return the labels that are not ignored, flat."""
    return labels_NT[labels_NT != IGNORE_INDEX]


def bits_per_byte(nats: float, labels_NT: np.ndarray, token_bytes_V: np.ndarray) -> float:
    """Return the code length of the labels that are not ignored, in bits per byte of their text.

    `nats` is the sum of their cross entropy. Unlike the loss per token, the result is comparable
    between tokenizers.
    """
    return nats / math.log(2) / text_bytes(labels_NT, token_bytes_V)


def text_bytes(labels_NT: np.ndarray, token_bytes_V: np.ndarray) -> int:
    """Return the UTF-8 bytes of the labels that are not ignored."""
    return int(token_bytes_V[valid_labels(labels_NT)].sum(dtype=np.int64))


def unigram_nats(counts_V: np.ndarray, labels_NT: np.ndarray) -> float:
    """Return the cross entropy of the labels, in nats, under the token frequencies in training.

    `counts_V` are the counts of the tokens in the training text, to each of which one is added
    (Laplace).
    """
    log_p_V = np.log(counts_V + 1.0) - math.log(counts_V.sum() + len(counts_V))
    return float(-log_p_V[valid_labels(labels_NT)].sum())
