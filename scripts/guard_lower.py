"""Write the lowered train step of JAX for configuration files: FILE.yaml -> FILE.mlir.

    python scripts/guard_lower.py FILE.yaml ...

scripts/guard.py starts this in the tree of each revision. It is the only code of the guard that
imports from that tree: functions are looked up by name in its sources, wherever they stand.
"""

import importlib
import re
import sys
from pathlib import Path
from typing import Any


def find(files: str, *names: str) -> Any:
    """Import the first of these functions that a file of the tree defines."""
    for name in names:
        for file in sorted(Path.cwd().glob(files)):
            if re.search(rf"^def {name}\(", file.read_text("utf-8"), re.MULTILINE):
                module = ".".join(file.relative_to(Path.cwd()).with_suffix("").parts)
                return getattr(importlib.import_module(module), name)
    sys.exit(
        f"{files} defines none of {', '.join(names)}; name what does in scripts/guard_lower.py"
    )


def strip_names(text: str) -> str:
    """Return StableHLO with functions numbered, without locations or the names of results."""
    text = re.sub(r"^#loc.*\n| loc\(.*\)$", "", text, flags=re.MULTILINE)
    text = re.sub(r'(?<=^module )@\S+|jax\.result_info = "[^"]*"', "", text, flags=re.MULTILINE)
    functions = re.findall(r"^ *func\.func (?:\w+ )?@([\w.$-]+)", text, re.MULTILINE)
    numbers = {name: f"f{number}" for number, name in enumerate(functions)}
    # Other symbols, such as the target of a custom call, are part of the function.
    return re.sub(r"@([\w.$-]+)", lambda match: f"@{numbers.get(match[1], match[1])}", text)


def main() -> None:
    # In each call today's name comes first, then those of older trees.
    load_config = find("mooshak/**/*.py", "load_config", "load")
    set_matmul_precision = find("mooshak_jax/**/*.py", "set_matmul_precision", "precise")
    make_parallel = find("mooshak_jax/**/*.py", "make_parallel")
    lowered = find("mooshak_jax/plan*.py", "lowered")
    for file in map(Path, sys.argv[1:]):
        config = load_config(file)
        parallel = make_parallel(config)
        set_matmul_precision(config)
        file.with_suffix(".mlir").write_text(
            strip_names(lowered(config, parallel).as_text()), "utf-8"
        )


if __name__ == "__main__":
    main()
