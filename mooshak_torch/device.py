"""Choice of the device that PyTorch computes on. Mirror: mooshak_jax/device.py."""

import torch

from mooshak.errors import InputError


def find_device(name: str | None) -> torch.device:
    """Return the device of a name: by default a GPU if there is one, else the CPU.

    Raises `InputError` if it is not available.
    """
    if name == "tpu":
        raise InputError("device tpu: PyTorch runs on cpu and cuda here; use mooshak_jax on TPUs")
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"device {name}: {str(error).splitlines()[0]}") from error
    return device
