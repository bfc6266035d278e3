"""Generate text with the JAX model.

python -m mooshak_jax.generate RUN/checkpoints/600 --prompt "एक समय की बात है"
"""

from mooshak.errors import command
from mooshak.generation.command import generate_parser, generate_text


@command
def main() -> None:
    parser = generate_parser("mooshak_jax.generate", (__doc__ or "").split("\n")[0])
    args = parser.parse_args()
    # After the arguments: --help and a typo need no framework.
    from mooshak_jax.lm import load
    from mooshak_jax.step import cache_compilations

    cache_compilations()
    generate_text(args, load)


if __name__ == "__main__":
    main()
