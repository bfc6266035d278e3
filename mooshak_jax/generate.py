"""Generate text with the JAX model.

python -m mooshak_jax.generate runs/demo/jax/checkpoints/1200 --prompt "एक समय की बात है"
python -m mooshak_jax.generate LLAMA --prompt "the lion" --temperature 0.8 --top_p 0.95
python -m mooshak_jax.generate LLAMA --jsonl prompts.jsonl --jsonl_out completions.jsonl
python -m mooshak_jax.generate LLAMA --interactive
"""

from mooshak.device import restrict_to
from mooshak.errors import command
from mooshak.generation.command import generate_parser, run_generate
from mooshak.generation.requests import read_requests


@command
def main() -> None:
    parser = generate_parser("mooshak_jax.generate", __doc__)
    args = parser.parse_args()
    requests = read_requests(args)
    restrict_to(args.device)
    # Imported after parsing: --help and wrong arguments do not need the framework.
    from mooshak_jax.lm import load
    from mooshak_jax.step import cache_compilations

    cache_compilations()
    run_generate(args, requests, load)


if __name__ == "__main__":
    main()
