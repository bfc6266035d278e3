"""Align a model with preference pairs in PyTorch: DPO and its relatives (docs/align.md).

python -m mooshak_torch.dpo --config configs/dpo-demo.yaml --init.from CHECKPOINT
torchrun --nproc-per-node 2 -m mooshak_torch.dpo --config configs/dpo-demo.yaml --init.from HF_DIR
"""

import os

from mooshak.checkpoints.init_from import resolve
from mooshak.config.parse import config_parser, parse_config
from mooshak.config.sections import Config, for_dpo
from mooshak.errors import command
from mooshak.training import loop
from mooshak.training.malloc import use_single_arena
from mooshak_torch.train import train


def dpo(
    config: Config, resume: str = "auto", profile: bool = False, allow_data_change: bool = False
) -> None:
    """Align a model in PyTorch; arguments and errors are those of `train`."""
    train(for_dpo(config), resume, profile, allow_data_change)


@command
def main() -> None:
    use_single_arena()
    # Grain imports JAX, which must not claim the GPU.
    os.environ["JAX_PLATFORMS"] = "cpu"
    parser = config_parser("mooshak_torch.dpo", __doc__)
    loop.add_options(parser)
    draft, arguments = parse_config(parser)
    dpo(resolve(draft), arguments.resume, arguments.profile, arguments.allow_data_change)


if __name__ == "__main__":
    main()
