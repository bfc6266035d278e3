"""Packages that a machine lacks, installed from a folder of wheels."""

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from mooshak.errors import InputError
from parity.accelerator.rows import Row


def install_missing(
    folder: Path, out: Path, environment: Mapping[str, str]
) -> tuple[dict[str, str], list[Row]]:
    """Install the wheels whose packages are missing into OUT/site.

    Returns the environment in which they are found, and a row for each. What is installed is never
    replaced. Raises `InputError` for a folder without wheels, or a wheel that does not fit.
    """
    wheels = sorted(folder.glob("*.whl"))
    if not wheels:
        raise InputError(f"{folder} has no wheels; scripts/collect_wheels.py collects them")
    missing = [wheel for wheel in wheels if not is_installed(package_name(wheel))]
    site = out / "site"
    if missing:
        words = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
        words += ["--disable-pip-version-check", "--upgrade", "--target", str(site)]
        done = subprocess.run([*words, *map(str, missing)], capture_output=True, encoding="utf-8")
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["no message"]
            raise InputError(f"pip cannot install the wheels of {folder}: {lines[-1]}")
    paths = [environment.get("PYTHONPATH", ""), str(site)]
    found = dict(environment) | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    return found, [Row(wheel.name, "installed from a wheel") for wheel in missing]


def package_name(wheel: Path) -> str:
    """Return the normalised name of a wheel's package (PEP 503)."""
    return re.sub(r"[-_.]+", "-", wheel.name.split("-")[0]).lower()


def is_installed(package: str) -> bool:
    """Return whether a package is installed, in any version."""
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True
