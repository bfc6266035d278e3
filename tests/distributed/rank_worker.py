"""Worker process of the torch tests: runs the functions named on its standard input.

Processes take seconds to start; a run of the tiny model takes less. A line asks for one: what to
do, a configuration's arguments, paths, and the variables that torchrun would set. A line answers.
"""

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

import mooshak_torch.decode
import mooshak_torch.objectives
import mooshak_torch.step
import mooshak_torch.train
from mooshak.checkpoints import formats
from mooshak.config.parse import dump_config, load_config
from mooshak.config.sections import Config
from mooshak.data.packing import Batch
from mooshak.errors import InputError, PeerError
from mooshak_torch.checkpoint import open_checkpoint, restore
from mooshak_torch.decode import generate
from mooshak_torch.distributed.deepspeed import ZeroOptimizer
from mooshak_torch.distributed.mesh import make_parallel
from mooshak_torch.objectives import model_of
from mooshak_torch.ops import matmul
from mooshak_torch.optimizer import LossScale, Optimizer
from mooshak_torch.params import local_shard
from mooshak_torch.step import make_state, train_step
from mooshak_torch.train import train

os.environ["JAX_PLATFORMS"] = "cpu"  # Grain imports JAX.


def main() -> None:
    torch.set_num_threads(1)
    # What the runs print goes to standard error.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.stdout.reconfigure(line_buffering=True)
    for line in sys.stdin:
        do, argv, paths, place = json.loads(line)
        os.environ |= place
        try:
            config = load_config(argv[0], argv[1:])
            answer = {"result": DO[do](config, *map(Path, paths))}
        except Exception:
            answer = {"failed": traceback.format_exc()}
        forget_processes()
        print(json.dumps(answer), file=answers, flush=True)


def forget_processes() -> None:
    """Leave the process group, of which DeepSpeed keeps the first that it sees."""
    if dist.is_initialized():
        dist.destroy_process_group()
    if "deepspeed" in sys.modules:
        from deepspeed.comm import comm
        from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
        from deepspeed.runtime.zero.partition_parameters import Init
        from deepspeed.utils import groups

        comm.cdb = None
        groups._release_process_group_references()
        # It numbers parameters and modules through, and wants the same numbers in all processes.
        Init.param_id = 0
        DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__[0][0] = 0


def trained(config: Config) -> dict[str, int]:
    """Train; returns what this process holds before it updates the parameters, in bytes."""
    held: dict[str, int] = {}

    def make(*args: Any) -> Any:
        objective, optimizer = make_state(*args)
        step = optimizer.step

        def measured_step(rate: float) -> None:
            held.update(holds(objective, optimizer))
            step(rate)

        optimizer.step = measured_step
        return objective, optimizer

    with mock.patch.object(mooshak_torch.step, "make_state", make):
        train(config)
    return held


def holds(objective: nn.Module, optimizer: Optimizer | ZeroOptimizer) -> dict[str, int]:
    """Bytes of the storages of parameters, gradients and optimizer state."""
    parameters = list(objective.parameters())
    tensors = {
        "parameters": [local_shard(p)[0] for p in parameters],
        "gradients": [local_shard(p.grad)[0] for p in parameters if p.grad is not None],
    }
    if isinstance(optimizer, ZeroOptimizer):
        engine = optimizer.engine.optimizer
        tensors["parameters"] += [p.ds_tensor for p in parameters if hasattr(p, "ds_tensor")]
        averaged = [g for group in engine.averaged_gradients.values() for g in group or ()]
        tensors["gradients"] += averaged
        state = [*optimizer.flats, *_values(engine.optimizer)]
    else:
        state = _values(optimizer.inner)
    tensors["optimizer"] = [local_shard(tensor)[0] for tensor in state if tensor.ndim]
    seen: set[int] = set()
    return {what: sum(_new_bytes(t, seen) for t in those) for what, those in tensors.items()}


