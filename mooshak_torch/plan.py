"""Plan training on GPUs that are not present: memory, traffic and the bottleneck of a step.

python -m mooshak_torch.plan --config configs/mooshak-2b.yaml --gpus 8 --gpu h100-80g --strategy ddp
python -m mooshak_torch.plan --config configs/mooshak-2b.yaml --gpus 64 --sweep --plot plan.svg
"""

from mooshak.checkpoints.init_from import resolve
from mooshak.config.parse import config_parser, parse_config
from mooshak.errors import InputError, command
from mooshak.hardware import DEVICES
from mooshak.plan import STRATEGIES, add_output_options, print_plans

USAGE = "--config FILE [--gpus N] [--gpu GPU] [--strategy NAME] [--sweep] [--section.key VALUE ...]"


@command
def main() -> None:
    parser = config_parser("mooshak_torch.plan", __doc__, USAGE)
    parser.add_argument("--gpus", type=int, default=8, help="number of GPUs")
    gpus = ", ".join(name for name, device in DEVICES.items() if not device.torus)
    parser.add_argument("--gpu", default="h100-80g", metavar="GPU", help=f"one of {gpus}")
    text = "DDP, FSDP2, HSDP (FSDP2 within a node) or DeepSpeed ZeRO stage 1, 2, 3"
    parser.add_argument("--strategy", choices=list(STRATEGIES), default="fsdp", help=text)
    add_output_options(parser, "strategy")
    draft, arguments = parse_config(parser)
    config = resolve(draft)
    if arguments.gpus < 1:
        raise InputError(f"--gpus must be at least 1, not {arguments.gpus}")
    # Imported after parsing: --help and wrong arguments do not need the framework.
    from mooshak_torch.planner import plan, sweep

    if arguments.sweep:
        plans = sweep(config, arguments.gpu, arguments.gpus)
    else:
        plans = [plan(config, arguments.gpu, arguments.gpus, arguments.strategy)]
    print_plans(plans, config, arguments)


if __name__ == "__main__":
    main()
