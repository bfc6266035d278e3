"""Train the model in JAX: from the start, or from the newest checkpoint of the run.

python -m mooshak_jax.train --config configs/demo.yaml
python -m mooshak_jax.train --config configs/demo.yaml --mesh data=2,fsdp=2,tensor=2
"""

from collections.abc import Callable

from mooshak.checkpoints.init_from import resolve
from mooshak.config.parse import config_parser, parse_config
from mooshak.config.sections import Config
from mooshak.errors import command
from mooshak.training import loop
from mooshak.training.malloc import use_single_arena


def train(
    config: Config, resume: str = "auto", profile: bool = False, allow_data_change: bool = False
) -> None:
    """Train a model in JAX; arguments and errors are those of `mooshak.training.loop.train`."""
    from mooshak_jax.step import Trainer

    loop.train(config, Trainer(config), resume, profile, allow_data_change)


@command
def main() -> None:
    run_command("mooshak_jax.train", __doc__, train)


def run_command(module: str, doc: str | None, run: Callable[..., None]) -> None:
    """Parse the arguments of a command that trains, and call `run` with those of `train`."""
    use_single_arena()
    parser = config_parser(module, doc)
    loop.add_options(parser)
    draft, arguments = parse_config(parser)
    config = resolve(draft)
    # Imported after parsing: --help and wrong arguments do not need the framework.
    from mooshak_jax.profile import prepare_profiler
    from mooshak_jax.step import cache_compilations

    cache_compilations()
    if arguments.profile:
        prepare_profiler()
    run(config, arguments.resume, arguments.profile, arguments.allow_data_change)


if __name__ == "__main__":
    main()
