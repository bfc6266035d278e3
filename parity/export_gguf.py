"""Write a Llama-shaped checkpoint as one GGUF file for llama.cpp and programs built on it.

Names and keys are those of the `gguf` package. llama.cpp's Llama applies RoPE to neighbouring
elements and ours to halves: the rows of wq and wk are permuted accordingly. Its Qwen uses halves.
Before the file gets its name it is read back: tensors and token ids must be ours.
"""

from pathlib import Path

import gguf
import numpy as np

from mooshak.checkpoints.base import DTYPES, Checkpoint, cast
from mooshak.checkpoints.hf import hf_name
from mooshak.checkpoints.hf_config import model_to_hf
from mooshak.config.model import ModelConfig
from mooshak.errors import InputError
from mooshak.files import locked
from mooshak.numerics.rope import rescaled
from parity.export_check import refuse
from parity.export_gguf_tokenizer import (
    GGUFTokenizer,
    add_tokenizer,
    gguf_tokenizer_differences,
    open_gguf_tokenizer,
)

ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
}
TYPES = {
    DTYPES["F64"]: gguf.GGMLQuantizationType.F32,
    DTYPES["F32"]: gguf.GGMLQuantizationType.F32,
    DTYPES["F16"]: gguf.GGMLQuantizationType.F16,
    DTYPES["BF16"]: gguf.GGMLQuantizationType.BF16,
}
"""Our dtype -> the file's. Tensors of one dimension are float32, as llama.cpp requires."""
FILE_TYPES = {
    gguf.GGMLQuantizationType.F32: gguf.LlamaFileType.ALL_F32,
    gguf.GGMLQuantizationType.F16: gguf.LlamaFileType.MOSTLY_F16,
    gguf.GGMLQuantizationType.BF16: gguf.LlamaFileType.MOSTLY_BF16,
}


def write_checkpoint(
    path: Path, source: Checkpoint, check: bool = True, force: bool = False
) -> None:
    """Write the weights of a checkpoint of any kind to the file `path`, one tensor at a time.

    Raises `InputError` for a model that llama.cpp does not support, where `path` exists, and,
    unless `force` is true, where the `check` of the written file finds a difference.
    """
    model = source.model
    kind = model_to_hf(model)["model_type"]
    if kind not in ARCHITECTURES:
        raise InputError(
            f"GGUF has no architecture for this model ({kind}"
            f"{', sliding window' if model.sliding_window else ''}); use --to hf"
        )
    lock, temporary = (path.with_name(f".{path.name}.{end}") for end in ("lock", "unfinished"))
    with locked(lock):
        try:
            if path.exists():
                raise InputError(f"{path} exists already; remove it or choose another destination")
            tokenizer = open_gguf_tokenizer(source)
            _write(temporary, source, kind, tokenizer)
            if check and (differences := gguf_differences(temporary, source, kind, tokenizer)):
                refuse(path, differences, force)
                _write(temporary, source, kind, tokenizer, "; ".join(differences))
            temporary.rename(path)
        finally:
            temporary.unlink(missing_ok=True)
            lock.unlink(missing_ok=True)


