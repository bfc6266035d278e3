"""The option `--device` of the commands: the CPU, a CUDA GPU or a TPU."""

import argparse
import os
from collections.abc import Mapping

NAMES = ("cpu", "cuda", "tpu")


def add_device_option(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    """Add `--device`. Without a default, the command runs on the best device that it finds."""
    text = "device that computes" + ("" if default else " (default: the best one found)")
    names = "cpu|cuda|tpu"
    parser.add_argument("--device", choices=NAMES, default=default, metavar=names, help=text)


def restrict_to(device: str | None) -> None:
    """Restrict both frameworks to a device, in this process and its children.

    Call it before a framework is imported; the framework's own `device` module then checks that
    the device is there. Nothing changes without a device.
    """
    os.environ.update(device_environment(device))


def device_environment(device: str | None) -> Mapping[str, str]:
    """Return the environment variables that restrict both frameworks to a device.

    JAX retains the CPU as its second platform. On TPUs PyTorch runs on the CPU.
    """
    if device is None:
        return {}
    hidden = {} if device == "cuda" else {"CUDA_VISIBLE_DEVICES": ""}
    return hidden | {"JAX_PLATFORMS": "cpu" if device == "cpu" else f"{device},cpu"}
