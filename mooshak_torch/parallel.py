"""Processes and devices of the torch side: one mesh, `--mesh data=2,fsdp=4`, and what lies on it.

`data` repeats the model (DDP; with fsdp: HSDP), `fsdp` cuts its parameters, gradients and optimizer
state (FSDP2), and both cut the batch. `tensor` cuts heads, MLP width and vocabulary.
"""

import math
import os
import re
import shutil
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_tensor,
)
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from mooshak.config import Config
from mooshak.errors import InputError, PeerError
from mooshak.mesh import AXES, check_mesh, mesh_sizes, mesh_text, parse_mesh
from mooshak_torch import zero
from mooshak_torch.loss import HeadLoss
from mooshak_torch.model import COMPUTE, MLP, Attention, Model, RMSNorm, Rope

DEFAULT_MESHES = {
    "single": "data=1",
    "ddp": "data=-1",
    "fsdp": "fsdp=-1",
    "deepspeed": "data=-1",
    "hsdp": "data=-1,fsdp={local}",
}
"""Strategy -> its mesh where none is given; `local` is the number of processes on this machine."""

COLLECTIVES = "^(all_(reduce|gather|to_all)|reduce_scatter|broadcast|barrier)"
WAITING = "timed? ?out|connection (closed|reset)|connection was|broken pipe|socket|abort"
"""Names of functions that wait for the other processes, and what they say when none comes."""

PRODUCTS = (
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.mkldnn._linear_pointwise.default,
    torch.ops.mooshak.linear.default,  # The same, compiled (mooshak_torch/products.py).
)
"""What `train.remat dots` keeps."""

COLUMNS = ("embeddings", "wq", "wk", "wv", "w1", "w3", "lm_head")
ROWS = ("wo", "w2")
TENSOR_CUTS = {
    **{f"{name}.{key}": Shard(0) for name in COLUMNS for key in ("weight", "bias")},
    **{f"{name}.weight": Shard(1) for name in ROWS},
}
"""End of a canonical name -> the dimension that the axis `tensor` cuts; others are whole."""

# Nobody writes into the output of an embedding or a layer, which DTensors give as views.
warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view", UserWarning)


