"""Align a model with preference pairs in PyTorch: DPO and its relatives (docs/align.md).

python -m mooshak_torch.dpo --config configs/dpo-demo.yaml --init.from CHECKPOINT
torchrun --nproc-per-node 2 -m mooshak_torch.dpo --config configs/dpo-demo.yaml --init.from HF_DIR
"""

from mooshak.config.sections import Config, with_format
from mooshak.errors import command
from mooshak_torch.train import run_command, train


def dpo(
    config: Config, resume: str = "auto", profile: bool = False, allow_data_change: bool = False
) -> None:
    """Align a model in PyTorch; arguments and errors are those of `train`."""
    train(with_format(config, "preferences"), resume, profile, allow_data_change)


@command
def main() -> None:
    run_command("mooshak_torch.dpo", __doc__, dpo)


if __name__ == "__main__":
    main()
