"""The process of one part of the accelerator report: prints its rows as lines of JSON.

python -m parity.accelerator.worker PART SETUP_AS_JSON

The part `devices` prints the devices of PyTorch and of JAX instead.
"""

import json
import os
import sys
import traceback
from dataclasses import asdict
from pathlib import Path

from parity.accelerator.parts import PARTS
from parity.accelerator.rows import Row, Setup, reason


def main() -> None:
    name, values = sys.argv[1], json.loads(sys.argv[2])
    # Output of libraries must not mix with the rows.
    answers = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)
    if name == "devices":
        from mooshak.errors import InputError
        from parity.accelerator.machine import find_devices

        try:
            answers.write(json.dumps(find_devices(values["wanted"])) + "\n")
        except InputError as error:
            answers.write(json.dumps({"error": str(error)}) + "\n")
        return
    setup = Setup(**values | {"out": Path(values["out"])})
    (part,) = (part for part in PARTS if part.name == name)
    try:
        for row in part.load()(setup):
            answers.write(json.dumps(asdict(row)) + "\n")
    except Exception as error:
        traceback.print_exc()
        answers.write(json.dumps(asdict(Row(part.title, reason(error), passed=False))) + "\n")


if __name__ == "__main__":
    main()
