"""Choice of the device that PyTorch computes on. Mirror: mooshak_jax/device.py."""

import torch

from mooshak.errors import InputError


def find_device(name: str | None) -> torch.device:
    """Return the device of a name: by default a GPU if there is one, else the CPU.

    gpu is cuda. Raises `InputError` if it is not available.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = name.partition(":")
    try:
        if kind not in ("cpu", "cuda", "gpu"):
            raise RuntimeError("PyTorch runs on cpu and cuda here")
        device = torch.device(":".join(filter(None, ({"gpu": "cuda"}.get(kind, kind), index))))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"device {name} is not available to PyTorch: {reason}") from error
    return device
