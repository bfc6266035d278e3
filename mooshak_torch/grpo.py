"""Train a model on its own sampled answers in PyTorch: GRPO and its relatives (docs/align.md).

python -m mooshak_torch.grpo --config configs/grpo-demo.yaml --init.from CHECKPOINT
torchrun --nproc-per-node 2 -m mooshak_torch.grpo --config configs/grpo-demo.yaml --init.from CKPT
"""

from mooshak.config.sections import Config, with_format
from mooshak.errors import command
from mooshak_torch.train import run_command, train


def grpo(
    config: Config, resume: str = "auto", profile: bool = False, allow_data_change: bool = False
) -> None:
    """Train a model on its samples in PyTorch; arguments and errors are those of `train`."""
    train(with_format(config, "prompts"), resume, profile, allow_data_change)


@command
def main() -> None:
    run_command("mooshak_torch.grpo", __doc__, grpo)


if __name__ == "__main__":
    main()
