"""Compile the layers of a model with torch.compile."""

import os
import shutil

import torch

from mooshak.config.sections import Config
from mooshak.errors import InputError
from mooshak_torch.distributed.activation_checkpoint import disable_own_recompute
from mooshak_torch.model import Model


def apply_compile(model: Model, config: Config) -> None:
    """Compile the layers in place; they share their code, which is compiled once.

    Raises `InputError` with DeepSpeed, or without a C++ compiler.
    """
    if config.parallel.strategy == "deepspeed":
        raise InputError("train.compile does not work with parallel.strategy deepspeed; use fsdp")
    require_compiler("train.compile")
    for layer in disable_own_recompute(model):
        layer.forward = torch.compile(layer.forward)


def require_compiler(option: str) -> None:
    """Raise `InputError` if torch.compile has no C++ compiler."""
    if not torch.cuda.is_available() and not shutil.which(os.environ.get("CXX", "g++")):
        raise InputError(f"{option} needs a C++ compiler: g++, or the one that CXX names")
