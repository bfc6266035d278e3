"""Train a model on its own sampled answers in JAX: GRPO and its relatives (docs/align.md).

python -m mooshak_jax.grpo --config configs/grpo-demo.yaml --init.from CHECKPOINT
python -m mooshak_jax.grpo --config configs/grpo-demo.yaml --init.from CHECKPOINT --mesh data=2
"""

from mooshak.config.sections import Config, with_format
from mooshak.errors import command
from mooshak_jax.train import run_command, train


def grpo(
    config: Config, resume: str = "auto", profile: bool = False, allow_data_change: bool = False
) -> None:
    """Train a model on its samples in JAX; arguments and errors are those of `train`."""
    train(with_format(config, "prompts"), resume, profile, allow_data_change)


@command
def main() -> None:
    run_command("mooshak_jax.grpo", __doc__, grpo)


if __name__ == "__main__":
    main()
