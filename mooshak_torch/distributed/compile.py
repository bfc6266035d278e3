"""Compile the layers of a model with torch.compile."""

import os
import shutil

import torch

from mooshak.config.sections import Config
from mooshak.errors import InputError
from mooshak_torch.distributed.activation_checkpoint import disable_own_recompute
from mooshak_torch.model import Model


def apply_compile(model: Model, config: Config) -> None:
    """Compile each layer, in place: all have the same code, which is compiled once.

    Raises `InputError` where that is not possible.
    """
    if config.parallel.strategy == "deepspeed":
        raise InputError("train.compile does not go with parallel.strategy deepspeed; use fsdp")
    require_compiler("train.compile")
    for layer in disable_own_recompute(model):
        layer.forward = torch.compile(layer.forward)


def require_compiler(option: str) -> None:
    """Raise `InputError` where torch.compile has no C++ compiler to work with."""
    if not torch.cuda.is_available() and not shutil.which(os.environ.get("CXX", "g++")):
        raise InputError(f"{option} needs a C++ compiler (g++, or what CXX names)")
