"""Generate text with the PyTorch model.

python -m mooshak_torch.generate runs/demo/torch/checkpoints/600 --prompt "एक समय की बात है"
python -m mooshak_torch.generate LLAMA --prompt "the lion" --temperature 0.8 --top_p 0.95
"""

from functools import partial

from mooshak.device import restrict_to
from mooshak.errors import command
from mooshak.generation.command import generate_parser, generate_text


@command
def main() -> None:
    parser = generate_parser("mooshak_torch.generate", __doc__)
    parser.add_argument(
        "--compile",
        action="store_true",
        help="torch.compile the decode step; pays off for long outputs",
    )
    args = parser.parse_args()
    restrict_to(args.device)
    # Imported after parsing: --help and wrong arguments do not need the framework.
    from mooshak_torch.lm import load

    generate_text(args, partial(load, compiled=args.compile))


if __name__ == "__main__":
    main()
