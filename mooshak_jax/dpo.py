"""Align a model with preference pairs in JAX: DPO and its relatives (docs/align.md).

python -m mooshak_jax.dpo --config configs/dpo-demo.yaml --init.from CHECKPOINT
python -m mooshak_jax.dpo --config configs/dpo-demo.yaml --init.from HF_DIR --mesh data=2,fsdp=2
"""

from mooshak.checkpoints.init_from import resolve
from mooshak.config.parse import config_parser, parse_config
from mooshak.config.sections import Config, for_dpo
from mooshak.errors import command
from mooshak.training import loop
from mooshak.training.malloc import use_single_arena
from mooshak_jax.train import train


def dpo(
    config: Config, resume: str = "auto", profile: bool = False, allow_data_change: bool = False
) -> None:
    """Align a model in JAX; arguments and errors are those of `train`."""
    train(for_dpo(config), resume, profile, allow_data_change)


@command
def main() -> None:
    use_single_arena()
    parser = config_parser("mooshak_jax.dpo", __doc__)
    loop.add_options(parser)
    draft, arguments = parse_config(parser)
    config = resolve(draft)
    # Imported after parsing: --help and wrong arguments do not need the framework.
    from mooshak_jax.profile import prepare_profiler
    from mooshak_jax.step import cache_compilations

    cache_compilations()
    if arguments.profile:
        prepare_profiler()
    dpo(config, arguments.resume, arguments.profile, arguments.allow_data_change)


if __name__ == "__main__":
    main()
