"""Tokenize the sources of a configuration into shards (prepare), or describe the shards.

Of conversations (data.format), which need no preparation, both print shapes, sizes and labels.

python -m mooshak.data prepare --config configs/demo.yaml
python -m mooshak.data describe --config configs/demo.yaml
python -m mooshak.data describe --config configs/sft-demo.yaml --init.from CHECKPOINT
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from mooshak.checkpoints.init_from import resolve
from mooshak.config.parse import config_parser, parse_config
from mooshak.config.sections import Config
from mooshak.data.conversations import conversations
from mooshak.data.manifest import has_offsets, read_manifest, totals
from mooshak.data.samples import Sample, encode_samples, truncate
from mooshak.data.shards import load_or_prepare_shards
from mooshak.errors import InputError, command
from mooshak.tables import print_table
from mooshak.tokenizer.train import load_or_train_tokenizer


@command
def main(argv: Sequence[str] | None = None) -> None:
    """`python -m mooshak.data prepare|describe`."""
    usage = "prepare|describe --config FILE [--section.key VALUE ...]"
    arguments = config_parser("mooshak.data", __doc__, usage)
    text = "prepare: write the shards that are missing; describe: print their sizes"
    arguments.add_argument("action", choices=["prepare", "describe"], help=text)
    draft, options = parse_config(arguments, argv)
    config = resolve(draft)
    if config.data.format == "conversations":
        print_table(_conversations(config))
        return
    if options.action == "prepare":
        load_or_prepare_shards(config)
    print_table(_description(config))


def _conversations(config: Config) -> Table:
    """Return a row per source: the shape of its records, and what is read and trained of them."""
    tokenizer = load_or_train_tokenizer(config)
    table = Table(title=f"conversations, cut at {config.T} tokens")
    table.add_column("source")
    table.add_column("shape")
    for title in ("records", "samples", "tokens", "labels", "longest", "cut", "no label"):
        table.add_column(title, justify="right", overflow="fold")
    for source in config.data.sources:
        shape, records, invalid = "", 0, 0
        samples: list[Sample] = []
        for one in conversations(source, config):
            shape, records = one.shape, records + 1
            for answer in one.answers:
                try:
                    samples += encode_samples(tokenizer, one.prompt, answer)
                except InputError as error:
                    invalid += 1
                    if invalid == 1:
                        print(f"{one.where}: {error}", file=sys.stderr)
        short = [truncate(sample, config.T) for sample in samples]
        cut = sum(
            one.n_labels < sample.n_labels for one, sample in zip(short, samples, strict=True)
        )
        invalid += sum(not one.n_labels for one in short)
        longest = max((len(one.tokens) for one in samples), default=0)
        sizes = [sum(len(one.tokens) for one in short), sum(one.n_labels for one in short)]
        counts = [records, len(samples), *sizes, longest, cut, invalid]
        table.add_row(source.name, shape, *(f"{count:,}" for count in counts))
    return table


def _description(config: Config) -> Table:
    """Return a row per source: sizes of its shards, and its share of the training sequences."""
    table = Table(title=f"{config.data.dir}, sequences of {config.T} tokens")
    table.add_column("source")
    table.add_column("language")
    for title in "documents tokens bytes tokens/document sequences share validation".split():
        table.add_column(title, justify="right", overflow="fold")
    weights = sum(source.weight for source in config.data.sources)
    for source in config.data.sources:
        manifest = read_manifest(Path(config.data.dir) / source.name)
        train, validation = totals(manifest, "train"), totals(manifest, "validation")
        mean_length = ""
        if has_offsets(manifest):
            mean_length = f"{train['tokens'] / max(1, train['documents']):,.1f}"
        table.add_row(
            source.name,
            source.language,
            f"{train['documents']:,}",
            f"{train['tokens']:,}",
            f"{train['bytes']:,}",
            mean_length,
            f"{max(0, (train['tokens'] - 1) // config.T):,}",
            f"{source.weight / weights:.1%}",
            f"{validation['tokens']:,}",
        )
    return table


if __name__ == "__main__":
    main()
