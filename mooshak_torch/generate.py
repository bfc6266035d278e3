"""Generate text with the PyTorch model.

python -m mooshak_torch.generate runs/demo/torch/checkpoints/600 --prompt "एक समय की बात है"
python -m mooshak_torch.generate LLAMA --prompt "the lion" --temperature 0.8 --top_p 0.95
python -m mooshak_torch.generate LLAMA --jsonl prompts.jsonl --jsonl_out completions.jsonl
python -m mooshak_torch.generate LLAMA --interactive
"""

from functools import partial

from mooshak.device import restrict_to
from mooshak.errors import command
from mooshak.generation.command import generate_parser, run_generate
from mooshak.generation.requests import read_requests


@command
def main() -> None:
    parser = generate_parser("mooshak_torch.generate", __doc__)
    parser.add_argument(
        "--compile",
        action="store_true",
        help="torch.compile the decode step; pays off for long outputs",
    )
    args = parser.parse_args()
    requests = read_requests(args)
    restrict_to(args.device)
    # Imported after parsing: --help and wrong arguments do not need the framework.
    from mooshak_torch.lm import load

    run_generate(args, requests, partial(load, compiled=args.compile))


if __name__ == "__main__":
    main()
