"""What one process of a torchrun does in the tests: a list of training runs, one after the other.

Processes take seconds to start; a run of the tiny model takes less. Results are left in a file.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"  # Grain imports JAX.
os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"  # Every run meets at a port of its own.

import torch
import torch.distributed as dist

import mooshak_torch.train
from mooshak import config as configuration
from mooshak.config import Config
from mooshak.errors import InputError
from mooshak_torch.model import local_part
from mooshak_torch.optimizer import make_optimizer, moments
from mooshak_torch.parallel import make_parallel
from mooshak_torch.train import make_objective, model_of, train


def main(runs: Path) -> None:
    torch.set_num_threads(1)
    results = []
    for number, (port, do, argv) in enumerate(json.loads(runs.read_text())):
        os.environ["MASTER_PORT"] = str(port)
        if "deepspeed" in argv:
            stay_together()
        config = configuration.load(argv[0], argv[1:])
        try:
            results.append(DO[do](config))
        except InputError as error:
            results.append(str(error))
        print(number, argv[1:], flush=True)
    rank = os.environ["RANK"]
    runs.with_name(f"{runs.stem}-{rank}.json").write_text(json.dumps(results))


def absent(config: Config) -> None:
    """A run whose second process stays away from the first step for longer than the timeout."""
    if os.environ["RANK"] == "1":
        step = mooshak_torch.train.train_step
        mooshak_torch.train.train_step = lambda *args: time.sleep(8) or step(*args)
    train(config)


def stay_together() -> None:
    """From now on one process group for all runs: DeepSpeed keeps the first that it sees."""
    join = dist.init_process_group
    dist.init_process_group = lambda *args, **options: (
        None if dist.is_initialized() else join(*args, **options)
    )
    dist.destroy_process_group = lambda: None


def held_bytes(config: Config) -> dict[str, Any]:
    """Bytes of parameters, gradients and optimizer state on this process."""
    parallel = make_parallel(config)
    model = model_of(parallel.wrap(make_objective(config.model, config), config))
    optimizer = make_optimizer(model, config.optimizer)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    state = moments(model, optimizer)
    tensors = {
        "parameters": list(model.parameters()),
        "gradients": [p.grad for p in model.parameters() if p.grad is not None],
        "optimizer": [tensor for part in state.values() for tensor in part.values()],
    }
    parallel.close()
    return {what: sum(local_part(t)[0].nbytes for t in held) for what, held in tensors.items()}


DO = {"train": train, "hold": held_bytes, "absent": absent}

if __name__ == "__main__":
    main(Path(sys.argv[1]))
