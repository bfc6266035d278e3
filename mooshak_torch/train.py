"""Train the model in PyTorch: from the start, or from the newest checkpoint of the run.

python -m mooshak_torch.train --config configs/demo.yaml
torchrun --nproc-per-node 2 -m mooshak_torch.train --config configs/demo.yaml
"""

import os
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
    """Train a model in PyTorch; arguments and errors are those of `mooshak.training.loop.train`."""
    from mooshak_torch.step import Trainer

    loop.train(config, Trainer(config), resume, profile, allow_data_change)


@command
def main() -> None:
    run_command("mooshak_torch.train", __doc__, train)


def run_command(module: str, doc: str | None, run: Callable[..., None]) -> None:
    """Parse the arguments of a command that trains, and call `run` with those of `train`."""
    use_single_arena()
    # Grain imports JAX, which must not claim the GPU.
    os.environ["JAX_PLATFORMS"] = "cpu"
    parser = config_parser(module, doc)
    loop.add_options(parser)
    draft, arguments = parse_config(parser)
    run(resolve(draft), arguments.resume, arguments.profile, arguments.allow_data_change)


if __name__ == "__main__":
    main()
