"""Apply the parallelism of a mesh to an objective: tensor parallelism, FSDP2 or DDP."""

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mooshak.config.sections import Config
from mooshak_torch.distributed.fsdp import apply_fsdp
from mooshak_torch.distributed.mesh import Parallel
from mooshak_torch.distributed.tensor_parallel import apply_tp
from mooshak_torch.model import Model, Rope


def parallelize(objective: nn.Module, parallel: Parallel, config: Config) -> nn.Module:
    """Distribute an objective (with `model` and `loss`, on the meta device) over the mesh.

    Applied in this order: tensor parallelism, FSDP2 (with `data` > 1: HSDP), allocation of this
    process's shards, and DDP if nothing is sharded. `make_objective` has already applied activation
    checkpointing and compilation to the layers. The parameters are allocated, not initialized.
    Gradients of the result are averaged over the data-parallel processes.
    """
    model = objective.model
    assert isinstance(model, Model)
    if parallel.mesh is not None and parallel.sizes["tensor"] > 1:
        apply_tp(objective, parallel.mesh["tensor"], config)
    # With a single process FSDP2 streams the layers from host memory.
    offload = config.parallel.cpu_offload
    sharded = parallel.strategy == "fsdp" and (parallel.dp_size > 1 or offload)
    if parallel.mesh is not None and sharded:
        apply_fsdp(objective, parallel.mesh, config)
    objective.to_empty(device="cpu" if offload else parallel.device)
    # The RoPE tables are buffers, which have no values on the meta device.
    model.rope = Rope(model.config, model.rope.cos.dtype).to(parallel.device)
    is_trained = any(parameter.requires_grad for parameter in objective.parameters())
    if sharded or parallel.dp_size == 1 or not is_trained:
        return objective
    devices = [parallel.device] if parallel.device.type == "cuda" else None
    # No synchronization: each process initializes or loads the same values; buffers are constant.
    return DistributedDataParallel(
        objective, device_ids=devices, init_sync=False, forward_sync_buffers=False
    )
