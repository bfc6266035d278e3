"""Notation of a device mesh in both frameworks: `data=2,fsdp=2,tensor=2`.

`data` replicates the model, `fsdp` shards its parameters and optimizer state, and both shard the
batch; `tensor` shards heads, MLP width and vocabulary.
"""

import math
import re
from collections.abc import Mapping

from mooshak.errors import InputError

AXES = ("data", "fsdp", "tensor")


def mesh_sizes(text: str, n_devices: int) -> dict[str, int]:
    """Return the size of every axis: 1 for an axis that is not named; -1 is all remaining devices.

    An empty text is `data=-1`. Raises `InputError` if the text is not a mesh, or the
    mesh does not divide the devices.
    """
    sizes = dict.fromkeys(AXES, 1) | parse_mesh(text or "data=-1")
    known = math.prod(size for size in sizes.values() if size > 0)
    if n_devices % known:
        shown = ",".join(f"{axis}={size}" for axis, size in parse_mesh(text).items())
        raise InputError(
            f"mesh {shown} does not divide the {n_devices} devices here; choose another mesh, or "
            "more devices (JAX on a CPU: --parallel.cpu_devices, or jax_num_cpu_devices in Python)"
        )
    return {axis: size if size > 0 else n_devices // known for axis, size in sizes.items()}


def parse_mesh(text: str) -> dict[str, int]:
    """Parse `data=2,fsdp=-1` into {"data": 2, "fsdp": -1}. Raises `InputError` for another text."""
    sizes: dict[str, int] = {}
    for part in filter(None, text.split(",")):
        match = re.fullmatch(r"(\w+)=(-1|[1-9]\d*)", part.strip())
        if not match or match[1] not in AXES or match[1] in sizes:
            raise InputError(f"mesh {text!r}: expected axis=size with the axes {', '.join(AXES)}")
        sizes[match[1]] = int(match[2])
    if list(sizes.values()).count(-1) > 1:
        raise InputError(f"mesh {text!r}: only one axis may be -1")
    return sizes


def mesh_text(sizes: Mapping[str, int]) -> str:
    """Return a mesh in its notation: the axes of size > 1, or `data=1`."""
    return ",".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1) or "data=1"