@dataclass(frozen=True)
class Parallel:
    """Where this process stands among all of them."""

    rank: int
    sizes: dict[str, int]
    """Axis of the mesh -> its size; their product is the number of processes."""
    device: torch.device
    strategy: str = "single"
    """single, ddp, fsdp (HSDP and tensor parallelism included) or deepspeed."""
    mesh: DeviceMesh | None = None
    """None for one process that nobody launched."""
    saving: dist.ProcessGroup | None = None
    """Process group in which checkpoints are written beside the training."""

    @property
    def main(self) -> bool:
        return self.rank == 0

    @property
    def world(self) -> int:
        return math.prod(self.sizes.values())

    @property
    def layout(self) -> str:
        """The mesh in the notation of `--mesh`."""
        return mesh_text(self.sizes)

    @property
    def parts(self) -> int:
        """How many parts the batch is cut into."""
        return self.sizes["data"] * self.sizes["fsdp"]

    @property
    def part(self) -> int:
        """Which of them is this process's."""
        return self.rank // self.sizes["tensor"]

    def wrap(self, objective: nn.Module, config: Config) -> nn.Module:
        """Lay an objective (with its `model` and its `loss`, on the meta device) on the mesh.

        Its parameters get memory, for this process's shards only, but no values yet. Gradients of
        what is returned are averaged over the parts of the batch.
        """
        model = objective.model
        assert isinstance(model, Model)
        if self.mesh is not None and self.sizes["tensor"] > 1:
            cut(objective, self.mesh["tensor"], config)
        # One process has nothing to cut, but FSDP2 brings the layers from the host for it, too.
        sharded = self.strategy == "fsdp" and (self.parts > 1 or config.parallel.cpu_offload)
        if self.mesh is not None and sharded:
            shard(objective, self.mesh, config)
        objective.to_empty(device="cpu" if config.parallel.cpu_offload else self.device)
        # Tables, not parameters: the meta device has lost their values.
        model.rope = Rope(model.config, model.rope.cos.dtype).to(self.device)
        if sharded or self.parts == 1:
            return objective
        devices = [self.device] if self.device.type == "cuda" else None
        # Every process fills in the same values, and there are no buffers that change.
        return DistributedDataParallel(
            objective, device_ids=devices, init_sync=False, forward_sync_buffers=False
        )

    @contextmanager
    def without_reduction(self, objective: nn.Module, when: bool) -> Iterator[None]:
        """Leave gradients unreduced inside the block (all micro-batches but the last)."""
        if when and isinstance(objective, DistributedDataParallel):
            with objective.no_sync():
                yield
        elif when and isinstance(objective, FSDPModule):
            objective.set_requires_gradient_sync(False)
            yield
            objective.set_requires_gradient_sync(True)
        elif self.strategy == "deepspeed":
            engine: Any = objective
            engine.set_gradient_accumulation_boundary(not when)
            yield
        else:
            yield

    def backward(self, objective: nn.Module, loss: Tensor) -> None:
        """Add the gradients of a loss to those of the parameters."""
        if self.strategy == "deepspeed":
            engine: Any = objective
            engine.backward(loss, scale_wrt_gas=False)
        else:
            loss.backward()

    @contextmanager
    def naming_hangs(self) -> Iterator[None]:
        """Inside the block, a wait for other processes that fails is a `PeerError`.

        It names this process and the collective. (NCCL's own watchdog names them, too, and ends
        the process.)
        """
        try:
            yield
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            if self.mesh is None or not re.search(WAITING, str(error), re.IGNORECASE):
                raise
            frames = [frame.name for frame in traceback.extract_tb(error.__traceback__)]
            called = [name for name in frames if re.search(COLLECTIVES, name)]
            where = called[-1] if called else "all_reduce of gradients, in the backward pass"
            raise PeerError(
                f"rank {self.rank} of {self.world} waited in {where} for a process that did not "
                f"come (parallel.timeout, or it ended): {reason}"
            ) from error

    def sum(self, values: Tensor) -> Tensor:
        """Sum over the parts of the batch, in place."""
        if self.mesh is not None:
            dist.all_reduce(values)
        return values.div_(self.sizes["tensor"])

    def tell(self, text: str) -> str:
        """What the first process says, to all of them."""
        said = [text]
        if self.mesh is not None:
            with self.naming_hangs():
                dist.broadcast_object_list(said, src=0, group=self.saving)
        return said[0]

    def wait(self) -> None:
        """Return when all processes have come here."""
        if self.mesh is not None:
            with self.naming_hangs():
                dist.barrier(self.saving)

    def close(self) -> None:
        """Leave the process group."""
        if self.mesh is not None:
            dist.destroy_process_group()


def make_parallel(config: Config) -> Parallel:
    """Join the other processes that torchrun started, if it did.

    Raises `InputError` before anything is allocated when the strategy, the mesh, the processes and
    the batch do not go together.
    """
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    strategy, sizes = _strategy_and_sizes(config, world)
    check_mesh(config, sizes)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if strategy == "single":
        return Parallel(rank, sizes, device)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        timeout=timedelta(seconds=config.parallel.timeout),
    )
    mesh = init_device_mesh(device.type, tuple(sizes.values()), mesh_dim_names=AXES)
    return Parallel(rank, sizes, device, strategy, mesh, dist.new_group(backend="gloo"))


