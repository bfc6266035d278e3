"""Align a model with preference pairs in JAX: DPO and its relatives (docs/align.md).

python -m mooshak_jax.dpo --config configs/dpo-demo.yaml --init.from CHECKPOINT
python -m mooshak_jax.dpo --config configs/dpo-demo.yaml --init.from HF_DIR --mesh data=2,fsdp=2
"""

from mooshak.config.sections import Config, with_format
from mooshak.errors import command
from mooshak_jax.train import run_command, train


def dpo(
    config: Config, resume: str = "auto", profile: bool = False, allow_data_change: bool = False
) -> None:
    """Align a model in JAX; arguments and errors are those of `train`."""
    train(with_format(config, "preferences"), resume, profile, allow_data_change)


@command
def main() -> None:
    run_command("mooshak_jax.dpo", __doc__, dpo)


if __name__ == "__main__":
    main()
