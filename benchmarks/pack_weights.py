"""Measure decoding with packed copies of the weights against plain weights, in turns.

python -m benchmarks.pack_weights --rows 1 4 16 --tokens 64
python -m benchmarks.pack_weights --rows 1 --tokens 8 --repetitions 9
"""

import statistics
import time
from unittest import mock

from mooshak.command_line import command_parser
from mooshak.config.model import ModelConfig


def main() -> None:
    usage = "[--rows N ...] [--tokens N] [--repetitions N]"
    parser = command_parser("benchmarks.pack_weights", __doc__, usage)
    add = parser.add_argument
    add("--rows", type=int, nargs="+", default=[1, 4, 16], metavar="N", help="sequences")
    add("--tokens", type=int, default=64, metavar="N", help="new tokens of each")
    add("--repetitions", type=int, default=5, metavar="N", help="measurements of each kind")
    args = parser.parse_args()
    # After the arguments: --help and a typo need no framework.
    import torch

    from mooshak_torch.decode import generate
    from mooshak_torch.model import Model
    from mooshak_torch.ops import matmul
    from mooshak_torch.params import initialize

    sizes = ModelConfig(vocab_size=8192, dim=640, n_layers=8, n_heads=10, hidden_dim=1728)
    model = initialize(Model(sizes), 0)
    torch.set_num_threads(1)
    for rows in args.rows:
        prompts = [[1 + i, 5, 9] for i in range(rows)]
        seconds: dict[bool, list[float]] = {True: [], False: []}
        for turn in range(2 * args.repetitions):
            packed = turn % 4 in (0, 3)
            least = 1 if packed else args.tokens + 1
            with mock.patch.multiple(
                matmul, MIN_PACKED_TOKENS=least, MIN_PACKED_TOKENS_OF_ONE_ROW=least
            ):
                start = time.perf_counter()
                generate(model, prompts, args.tokens)
                seconds[packed].append(time.perf_counter() - start)
        speed = {k: rows * args.tokens / statistics.median(v) for k, v in seconds.items()}
        print(
            f"{rows} rows, {args.tokens} tokens: {speed[False]:.0f} tokens/s, packed "
            f"{speed[True]:.0f}, {speed[True] / speed[False]:.2f} times"
        )


if __name__ == "__main__":
    main()
