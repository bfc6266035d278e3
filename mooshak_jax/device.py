"""Choice of the device that JAX computes on. Mirror: mooshak_torch/device.py."""

from typing import Any

import jax

from mooshak.errors import InputError


def find_devices(name: str | None) -> list[Any]:
    """Return the devices of a platform: cpu, cuda (or gpu), tpu; by default the best platform.

    Raises `InputError` if it is not available.
    """
    try:
        return list(jax.devices(name))
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"device {name} is not available to JAX: {reason}") from error
