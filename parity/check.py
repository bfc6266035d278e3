"""Prove that the PyTorch and the JAX model are the same function.

SOURCE is a checkpoint of any format, or a configuration (*.yaml), whose model then gets random
weights and gains, which make faults visible. With OTHER, PyTorch computes with the weights of
SOURCE and JAX with those of OTHER. docs/parity.md explains the lines and their bounds.

python -m parity.check configs/demo.yaml
python -m parity.check runs/demo/back-in-torch runs/demo/jax/checkpoints/1200 --out report
"""

import os
import sys
from pathlib import Path

from mooshak.command_line import command_parser
from mooshak.device import add_device_option, restrict_to
from mooshak.errors import command

USAGE = "SOURCE [OTHER] [--device cpu|cuda|tpu] [--out DIR] [--quick]"


@command
def main() -> None:
    parser = command_parser("parity.check", __doc__, USAGE)
    add = parser.add_argument
    add("source", type=Path, metavar="SOURCE", help="checkpoint of any format, or a *.yaml")
    add("other", type=Path, nargs="?", metavar="OTHER", help="checkpoint that JAX computes with")
    add("--out", type=Path, metavar="DIR", help="write report.json, report.md and report.html here")
    text = "skip bfloat16, negative controls, noise floors of float64, meshes and processes"
    add("--quick", action="store_true", help=text)
    add_device_option(parser, default="cpu")
    args = parser.parse_args()
    restrict_to(args.device)  # Also the processes of torchrun.
    # Both frameworks share the memory of a GPU.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    # After the arguments: --help and a typo need no framework.
    import jax

    from mooshak_jax.step import cache_compilations
    from parity.checker import run
    from parity.layouts import N_DEVICES

    # JAX is imported by now: it does not read the environment variable again.
    jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])
    jax.config.update("jax_num_cpu_devices", N_DEVICES)
    cache_compilations()
    failed, lines = run(args.source, args.other, args.out, args.quick, args.device)
    if failed:
        where = f"; first difference: {failed[0].where}" if failed[0].where else ""
        print(f"{len(failed)} of {len(lines)} lines failed: {failed[0].name}{where}")
        sys.exit(1)


if __name__ == "__main__":
    main()
