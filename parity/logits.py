"""Write the logits of token ids under one framework.

python -m parity.logits SOURCE --backend torch --tokens tokens.npy --dtype float64 --out torch.npy
python -m parity.logits SOURCE --backend jax --tokens tokens.npy --dtype float64 --out jax.npy
"""

from pathlib import Path

import numpy as np

from mooshak.command_line import command_parser
from mooshak.config.model import Dtype, ModelConfig
from mooshak.device import add_device_option, restrict_to
from mooshak.errors import InputError, command
from mooshak.files import atomic_write


def logits(
    source: Path, backend: str, tokens_BT: np.ndarray, dtype: Dtype, device: str = "cpu"
) -> np.ndarray:
    """Compute logits [batch, time, vocab] of int tokens [batch, time] with a checkpoint."""
    if backend == "torch":
        import torch

        from mooshak_torch.checkpoint import load_model as load_torch
        from mooshak_torch.device import find_device
        from mooshak_torch.params import to_numpy
        from mooshak_torch.step import set_matmul_precision

        chosen = find_device(device)
        set_matmul_precision()
        model = load_torch(source, dtype)
        check_tokens(tokens_BT, model.config)
        with torch.no_grad():
            ids_BT = torch.from_numpy(tokens_BT.astype(np.int64)).to(chosen)
            return to_numpy(model.to(chosen)(ids_BT).cpu())
    import jax
    import jax.numpy as jnp

    from mooshak_jax.checkpoint import load_model as load_jax
    from mooshak_jax.device import find_devices
    from mooshak_jax.distributed.mesh import make_mesh
    from mooshak_jax.params import make_graphdef, merge

    jax.config.update("jax_enable_x64", True)
    config, params = load_jax(source, dtype, make_mesh("data=1", find_devices(device)))
    check_tokens(tokens_BT, config)
    return np.asarray(
        merge(make_graphdef(config, dtype), params)(jnp.asarray(tokens_BT, jnp.int32))
    )


def check_tokens(tokens_BT: np.ndarray, model: ModelConfig) -> None:
    """Raise `InputError` unless these are token ids of the model, [batch, time]."""
    if tokens_BT.ndim != 2 or tokens_BT.dtype.kind not in "iu" or not tokens_BT.size:
        raise InputError(
            f"tokens are {tokens_BT.dtype} of shape {list(tokens_BT.shape)}; "
            "expected integers [batch, time]"
        )
    if tokens_BT.min() < 0 or tokens_BT.max() >= model.vocab_size:
        raise InputError(f"a token is outside of the vocabulary, 0 .. {model.vocab_size - 1}")
    if tokens_BT.shape[1] > model.max_seq_len:
        raise InputError(
            f"{tokens_BT.shape[1]} tokens exceed the model's {model.max_seq_len} positions"
        )


@command
def main() -> None:
    usage = "SOURCE --backend torch|jax --tokens FILE --out FILE [--dtype DTYPE] [--device NAME]"
    parser = command_parser("parity.logits", __doc__, usage)
    add = parser.add_argument
    add("source", type=Path, metavar="SOURCE", help="checkpoint of any format")
    add("--backend", choices=["torch", "jax"], required=True, help="framework that computes")
    text = ".npy file of token ids, int [batch, time]"
    add("--tokens", type=Path, required=True, metavar="FILE", help=text)
    dtypes = ["float64", "float32", "bfloat16"]
    add("--dtype", choices=dtypes, default="float32", help="dtype of the computation")
    text = ".npy file to write, [batch, time, vocab]"
    add("--out", type=Path, required=True, metavar="FILE", help=text)
    add_device_option(parser, default="cpu")
    args = parser.parse_args()
    restrict_to(args.device)
    try:
        tokens_BT = np.load(args.tokens, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise InputError(f"{args.tokens} is not a .npy file of tokens: {error}") from error
    result = logits(args.source, args.backend, tokens_BT, args.dtype, args.device)
    with atomic_write(args.out) as file:
        np.save(file, result)
    print(f"{args.out}: {result.dtype} {list(result.shape)} from {args.backend}")


if __name__ == "__main__":
    main()
