"""Serve the JAX model with the OpenAI API.

python -m mooshak_jax.serve runs/demo/jax/checkpoints/1200
python -m mooshak_jax.serve LLAMA --port 8001 --n-slots 32 --max-len 1024 --mesh tensor=4
python -m mooshak_jax.serve LLAMA --peer http://127.0.0.1:8001
"""

from functools import partial

from mooshak.device import restrict_to
from mooshak.errors import command
from mooshak.serving.command import run_server, serve_parser


@command
def main() -> None:
    parser = serve_parser("mooshak_jax.serve", __doc__)
    text = "mesh over which the parameters are sharded, such as tensor=4"
    parser.add_argument("--mesh", metavar="MESH", help=text)
    args = parser.parse_args()
    restrict_to(args.device)
    # Imported after parsing: --help and wrong arguments do not need the framework.
    from mooshak_jax.engine import Engine
    from mooshak_jax.lm import load
    from mooshak_jax.step import cache_compilations

    cache_compilations()
    run_server(args, "jax", partial(load, mesh=args.mesh), Engine)


if __name__ == "__main__":
    main()