def _values(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [value for state in optimizer.state.values() for value in state.values()]


def _new_bytes(tensor: Tensor, seen: set[int]) -> int:
    storage = tensor.untyped_storage()
    if storage.data_ptr() in seen:
        return 0
    seen.add(storage.data_ptr())
    return storage.nbytes()


def generating(config: Config) -> list[bool]:
    """Train, and generate after the second step; says of each generation if weights were packed."""
    packed: list[bool] = []
    steps = 0

    def pack(model: nn.Module, *args: Any) -> nn.Module:
        decoder = matmul.pack_weights_for_decode(model, *args)
        packed.append(decoder is not model)
        return decoder

    def step(objective: nn.Module, *args: Any) -> Any:
        nonlocal steps
        result = train_step(objective, *args)
        steps += 1
        if steps == 2:
            before = layouts(objective)
            for module in (shards := [m for m in objective.modules() if isinstance(m, FSDPModule)]):
                module.unshard()
            # Only here: on an Intel CPU it would change the products of training, too.
            with mock.patch.object(matmul, "ONEDNN", torch.backends.mkldnn.is_available()):
                generate(model_of(objective), [[1, 2, 3], [4], [5], [6, 7]], 20)
            for module in shards:
                module.reshard()
            assert layouts(objective) == before
        return result

    with (
        mock.patch.object(matmul, "MIN_PACKED_TOKENS", 8),
        mock.patch.object(mooshak_torch.decode, "pack_weights_for_decode", pack),
        mock.patch.object(mooshak_torch.step, "train_step", step),
    ):
        train(config)
    return packed


def layouts(objective: nn.Module) -> list[Any]:
    """Return addresses and strides of this process's parameters."""
    local = ((name, local_shard(p)[0]) for name, p in objective.named_parameters())
    return [(name, p.data_ptr(), p.shape, p.stride(), p._version) for name, p in local]


def restored(config: Config, *written: Path) -> int:
    """Restore checkpoints of any layout in this one; asserts that every bit of them is there."""
    parallel, compared = make_parallel(config), 0
    made = None
    for path in written:
        source = open_checkpoint(path)
        assert source.trainer_state is not None
        step = source.trainer_state["step"]
        if made is None or parallel.strategy == "deepspeed":
            made = objective, optimizer = make_state(config, parallel, None, source)
        else:
            objective, optimizer = made
            with torch.no_grad():
                for parameter in objective.parameters():
                    local_shard(parameter)[0].zero_()
            optimizer.inner.state.clear()
            restore(optimizer, source)
        is_zero = isinstance(optimizer, ZeroOptimizer)
        inner = optimizer.engine.optimizer.optimizer if is_zero else optimizer.inner
        state = optimizer.state()
        assert {int(s["step"]) for s in inner.state.values()} == {step}
        for kind, tensors in state.items():
            for name, tensor in tensors.items():
                part, where = local_shard(tensor)
                truth = whole(path)[name if kind == "params" else f"{kind}.{name}"][where]
                assert torch.equal(part, torch.tensor(truth, dtype=part.dtype)), (path, kind, name)
                compared += 1
    parallel.close()
    return compared


@cache
def whole(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a checkpoint."""
    source = open_checkpoint(path)
    return {key: source.read(key) for key in source.tensors}


def refused(config: Config) -> list[Any]:
    """Return the error of an impossible run, and whether it joined a group or allocated before."""
    joins = mock.patch.object(dist, "init_process_group")
    with joins as joined, mock.patch.object(nn.Module, "to_empty") as allocated:
        try:
            train(config)
        except InputError as error:
            return [str(error), joined.called, allocated.called]
    raise AssertionError("it was not refused")


def absent(config: Config, given_up: Path) -> str:
    """A run whose second process stays away from the first step until the other gives up."""

    def stay_away(*args: Any) -> Any:
        while not given_up.exists():
            time.sleep(0.1)
        return train_step(*args)

    away = os.environ["RANK"] == "1"
    with mock.patch.object(mooshak_torch.step, "train_step", stay_away if away else train_step):
        try:
            train(config)
        except PeerError as error:
            given_up.touch()
            return str(error)
    raise AssertionError("nobody gave up")


def signalled(config: Config) -> None:
    """The command, of which the second process alone gets a SIGTERM in its third step."""
    steps = 0

    def step(*args: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 3 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(*args)

    argv = ["train", "--config", f"{config.run.dir}.yaml"]
    Path(argv[-1]).write_text(dump_config(config))
    with mock.patch.object(mooshak_torch.step, "train_step", step), mock.patch("sys.argv", argv):
        mooshak_torch.train.main()  # Anything but exit code 0 is an exception.


def converted(config: Config) -> int:
    """A run; returns how many checkpoints this process has converted for it."""
    with mock.patch.object(formats, "_converted", wraps=formats._converted) as done:
        train(config)
    return done.call_count


def overflowing(config: Config) -> None:
    """A run in float16 whose first gradients are too large."""
    scale = partial(LossScale, scale=2.0**30)
    with mock.patch.object(mooshak_torch.step, "LossScale", scale):
        train(config)


class WeightedLogProbs(mooshak_torch.objectives.CausalLM):
    """An objective that weighs the log-probability of every token, some by zero."""

    def forward(self, batch: Batch[Tensor]) -> Tensor:
        x_BTD = self.model.hidden_states(batch.tokens, **batch.context)
        log_probs_BT = self.loss(x_BTD, batch.labels, per_token=True)
        return -(log_probs_BT * (batch.labels % 3)).sum()


def weighted(config: Config) -> None:
    """A run with that objective."""
    with mock.patch.object(mooshak_torch.objectives, "CausalLM", WeightedLogProbs):
        train(config)


def stepped(config: Config, batches: Path) -> list[list[float]]:
    """Train on global batches from a file, [steps, 4, B, T]; returns losses and gradient norms."""
    result = []
    parallel = make_parallel(config)
    objective, optimizer = make_state(config, parallel, None, None)
    for arrays in np.load(batches):
        batch = Batch(*arrays).chunk(parallel.dp_size)[parallel.dp_rank]
        batch = parallel.shard_local_batch(batch)
        loss, norm = train_step(objective, optimizer, batch, 1e-2, config, parallel)
        result.append([parallel.sum(loss).item(), norm.item()])
    parallel.close()
    return result


DO: dict[str, Callable[..., Any]] = {
    do.__name__: do
    for do in (
        trained,
        generating,
        restored,
        refused,
        absent,
        signalled,
        converted,
        overflowing,
        weighted,
        stepped,
    )
}

if __name__ == "__main__":
    main()
