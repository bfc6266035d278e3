"""Plan training on a TPU slice that is not present: memory, traffic and the bottleneck of a step.

The train step is compiled for the slice by the TPU's own compiler (libtpu, extra `tpu`).

python -m mooshak_jax.plan --config configs/mooshak-2b.yaml --topology v5e:4x4 --mesh fsdp=16
python -m mooshak_jax.plan --config configs/mooshak-2b.yaml --topology v5p:4x4x4 --sweep
"""

from mooshak.checkpoints.init_from import resolve
from mooshak.config.parse import config_parser, parse_config
from mooshak.errors import command
from mooshak.plan import add_output_options, print_plans

USAGE = "--config FILE [--topology KIND:SHAPE] [--mesh MESH | --sweep] [--section.key VALUE ...]"


@command
def main() -> None:
    parser = config_parser("mooshak_jax.plan", __doc__, USAGE)
    text = "TPU slice: v4, v5e, v5p or v6e, and its shape in chips"
    parser.add_argument("--topology", default="v5e:4x4", metavar="KIND:SHAPE", help=text)
    add_output_options(parser, "mesh")
    draft, arguments = parse_config(parser)
    config, topology = resolve(draft), arguments.topology
    # Imported after parsing: --help and wrong arguments do not need the framework.
    import jax

    from mooshak_jax.planner import plan, sweep

    # A program compiled for a machine that is not present cannot be read back from the cache.
    jax.config.update("jax_enable_compilation_cache", False)
    plans = sweep(config, topology) if arguments.sweep else [plan(config, topology)]
    print_plans(plans, config, arguments)


if __name__ == "__main__":
    main()
