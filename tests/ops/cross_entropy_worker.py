"""Worker of torchrun: loss and log-probabilities of a head that is sharded by vocabulary."""

import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh

from mooshak_torch.ops.cross_entropy import cross_entropy, token_log_probs


def main(directory: Path) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    given = {key: torch.from_numpy(a) for key, a in np.load(directory / "given.npz").items()}
    found = {}
    for name, compute in (("loss", cross_entropy), ("log_probs", token_log_probs)):
        x_BTD = given["x"].clone().requires_grad_()
        w_VD = distribute_tensor(given["w"], mesh, [Shard(0)]).requires_grad_()
        value = compute(x_BTD, w_VD, given["labels"], 6)
        value.backward(given["upstream"] if value.ndim else None)
        assert x_BTD.grad is not None and isinstance(w_VD.grad, DTensor)
        found[name] = value.detach().numpy()
        found[f"{name} dx"], found[f"{name} dw"] = x_BTD.grad.numpy(), w_VD.grad.to_local().numpy()
    np.savez(directory / f"found-{dist.get_rank()}.npz", **found)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main(Path(sys.argv[1]))
    dist.destroy_process_group()
