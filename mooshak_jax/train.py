"""Train the model in JAX.

python -m mooshak_jax.train --config configs/demo.yaml --mesh data=2
"""

from mooshak.checkpoints.init_from import resolve
from mooshak.config.parse import config_parser, parse_config
from mooshak.config.sections import Config
from mooshak.errors import command
from mooshak.training import loop
from mooshak.training.malloc import use_single_arena


def train(config: Config, resume: str = "auto", profile: bool = False) -> None:
    """Train a model as `mooshak.training.loop.train` does, in JAX."""
    from mooshak_jax.step import Trainer

    loop.train(config, Trainer(config), resume, profile)


@command
def main() -> None:
    use_single_arena()
    parser = config_parser(__doc__.split("\n")[0])
    parser.add_argument("--resume", default="auto", help="auto, never, or a checkpoint's directory")
    parser.add_argument("--profile", action="store_true", help="trace the third step")
    draft, arguments = parse_config(parser)
    config = resolve(draft)
    from mooshak_jax.profile import prepare_profiler
    from mooshak_jax.step import cache_compilations

    cache_compilations()
    if arguments.profile:
        prepare_profiler()
    train(config, arguments.resume, arguments.profile)


if __name__ == "__main__":
    main()
