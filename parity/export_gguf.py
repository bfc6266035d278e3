"""Write a Llama-shaped checkpoint as one GGUF file for llama.cpp and programs built on it.

Names and keys are those of the `gguf` package. llama.cpp's Llama applies RoPE to neighbouring
elements and ours to halves: the rows of wq and wk are permuted accordingly. Its Qwen uses halves.
"""

from pathlib import Path

import gguf
import numpy as np

from mooshak.checkpoints.base import DTYPES, Checkpoint
from mooshak.checkpoints.hf import hf_name
from mooshak.checkpoints.hf_config import model_to_hf
from mooshak.config.model import ModelConfig
from mooshak.errors import InputError
from mooshak.files import locked
from mooshak.numerics.rope import rescaled
from mooshak.tokenizer.chat_template import CHAT_TEMPLATE
from mooshak.tokenizer.files import HF_CONFIG
from mooshak.tokenizer.sentencepiece import parse_proto
from parity.export_hf import exported_tokenizer_files

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


def write_checkpoint(path: Path, source: Checkpoint) -> None:
    """Write the weights of a checkpoint of any kind to the file `path`, one tensor at a time.

    Raises `InputError` for a model that llama.cpp does not support, and where `path` exists.
    """
    model = source.model
    kind = model_to_hf(model)["model_type"]
    if kind not in ARCHITECTURES:
        raise InputError(
            f"GGUF has no architecture for this model ({kind}"
            f"{', sliding window' if model.sliding_window else ''}); use --to hf"
        )
    if path.exists():
        raise InputError(f"{path} exists already; remove it or choose another destination")
    architecture = ARCHITECTURES[kind]
    names = gguf.get_tensor_name_map(architecture, model.n_layers)
    temporary = path.with_name(f".{path.name}.unfinished")
    with locked(path.with_name(f".{path.name}.lock")):
        try:
            writer = gguf.GGUFWriter(temporary, gguf.MODEL_ARCH_NAMES[architecture])
            _describe(writer, source)
            _add_tokenizer(writer, source)
            tensors = {}
            for name in model.parameter_shapes():
                theirs = names.get_name(hf_name(name), try_suffixes=(".weight", ".bias"))
                assert theirs is not None, name
                tensors[theirs] = (name, *_type(source, name))
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
                writer.write_tensor_data(tensor(source, name, kind).astype(dtype, copy=False))
            writer.close()
            temporary.rename(path)
        finally:
            temporary.unlink(missing_ok=True)
    path.with_name(f".{path.name}.lock").unlink(missing_ok=True)


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


def _add_tokenizer(writer: gguf.GGUFWriter, source: Checkpoint) -> None:
    """Add the tokens of the SentencePiece model; rows beyond them are unused tokens."""
    files = exported_tokenizer_files(source)
    file = files.get("tokenizer.model")
    if file is None:
        raise InputError(f"{source.path} has no tokenizer.model; GGUF needs one")
    proto = parse_proto(file.read_bytes())
    spare = range(len(proto.pieces), source.model.vocab_size)
    unused = gguf.TokenType.UNUSED
    writer.add_tokenizer_model("llama")
    writer.add_token_list([*(p.piece for p in proto.pieces), *(f"[PAD{i}]" for i in spare)])
    writer.add_token_scores([*(p.score for p in proto.pieces), *(-1e4 for _ in spare)])
    # SentencePiece and GGUF use the same numbers for token types.
    writer.add_token_types([*(int(p.type) for p in proto.pieces), *(unused for _ in spare)])
    writer.add_add_space_prefix(proto.normalizer_spec.add_dummy_prefix)
    writer.add_add_bos_token(True)
    spec = proto.trainer_spec
    for add, id in (
        (writer.add_bos_token_id, spec.bos_id),
        (writer.add_eos_token_id, spec.eos_id),
        (writer.add_unk_token_id, spec.unk_id),
        (writer.add_pad_token_id, spec.pad_id),
    ):
        if id >= 0:
            add(id)
    if "chat_template.jinja" in files:
        writer.add_chat_template(files["chat_template.jinja"].read_text())
    elif any(p.piece == "<|assistant|>" for p in proto.pieces) and HF_CONFIG not in files:
        writer.add_chat_template(CHAT_TEMPLATE)
