"""Fine-tune a model on conversations in PyTorch (SFT): the loss is that of the answers.

python -m mooshak_torch.sft --config configs/sft-demo.yaml --init.from CHECKPOINT
torchrun --nproc-per-node 2 -m mooshak_torch.sft --config configs/sft-demo.yaml --init.from HF_DIR
"""

from mooshak.config.sections import Config, with_format
from mooshak.errors import command
from mooshak_torch.train import run_command, train


def sft(
    config: Config, resume: str = "auto", profile: bool = False, allow_data_change: bool = False
) -> None:
    """Fine-tune a model in PyTorch; arguments and errors are those of `train`."""
    train(with_format(config, "conversations"), resume, profile, allow_data_change)


@command
def main() -> None:
    run_command("mooshak_torch.sft", __doc__, sft)


if __name__ == "__main__":
    main()
