"""Apply the parallelism of a mesh to an objective: tensor parallelism, FSDP2 or DDP, memory."""

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mooshak.config.sections import Config
from mooshak_torch.distributed.fsdp import apply_fsdp
from mooshak_torch.distributed.mesh import Parallel
from mooshak_torch.distributed.tensor_parallel import apply_tp
from mooshak_torch.model import Model, Rope


def parallelize(objective: nn.Module, parallel: Parallel, config: Config) -> nn.Module:
    """Distribute an objective (with its `model` and its `loss`, on the meta device) over the mesh.

    Applied in this order: tensor parallelism, FSDP2 (with `data` > 1: HSDP), allocation of this
    process's shards, and DDP where nothing is sharded. `make_objective` has applied activation
    checkpointing and compilation to the layers before. Parameters have memory afterwards, but no
    values yet. The gradients of the result are averaged over the data-parallel ranks.
    """
    model = objective.model
    assert isinstance(model, Model)
    if parallel.mesh is not None and parallel.sizes["tensor"] > 1:
        apply_tp(objective, parallel.mesh["tensor"], config)
    # FSDP2 also streams the layers from host memory for a single process.
    offload = config.parallel.cpu_offload
    sharded = parallel.strategy == "fsdp" and (parallel.dp_size > 1 or offload)
    if parallel.mesh is not None and sharded:
        apply_fsdp(objective, parallel.mesh, config)
    objective.to_empty(device="cpu" if offload else parallel.device)
    # The RoPE tables are buffers, not parameters: the meta device holds no values for them.
    model.rope = Rope(model.config, model.rope.cos.dtype).to(parallel.device)
    if sharded or parallel.dp_size == 1:
        return objective
    devices = [parallel.device] if parallel.device.type == "cuda" else None
    # Every process fills in the same values, and no buffer changes.
    return DistributedDataParallel(
        objective, device_ids=devices, init_sync=False, forward_sync_buffers=False
    )
