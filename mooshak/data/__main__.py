"""Tokenize the sources of a configuration into shards (prepare), or describe the shards.

python -m mooshak.data prepare --config configs/demo.yaml
python -m mooshak.data describe --config configs/demo.yaml
"""

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from mooshak.checkpoints.init_from import resolve
from mooshak.config.parse import config_parser, parse_config
from mooshak.config.sections import Config
from mooshak.data.manifest import has_offsets, read_manifest, totals
from mooshak.data.shards import load_or_prepare_shards
from mooshak.errors import command
from mooshak.tables import print_table


@command
def main(argv: Sequence[str] | None = None) -> None:
    """`python -m mooshak.data prepare|describe`."""
    usage = "prepare|describe --config FILE [--section.key VALUE ...]"
    arguments = config_parser("mooshak.data", __doc__, usage)
    text = "prepare: write the shards that are missing; describe: print their sizes"
    arguments.add_argument("action", choices=["prepare", "describe"], help=text)
    draft, options = parse_config(arguments, argv)
    config = resolve(draft)
    if options.action == "prepare":
        load_or_prepare_shards(config)
    print_table(_description(config))


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
