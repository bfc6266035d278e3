"""Train on one rank of a layout; `parity.layouts` starts it with torchrun.

DIRECTORY holds `state`, `config.yaml` and the batches of each case; the first rank writes the
results there.

torchrun --nproc-per-node 2 -m parity.rank_worker DIRECTORY
"""

from pathlib import Path

from mooshak.command_line import command_parser
from mooshak.errors import command


@command
def main() -> None:
    parser = command_parser("parity.rank_worker", __doc__, "DIRECTORY")
    parser.add_argument("directory", type=Path, metavar="DIRECTORY", help="directory of the case")
    directory = parser.parse_args().directory
    # After the arguments: --help and a typo need no framework.
    from parity.layouts import train_on_rank

    train_on_rank(directory)


if __name__ == "__main__":
    main()
