"""Serve the PyTorch model with the OpenAI API.

python -m mooshak_torch.serve runs/demo/torch/checkpoints/600
python -m mooshak_torch.serve LLAMA --port 8001 --n-slots 32 --max-len 1024 --dtype bfloat16
python -m mooshak_torch.serve LLAMA --peer http://127.0.0.1:8001
"""

from mooshak.device import restrict_to
from mooshak.errors import command
from mooshak.serving.command import run_server, serve_parser


@command
def main() -> None:
    args = serve_parser("mooshak_torch.serve", __doc__).parse_args()
    restrict_to(args.device)
    # Imported after parsing: --help and wrong arguments do not need the framework.
    from mooshak_torch.engine import Engine
    from mooshak_torch.lm import load

    run_server(args, "torch", load, Engine)


if __name__ == "__main__":
    main()
