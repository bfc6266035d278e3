"""Collect wheels of the packages that a machine with an accelerator lacks.

Such a machine often has PyTorch and JAX for its accelerator, but no access to a package index.
Downloads, for its Python and processor, the wheels of everything that this project needs and that
it does not have. Never downloads PyTorch, JAX or their libraries: those belong to the accelerator.

python scripts/collect_wheels.py --out wheels --python 3.12 --present freeze.txt

`freeze.txt` is the output of `python -m pip list --format=freeze` there; without it, everything
is collected.
"""

import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from mooshak.command_line import command_parser
from mooshak.errors import InputError, command

EXTRAS = ("", "jax", "hf")
"""Extras of this project that the accelerator report uses."""
OF_THE_ACCELERATOR = re.compile(r"(torch|triton|jax|jaxlib|libtpu|nvidia-.*|cuda-.*|jax-cuda.*)$")
MAX_MIB = 60
GLIBC = (17, 24, 27, 28, 31, 34)
"""Minor versions of glibc 2 whose wheels a machine of today runs."""


@command
def main() -> None:
    usage = "--out DIR [--python VERSION] [--present FILE] [--machine NAME]"
    parser = command_parser("scripts/collect_wheels.py", __doc__, usage)
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="folder of the wheels")
    add("--python", default="3.12", metavar="VERSION", help="Python of the machine")
    add("--machine", default="x86_64", metavar="NAME", help="processor of the machine")
    text = "packages that the machine has, as pip list --format=freeze prints them"
    add("--present", type=Path, metavar="FILE", help=text)
    args = parser.parse_args()
    present = packages_in(args.present) if args.present else set()
    wanted = sorted(name for name in needed("mooshak") if name not in present)
    args.out.mkdir(parents=True, exist_ok=True)
    download(wanted, args.out, args.python, args.machine)
    sizes = {wheel.name: wheel.stat().st_size / 2**20 for wheel in args.out.glob("*.whl")}
    total = sum(sizes.values())
    for name in sorted(sizes, key=lambda name: -sizes[name]):
        print(f"{sizes[name]:7.2f} MiB  {name}")
    print(f"{total:7.2f} MiB in {args.out}")
    if total > MAX_MIB:
        raise InputError(
            f"{total:.0f} MiB of wheels are more than {MAX_MIB}; list what the machine has with "
            "--present"
        )


def packages_in(path: Path) -> set[str]:
    """Return the normalised names of a `pip list --format=freeze`."""
    try:
        lines = path.read_text("utf-8").splitlines()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error
    names = (re.match(r"[A-Za-z0-9._-]+", line) for line in lines)
    return {normalised(name[0]) for name in names if name}


def needed(project: str) -> set[str]:
    """Return what the project needs, by the metadata of the packages that are installed here."""
    found: set[str] = set()
    pending = [(project, EXTRAS)]
    while pending:
        name, extras = pending.pop()
        for requirement in requirements(name, extras):
            child = normalised(requirement.name)
            if child not in found and not OF_THE_ACCELERATOR.match(child):
                found.add(child)
                pending.append((child, ("", *requirement.extras)))
    return found


def requirements(name: str, extras: tuple[str, ...]) -> Iterator[Requirement]:
    """Yield what a package and some of its extras require.

    Raises `InputError` if the package is not installed here.
    """
    try:
        texts = metadata.requires(name) or []
    except metadata.PackageNotFoundError as error:
        raise InputError(f"{name} is not installed here; run make setup") from error
    for requirement in map(Requirement, texts):
        marker = requirement.marker
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in extras):
            yield requirement


def normalised(name: str) -> str:
    """Return the name of a package as PEP 503 compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def download(names: list[str], out: Path, python: str, machine: str) -> None:
    """Download the wheel of each package, in the version that is installed here."""
    platforms = [f"manylinux_2_{minor}_{machine}" for minor in GLIBC]
    platforms += [f"manylinux2014_{machine}", f"manylinux1_{machine}"]
    words = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    words += ["--disable-pip-version-check", "--only-binary=:all:", "--dest", str(out)]
    words += ["--python-version", python, "--implementation", "cp"]
    words += [word for platform in platforms for word in ("--platform", platform)]
    versions = [f"{name}=={metadata.version(name)}" for name in names]
    if versions and subprocess.run([*words, *versions]).returncode:
        raise InputError("pip could not download every wheel; see above")


if __name__ == "__main__":
    main()