def _strategy_and_sizes(config: Config, world: int) -> tuple[str, dict[str, int]]:
    strategy, text = config.parallel.strategy, config.parallel.mesh
    launched = "WORLD_SIZE" in os.environ
    if strategy == "auto" and launched:
        named = parse_mesh(text)
        strategy = "fsdp" if named.get("fsdp", 1) != 1 or named.get("tensor", 1) != 1 else "ddp"
    elif strategy == "auto":
        strategy = "single"
    if strategy == "single" and world > 1:
        raise InputError(
            f"parallel.strategy single, but torchrun started {world} processes; use ddp"
        )
    if strategy != "single" and not launched:
        raise InputError(f"parallel.strategy {strategy} needs processes: start with torchrun")
    local = os.environ.get("LOCAL_WORLD_SIZE", str(world))
    text = text or DEFAULT_MESHES[strategy].format(local=local)
    count = math.prod(size for size in parse_mesh(text).values() if size > 0)
    if count != world and (world % count or "-1" not in text):
        raise InputError(
            f"mesh {text} needs {count} processes and there are {world}; start as many with "
            "torchrun, or give one axis the size -1"
        )
    sizes = mesh_sizes(text, world)
    if strategy in ("single", "ddp", "deepspeed") and sizes["data"] != world:
        raise InputError(
            f"parallel.strategy {strategy} has only the axis data, not {mesh_text(sizes)}"
        )
    if config.parallel.cpu_offload and strategy not in ("fsdp", "hsdp"):
        raise InputError(f"parallel.cpu_offload goes with parallel.strategy fsdp, not {strategy}")
    if strategy == "deepspeed":
        zero.check(config)
    return {"hsdp": "fsdp"}.get(strategy, strategy), sizes


def rematerialise(model: Model, policy: str) -> None:
    """Have the backward pass make the layers' activations again (`train.remat`), in place.

    full keeps the input of each layer, dots the results of matrix products, too.
    """
    if policy == "none":
        return
    kept = partial(create_selective_checkpoint_contexts, _keep_products)
    options: dict[str, Any] = {"context_fn": kept} if policy == "dots" else {}
    for layer in _leave_the_choice(model):
        layer.forward = partial(
            checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False, **options
        )


