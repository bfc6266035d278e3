"""Initial weights: a pure function of (seed, parameter name, element), for any slice.

Element i of a parameter is computed from block i of a Philox-4x64 stream (Salmon et al., SC 2011)
whose key is a hash of the seed and the name. The four 64-bit words of a block are sixteen 16-bit
uniforms; their centred sum is the weight (Irwin-Hall: normal to within 0.08 in excess kurtosis).
Sums of integers and one multiplication have the same bits on every machine. A normal variate from a
logarithm does not, and one from rejection sampling cannot be computed for element i alone.
"""

import math

import numpy as np

from mooshak.config.lora import TOKEN_ROWS
from mooshak.config.model import ModelConfig
from mooshak.numerics.philox import random_words

# A block has sixteen uniforms on 0 .. 65535.
_MEAN = 16 * 65535 / 2
_STD = math.sqrt(16 * (65536**2 - 1) / 12)
# Every other 16 bits of a 64-bit word.
_LANES = np.uint64(0x0000FFFF0000FFFF)
# Elements computed at once, each from 32 bytes of Philox output.
_CHUNK = 1 << 14


def initial_std(model: ModelConfig, name: str) -> float:
    """Return the standard deviation of the initial weights of a matrix.

    | parameter              | std            | because                                          |
    |------------------------|----------------|--------------------------------------------------|
    | embeddings             | 1              | input of the first attention, without a norm;    |
    |                        |                | later layers get unit RMS from output_norm       |
    |   tied                 | 1 / sqrt(dim)  | as output head: logits of variance 1             |
    | wq, wk, wv, w1, w3, w2 | 1 / sqrt(in)   | preserves unit variance                          |
    |   llama: wo, w2        | 1 / sqrt(in)   | 2 n_layers outputs are summed in the residual    |
    |                        | / sqrt(2 n_layers) | stream, which no norm rescales               |
    | lm_head                | 0.1 / sqrt(in) | logits near 0: the loss starts at log(vocabulary)|
    | lora_a                 | 1 / sqrt(3 in) | as in PEFT                                       |
    """
    if name == "embeddings.weight":
        return 1 / math.sqrt(model.dim) if model.tie_embeddings else 1.0
    std = 1 / math.sqrt(model.parameter_shapes()[name][1])
    if name.endswith(".lora_a.weight"):
        return std / math.sqrt(3)
    if name == "lm_head.weight":
        return 0.1 * std
    if model.architecture == "llama" and name.endswith((".wo.weight", ".w2.weight")):
        return std / math.sqrt(2 * model.n_layers)
    return std


def initial_weight(
    model: ModelConfig,
    seed: int,
    name: str,
    rows: slice = slice(None),
    columns: slice = slice(None),
    dtype: np.dtype | type = np.float32,
    gain_std: float = 0.0,
) -> np.ndarray:
    """Return a block of the initial value of parameter `name`, in canonical `[out, in]` layout.

    A gain or bias is a column. `gain_std` is the standard deviation of gains around one, and of
    biases and `lora_b` around zero; parity models need it, since gains of one hide faults. The
    `dora_magnitude` of a matrix is the norm of its rows, `token_rows` are rows of their table (with
    `gain_std` others).
    """
    shape = model.parameter_shapes()[name]
    if name.endswith(f".{TOKEN_ROWS}") and not gain_std:
        assert model.lora is not None
        table = name.replace(TOKEN_ROWS, "weight")
        tokens = model.lora.trainable_token_indices[rows]
        parts = [
            initial_weight(model, seed, table, slice(i, i + 1), columns, dtype) for i in tokens
        ]
        return np.concatenate([*parts, np.empty((0, len(range(shape[1])[columns])), dtype)])
    if name.endswith(".dora_magnitude"):
        weight = name.replace("dora_magnitude", "weight")
        return row_norms(initial_weight(model, seed, weight, rows, dtype=dtype)).astype(dtype)
    is_column = len(shape) == 1
    mean = 1.0 if name.endswith("norm.weight") else 0.0
    is_zero = is_column or name.endswith(".lora_b.weight")
    scale = gain_std if is_zero else initial_std(model, name)
    width = math.prod(shape[1:])
    top, bottom, _ = rows.indices(shape[0])
    left, right, _ = columns.indices(width)
    result = np.full((max(bottom - top, 0), max(right - left, 0)), mean, dtype)
    # Full rows are contiguous in the stream; parts of rows are separate runs.
    runs = result.reshape(1, -1) if result.shape[1] == width else result
    for row, run in enumerate(runs if scale else ()):
        start = (top + row) * width + left
        for offset in range(0, run.size, _CHUNK):
            count = min(_CHUNK, run.size - offset)
            z = standard(f"{seed}:{name}", start + offset, count)
            run[offset : offset + count] = mean + scale * z
    return result[:, 0] if is_column else result


def row_norms(weight_OI: np.ndarray) -> np.ndarray:
    """Return the norm of each row [O] in float64: the initial `dora_magnitude`."""
    result: np.ndarray = np.sqrt(np.square(weight_OI.astype(np.float64)).sum(1))
    return result


def standard(stream: str, start: int, count: int) -> np.ndarray:
    """Return elements start .. start + count of a stream of mean 0 and variance 1, float64."""
    words = random_words(stream, start, 4 * count)
    # Sixteen 16-bit numbers are summed within 64-bit words, in two lanes of 32 bits.
    pairs = (words & _LANES) + ((words >> np.uint64(16)) & _LANES)
    sums = pairs[0::4] + pairs[1::4] + pairs[2::4] + pairs[3::4]
    totals = (sums & np.uint64(0xFFFFFFFF)) + (sums >> np.uint64(32))
    return (totals.astype(np.float64) - _MEAN) / _STD
