"""Check that a mesh divides the model and the batch."""

from collections.abc import Mapping

from mooshak.config.model import ModelConfig
from mooshak.config.sections import Config
from mooshak.errors import InputError


def check_tensor_axis(model: ModelConfig, sizes: Mapping[str, int]) -> None:
    """Raise `InputError` unless the axis tensor divides the model's heads, MLP and vocabulary."""
    for key, width in (
        ("n_kv_heads", model.G),
        ("hidden_dim", model.hidden_dim),
        ("vocab_size", model.vocab_size),
    ):
        if width % sizes["tensor"]:
            raise InputError(f"model.{key} {width} is not divisible by tensor={sizes['tensor']}")


def check_mesh(config: Config, sizes: dict[str, int]) -> None:
    """Raise `InputError` unless the mesh divides the batch and the model's widths."""
    train, model = config.train, config.model
    n_shards = sizes["data"] * sizes["fsdp"]
    if train.batch_size % (n_shards * train.gradient_accumulation_steps):
        raise InputError(
            f"train.batch_size {train.batch_size} is not divisible by mesh data={sizes['data']} x "
            f"fsdp={sizes['fsdp']} x train.gradient_accumulation_steps "
            f"{train.gradient_accumulation_steps}"
        )
    check_tensor_axis(model, sizes)
    if config.parallel.sequence_parallel and config.T % sizes["tensor"]:
        raise InputError(
            f"parallel.sequence_parallel: {config.T} tokens are not divisible by "
            f"tensor={sizes['tensor']}"
        )