def _write(
    path: Path, source: Checkpoint, kind: str, tokenizer: GGUFTokenizer, note: str = ""
) -> None:
    model, architecture = source.model, ARCHITECTURES[kind]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
    _describe(writer, source)
    notes = ["Text: Unicode NFC; a prompt is to be in this form, too."] * tokenizer.ours.nfc
    if note:
        notes.append(f"This export differs from its checkpoint: {note}")
    if notes:
        writer.add_description(" ".join(notes))
    add_tokenizer(writer, tokenizer, model)
    tensors = {
        theirs: (name, *_type(source, name))
        for name, theirs in tensor_names(model, architecture).items()
    }
    if (factors := frequency_factors(model)) is not None:
        shape, kind_ = factors.shape, gguf.GGMLQuantizationType.F32
        writer.add_tensor_info(ROPE, shape, factors.dtype, factors.nbytes, kind_)
    for theirs, (name, dtype, stored) in tensors.items():
        shape = source.tensors[name][1]
        size = int(np.prod(shape)) * dtype.itemsize
        writer.add_tensor_info(theirs, shape, dtype, size, stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if factors is not None:
        writer.write_tensor_data(factors)
    for name, dtype, _ in tensors.values():
        writer.write_tensor_data(cast(tensor(source, name, kind), dtype, source.label(name)))
    writer.close()


def tensor_names(model: ModelConfig, architecture: gguf.MODEL_ARCH) -> dict[str, str]:
    """Return canonical name -> name in the file."""
    names, result = gguf.get_tensor_name_map(architecture, model.n_layers), {}
    for name in model.parameter_shapes():
        theirs = names.get_name(hf_name(name), try_suffixes=(".weight", ".bias"))
        assert theirs is not None, name
        result[name] = theirs
    return result


def gguf_differences(
    path: Path, source: Checkpoint, kind: str, tokenizer: GGUFTokenizer
) -> list[str]:
    """Return how a file, as the package `gguf` reads it, differs from the checkpoint."""
    read, model = gguf.GGUFReader(path), source.model
    found = {one.name: one.data for one in read.tensors}
    for name, theirs in tensor_names(model, ARCHITECTURES[kind]).items():
        expected = cast(tensor(source, name, kind), _type(source, name)[0], source.label(name))
        data = found[theirs].view(np.uint8).ravel()
        if not np.array_equal(data, np.ascontiguousarray(expected).view(np.uint8).ravel()):
            return [f"the tensor {theirs} differs"]
        if not np.isfinite(expected).all():
            return [f"the tensor {theirs} is not finite; the weights are damaged"]
    return gguf_tokenizer_differences(read, tokenizer)


ROPE = "rope_freqs.weight"


def tensor(source: Checkpoint, name: str, kind: str) -> np.ndarray:
    """Return a parameter in the file's layout: for Llama, rows of wq and wk interleaved."""
    array, model = source.read(name), source.model
    if kind != "llama" or (".attention.wq." not in name and ".attention.wk." not in name):
        return array
    heads = len(array) // model.K
    return array.reshape(heads, 2, model.K // 2, -1).swapaxes(1, 2).reshape(array.shape)


def frequency_factors(model: ModelConfig) -> np.ndarray | None:
    """Return the divisor of each RoPE frequency under llama3 scaling, float32 [K / 2], or None."""
    if model.rope_scaling is None or model.rope_scaling["rope_type"] != "llama3":
        return None
    frequencies = model.rope_theta ** (-np.arange(0, model.K, 2, dtype=np.float64) / model.K)
    return (frequencies / rescaled(frequencies, model.rope_scaling)).astype(np.float32)


def _type(source: Checkpoint, name: str) -> tuple[np.dtype, gguf.GGMLQuantizationType]:
    dtype, shape = source.tensors[name]
    if len(shape) == 1 or dtype == DTYPES["F64"]:
        dtype = DTYPES["F32"]
    return dtype, TYPES[dtype]


def _describe(writer: gguf.GGUFWriter, source: Checkpoint) -> None:
    model = source.model
    writer.add_name(source.path.name)
    writer.add_block_count(model.n_layers)
    writer.add_context_length(model.max_seq_len)
    writer.add_embedding_length(model.dim)
    writer.add_feed_forward_length(model.hidden_dim)
    writer.add_head_count(model.n_heads)
    writer.add_head_count_kv(model.G)
    writer.add_key_length(model.K)
    writer.add_value_length(model.K)
    writer.add_rope_dimension_count(model.K)
    writer.add_layer_norm_rms_eps(model.norm_eps)
    writer.add_rope_freq_base(model.rope_theta)
    writer.add_vocab_size(model.vocab_size)
    writer.add_file_type(FILE_TYPES[_type(source, "embeddings.weight")[1]])
    if model.rope_scaling is not None and model.rope_scaling["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(model.rope_scaling["factor"])
