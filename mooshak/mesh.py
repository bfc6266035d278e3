"""The mesh of devices, in one notation for both frameworks: `data=2,fsdp=2,tensor=2`.

`data` repeats the model, `fsdp` cuts its parameters and optimizer state (both cut the batch), and
`tensor` cuts heads, MLP width and vocabulary.
"""

import math
import re

from mooshak.errors import InputError

AXES = ("data", "fsdp", "tensor")


def mesh_sizes(text: str, n_devices: int, default: str = "data=-1") -> dict[str, int]:
    """The size of every axis; an axis that is not named has 1, and -1 takes what is left.

    `default` stands for an empty text. Raises `InputError` where the text is not a mesh, or the
    mesh does not divide the devices.
    """
    sizes = dict.fromkeys(AXES, 1) | parse_mesh(text or default)
    known = math.prod(size for size in sizes.values() if size > 0)
    if n_devices % known:
        shown = ",".join(f"{axis}={size}" for axis, size in parse_mesh(text or default).items())
        raise InputError(
            f"mesh {shown} does not divide the {n_devices} devices here; choose another --mesh, "
            "or --parallel.cpu_devices on a CPU"
        )
    return {axis: size if size > 0 else n_devices // known for axis, size in sizes.items()}


def parse_mesh(text: str) -> dict[str, int]:
    """`data=2,fsdp=-1` -> {"data": 2, "fsdp": -1}. Raises `InputError` for anything else."""
    sizes: dict[str, int] = {}
    for part in filter(None, text.split(",")):
        match = re.fullmatch(r"(\w+)=(-1|[1-9]\d*)", part.strip())
        if not match or match[1] not in AXES or match[1] in sizes:
            raise InputError(f"mesh {text!r}: expected axis=size with the axes {', '.join(AXES)}")
        sizes[match[1]] = int(match[2])
    if list(sizes.values()).count(-1) > 1:
        raise InputError(f"mesh {text!r}: only one axis may be -1")
    return sizes


def mesh_text(sizes: dict[str, int]) -> str:
    """A mesh in its notation: the axes with more than one device."""
    return ",".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1) or "data=1"