def _keep_products(_: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    keep = operation in PRODUCTS
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


def _leave_the_choice(model: Model) -> list[Any]:
    """The layers, which no longer decide by themselves what is made again."""
    layers: list[Any] = list(model.layers)
    for layer in layers:
        layer.thrifty = layer.mlp.thrifty = False
    return layers


def compile_layers(model: Model, config: Config) -> None:
    """Compile each layer, in place: all have the same code, which is compiled once.

    Raises `InputError` where that is not possible.
    """
    if config.parallel.strategy == "deepspeed":
        raise InputError("train.compile does not go with parallel.strategy deepspeed; use fsdp")
    require_compiler("train.compile")
    for layer in _leave_the_choice(model):
        layer.forward = torch.compile(layer.forward)


def require_compiler(option: str) -> None:
    """Raise `InputError` where torch.compile has no C++ compiler to work with."""
    if not torch.cuda.is_available() and not shutil.which(os.environ.get("CXX", "g++")):
        raise InputError(f"{option} needs a C++ compiler (g++, or what CXX names)")


def cut(objective: nn.Module, mesh: DeviceMesh, config: Config) -> None:
    """Cut heads, MLP width and vocabulary over the axis `tensor` (arXiv:1909.08053), in place.

    Between attention and MLP the stream of hidden states is whole on every process, or cut by
    sequence (arXiv:2205.05198). Parameters become DTensors; modules compute on what they are given.
    """
    model, loss = objective.model, objective.loss
    assert isinstance(model, Model) and isinstance(loss, HeadLoss)
    whole, last = Replicate(), Shard(-1)
    stream: Placement = Shard(1) if config.parallel.sequence_parallel else whole

    def take(module: nn.Module, is_now: Placement, wanted: Placement) -> None:
        """Make the module's first input a DTensor."""

        def hook(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            x = DTensor.from_local(inputs[0], mesh, [is_now])
            return x.redistribute(placements=[wanted]), *inputs[1:]

        module.register_forward_pre_hook(hook)

    def give(module: nn.Module, wanted: Placement, is_now: Placement | None = None) -> None:
        """Make the module's output a plain tensor, this process's part of it."""

        def hook(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
            if is_now is not None:
                output = DTensor.from_local(output, mesh, [is_now])
            assert isinstance(output, DTensor)
            return output.redistribute(placements=[wanted]).to_local()

        module.register_forward_hook(hook)

    for path, module in model.named_modules():
        name = path.rpartition(".")[2]
        for key, parameter in list(module.named_parameters(recurse=False)):
            placement = TENSOR_CUTS.get(f"{name}.{key}", whole)
            value = distribute_tensor(parameter, mesh, [placement])
            module.register_parameter(key, nn.Parameter(value))
        if isinstance(module, Attention | MLP):
            take(module, stream, whole)
        if isinstance(module, Attention) and module.wo is None:
            give(module, stream, last)
        if name in ("wq", "wk", "wv", "w1", "w3"):
            give(module, last)
        elif name in ("wo", "w2"):
            take(module, last, last)
            give(module, stream)
        elif name in ("q_norm", "k_norm"):
            heads = Shard(2)
            take(module, heads, heads)
            give(module, heads)
        elif isinstance(module, RMSNorm):
            take(module, stream, stream)
            give(module, stream)
    take(model.embeddings, whole, whole)
    give(model.embeddings, stream)
    if model.lm_head is not None:
        take(model.lm_head, stream, whole)
        give(model.lm_head, whole)

    def gather(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        x = DTensor.from_local(inputs[0], mesh, [stream]).redistribute(placements=[whole])
        # The loss of a part of the vocabulary has a part of the gradient.
        return x.to_local(grad_placements=[Partial()]), *inputs[1:]

    loss.register_forward_pre_hook(gather)


def shard(objective: nn.Module, mesh: DeviceMesh, config: Config) -> None:
    """Cut parameters, gradients and optimizer state over the axis `fsdp` (FSDP2), in place.

    A layer is gathered when it computes. In low precision its matrices are gathered in the compute
    dtype. What is read or summed up in float32 is gathered so: the gains of norms, and the
    embedding and the output head, whose gradients are sums over many tokens. All gradients are
    reduced in the parameters' dtype.
    """
    parallel, model, loss = config.parallel, objective.model, objective.loss
    assert isinstance(model, Model) and isinstance(loss, nn.Module)
    axes = ("data", "fsdp") if mesh["data"].size() > 1 else ("fsdp",)
    wide, compute = model.embeddings.weight.dtype, COMPUTE[model.dtype]
    common: dict[str, Any] = {"mesh": mesh[axes]}
    if parallel.cpu_offload:
        common["offload_policy"] = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda")

    def policy(dtype: torch.dtype) -> MixedPrecisionPolicy:
        # The modules cast on their own.
        return MixedPrecisionPolicy(dtype, wide, cast_forward_inputs=False)

    if compute != wide:
        for module in model.modules():
            if isinstance(module, RMSNorm):
                fully_shard(module, reshard_after_forward=False, mp_policy=policy(wide), **common)
    for layer in model.layers:
        fully_shard(
            layer,
            reshard_after_forward=parallel.reshard_after_forward,
            mp_policy=policy(compute),
            **common,
        )
    tied = model.lm_head is None  # What is read at both ends stays from one to the other.
    for module in () if tied else (model.embeddings, loss):
        # The loss makes the head's gradient in the forward pass: it is not read in the backward.
        fully_shard(module, reshard_after_forward=True, mp_policy=policy(wide), **common)
    # The head is met again on the way through the model.
    head = set() if tied else set(loss.parameters())
    fully_shard(objective, mp_policy=policy(wide), ignored_params=head, **common)
    _prefetch(list(model.layers), parallel.prefetch)


def _prefetch(layers: list[Any], ahead: int) -> None:
    """Gather so many layers ahead of the one that computes, in both directions."""
    for i, layer in enumerate(layers):
        layer.set_modules_to_forward_prefetch(layers[i + 1 : i + 1 + ahead])
        layer.set_modules_to_backward_prefetch(layers[max(0, i - ahead) : i][::-1])
