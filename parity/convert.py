"""Convert a checkpoint between torch (DCP), JAX (Orbax) and the interchange format, exactly.

python -m parity.convert SRC DST --to torch|jax|safetensors
"""

import argparse
import os
from dataclasses import replace
from pathlib import Path

from mooshak import interchange
from mooshak.checkpoints import kind_of
from mooshak.errors import command

# A conversion computes nothing: it must not take hold of an accelerator.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def convert(
    source: Path, target: Path, to: str, dtype: str | None = None, weights_only: bool = False
) -> None:
    """Write the checkpoint `source` of any kind as `target` of the kind `to`.

    `dtype` casts the weights; moments keep theirs. Raises `InputError` when the source is not whole
    or the target exists.
    """
    checkpoint = open_any(source)
    if weights_only:
        names = checkpoint.model.parameter_shapes()
        tensors = {name: checkpoint.tensors[name] for name in names}
        checkpoint = replace(checkpoint, tensors=tensors, trainer_state=None)
    if dtype is not None:
        checkpoint = cast(checkpoint, dtype)
    if to == "torch":
        from mooshak_torch.checkpoint import write_checkpoint
    elif to == "jax":
        from mooshak_jax.checkpoint import write_checkpoint
    else:
        from mooshak.interchange import write_checkpoint
    write_checkpoint(target, checkpoint)


def open_any(path: Path) -> interchange.Checkpoint:
    """Open a checkpoint of any kind for reading."""
    kind = kind_of(path)
    if kind == "torch":
        from mooshak_torch.checkpoint import open_checkpoint
    elif kind == "jax":
        from mooshak_jax.checkpoint import open_checkpoint
    else:
        from mooshak.interchange import open_checkpoint
    return open_checkpoint(path)


def cast(checkpoint: interchange.Checkpoint, dtype: str) -> interchange.Checkpoint:
    """The checkpoint with its weights in another dtype."""
    wanted = interchange.DTYPES[DTYPES[dtype]]
    weights = checkpoint.model.parameter_shapes()
    tensors = {
        key: (wanted if key in weights else kept, shape)
        for key, (kept, shape) in checkpoint.tensors.items()
    }
    return replace(
        checkpoint,
        tensors=tensors,
        read=lambda key: checkpoint.read(key).astype(tensors[key][0], copy=False),
    )


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("source", type=Path, help="a checkpoint of any kind")
    parser.add_argument("target", type=Path, help="the directory to make")
    parser.add_argument("--to", choices=["torch", "jax", "safetensors"], default="safetensors")
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="cast the weights")
    parser.add_argument("--weights-only", action="store_true", help="leave the training state out")
    args = parser.parse_args()
    convert(args.source, args.target, args.to, args.dtype, args.weights_only)
    print(f"{args.source} -> {args.target} ({args.to})")


if __name__ == "__main__":
    main()
