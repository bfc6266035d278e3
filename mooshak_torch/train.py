"""Train the model in PyTorch.

python -m mooshak_torch.train --config configs/demo.yaml
torchrun --nproc-per-node 2 -m mooshak_torch.train --config configs/demo.yaml
"""

import os

from mooshak.checkpoints.init_from import resolve
from mooshak.config.parse import config_parser, parse_config
from mooshak.config.sections import Config
from mooshak.errors import command
from mooshak.training import loop
from mooshak.training.malloc import use_single_arena


def train(config: Config, resume: str = "auto", profile: bool = False) -> None:
    """Train a model as `mooshak.training.loop.train` does, in PyTorch."""
    from mooshak_torch.step import Trainer

    loop.train(config, Trainer(config), resume, profile)


@command
def main() -> None:
    use_single_arena()
    # Grain imports JAX, which must not take hold of the GPU here.
    os.environ["JAX_PLATFORMS"] = "cpu"
    parser = config_parser(__doc__.split("\n")[0])
    parser.add_argument("--resume", default="auto", help="auto, never, or a checkpoint's directory")
    parser.add_argument("--profile", action="store_true", help="trace the third step")
    draft, arguments = parse_config(parser)
    train(resolve(draft), arguments.resume, arguments.profile)


if __name__ == "__main__":
    main()
