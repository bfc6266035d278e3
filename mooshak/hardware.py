"""Peak figures of accelerators from their data sheets, for MFU and for the planners.

FLOP/s are dense bf16 with float32 accumulation. Bandwidths are bytes per second of one device in
one direction: data sheets of NVLink, and newer ones of ICI, sum both directions and are halved.
"""

import re
from dataclasses import dataclass

from mooshak.errors import InputError

NVIDIA = "https://www.nvidia.com/en-us/data-center/"
CLOUD_TPU = "https://cloud.google.com/tpu/docs/"


@dataclass(frozen=True)
class Device:
    """An accelerator: a GPU, or a TPU chip."""

    kind: str
    """Regular expression of `torch.cuda.get_device_name()`, or of JAX's `device_kind`."""
    flops: float
    """FLOP/s of dense bf16 matrix products."""
    memory: float
    """Bytes of device memory."""
    memory_bandwidth: float
    """Bytes per second between the device and its memory."""
    link: float
    """Bytes per second to devices of the same node (NVLink, PCIe), or over one ICI link."""
    network: float
    """Bytes per second to devices of other nodes or slices, for each device of a usual host."""
    per_node: int
    """Devices per node (GPU) or host (TPU)."""
    source: str
    """Source of the figures."""
    torus: int = 0
    """TPU: dimensions of the torus, with two links in each."""
    wrap: int = 0
    """TPU: a slice axis has wraparound links if its size is a multiple of this."""


DEVICES = {
    "b200-180g": Device(
        "B200", 2250e12, 180e9, 8.0e12, 900e9, 50e9, 8, NVIDIA + "dgx-b200/ (data sheet)"
    ),
    "h200-141g": Device("H200", 989e12, 141e9, 4.8e12, 450e9, 50e9, 8, NVIDIA + "h200/"),
    "h100-80g": Device("H100", 989e12, 80e9, 3.35e12, 450e9, 50e9, 8, NVIDIA + "h100/ (SXM)"),
    "a100-80g": Device(
        "A100-SXM4-80GB", 312e12, 80e9, 2.039e12, 300e9, 25e9, 8, NVIDIA + "a100/ (SXM)"
    ),
    "a100-40g": Device("A100", 312e12, 40e9, 1.555e12, 300e9, 25e9, 8, NVIDIA + "a100/ (SXM)"),
    "l40s-48g": Device("L40S", 362e12, 48e9, 0.864e12, 32e9, 12.5e9, 8, NVIDIA + "l40s/"),
    "l4-24g": Device("L4", 121e12, 24e9, 0.300e12, 32e9, 12.5e9, 8, NVIDIA + "l4/"),
    "a10-24g": Device("A10", 125e12, 24e9, 0.600e12, 32e9, 12.5e9, 8, NVIDIA + "products/a10-gpu/"),
    "4090-24g": Device(
        "RTX 4090",
        165.2e12,
        24e9,
        1.008e12,
        32e9,
        3.125e9,
        8,
        "https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf",
    ),
    "v6e": Device(
        "TPU v6 lite", 918e12, 32 * 2**30, 1.6e12, 100e9, 12.5e9, 8, CLOUD_TPU + "v6e", 2, 16
    ),
    "v5p": Device(
        r"TPU v5p?", 459e12, 95 * 2**30, 2.765e12, 100e9, 6.25e9, 4, CLOUD_TPU + "v5p", 3, 4
    ),
    "v5e": Device(
        "TPU v5 lite", 197e12, 16 * 2**30, 0.819e12, 50e9, 3.125e9, 8, CLOUD_TPU + "v5e", 2, 16
    ),
    "v4": Device("TPU v4", 275e12, 32 * 2**30, 1.2e12, 50e9, 6.25e9, 4, CLOUD_TPU + "v4", 3, 4),
}
"""Name in the options of the planners -> figures. Networks: 400 Gbit/s per GPU in DGX H100, B200,
200 Gbit/s in DGX A100, a 100 Gbit/s network card per PCIe GPU in servers, 25 Gbit/s per GeForce;
TPU hosts have 200 (v4, v5p), 200 (v5e) and 800 (v6e) Gbit/s for 4, 8 and 8 chips."""


def device(name: str) -> Device:
    """Return the device of a name. Raises `InputError`, with the known names, if it is unknown."""
    if name not in DEVICES:
        raise InputError(f"no figures for {name!r}; known are {', '.join(DEVICES)}")
    return DEVICES[name]


def peak_flops(kind: str) -> float | None:
    """Return the FLOP/s of the device that the driver calls `kind`; None if it is unknown."""
    name = device_name(kind)
    return DEVICES[name].flops if name else None


def device_name(kind: str) -> str | None:
    """Return our name of the device that the driver calls `kind`; None if it is unknown."""
    known = [name for name, d in DEVICES.items() if re.search(rf"\b{d.kind}\b", kind)]
    return max(known, key=lambda name: len(DEVICES[name].kind)) if known else None
