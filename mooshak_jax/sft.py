"""Fine-tune a model on conversations in JAX (SFT): the loss is that of the answers.

python -m mooshak_jax.sft --config configs/sft-demo.yaml --init.from CHECKPOINT
python -m mooshak_jax.sft --config configs/sft-demo.yaml --init.from HF_DIR --mesh data=2,fsdp=2
"""

from mooshak.config.sections import Config, with_format
from mooshak.errors import command
from mooshak_jax.train import run_command, train


def sft(
    config: Config, resume: str = "auto", profile: bool = False, allow_data_change: bool = False
) -> None:
    """Fine-tune a model in JAX; arguments and errors are those of `train`."""
    train(with_format(config, "conversations"), resume, profile, allow_data_change)


@command
def main() -> None:
    run_command("mooshak_jax.sft", __doc__, sft)


if __name__ == "__main__":
    main()
