"""Hugging Face as an oracle, as a place to come from and to go to, by models that it makes here."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

# Before transformers is imported: no network, and the code of remote models in a place of its own.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="modules-")

import torch
import transformers

from mooshak.huggingface import model_from_hf
from mooshak.interchange import Checkpoint
from parity import measures
from parity.convert import convert, open_any
from parity.sides import JaxSide, TorchSide

SIZES = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 52,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 96,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e4,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 24,
}
GRID: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, MHA": ("llama", {}),
    "llama, GQA 2, tied, llama3": (
        "llama",
        {"num_key_value_heads": 4, "tie_word_embeddings": True, "rope_parameters": LLAMA3},
    ),
    "llama, MQA, biases, head_dim, linear": (
        "llama",
        {
            "num_key_value_heads": 1,
            "attention_bias": True,
            "mlp_bias": True,
            "head_dim": 6,
            "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
        },
    ),
    "mistral, window": ("mistral", {"num_key_value_heads": 2, "sliding_window": 10}),
    "qwen2": ("qwen2", {"num_key_value_heads": 2}),
    "qwen3": ("qwen3", {"num_key_value_heads": 2, "head_dim": 12, "tie_word_embeddings": True}),
}


def make(directory: Path, kind: str, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    """A model that transformers makes, drawn so that faults show, and saves to `directory`."""
    config = transformers.AutoConfig.for_model(kind, **SIZES | settings)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            around, std = (1.0, 0.2) if "norm" in name else (0.0, 0.15)
            parameter.normal_(around, std)
    model.to(dtype).save_pretrained(directory)
    # Loaded again: `to` rounds the frequencies of RoPE too, which a file does not hold.
    return transformers.AutoModelForCausalLM.from_pretrained(directory).eval()


@pytest.mark.parametrize("case", GRID)
def test_every_family_is_the_same_function_in_both_frameworks(case: str, tmp_path: Path) -> None:
    kind, settings = GRID[case]
    theirs = make(tmp_path / "hf", kind, **settings)
    source = open_any(tmp_path / "hf")
    assert source.kind == "hf"
    tokens_BT = np.random.default_rng(0).integers(0, 128, (2, 40), dtype=np.int32)
    truth = TorchSide(source).operations("float64", tokens_BT)["logits"]
    with torch.no_grad():
        found = theirs(torch.from_numpy(tokens_BT).long()).logits.numpy()
    floor = measures.distance(found, truth)
    assert floor < 5e-6, floor  # It is the same function.
    prompts = tokens_BT[:, :8]
    greedy = theirs.generate(
        torch.from_numpy(prompts).long(), max_new_tokens=64, do_sample=False, eos_token_id=None
    )[:, 8:]
    for side in (TorchSide(source), JaxSide(source)):
        ours = side.operations("float32", tokens_BT)["logits"]
        allowed = measures.RATIO * max(floor, measures.TINY)
        assert measures.distance(ours, truth) <= allowed, side.name
        tokens = side.generate("float32", prompts.tolist(), 64, 0.0)
        assert tokens.tolist() == greedy.tolist(), side.name


def bits(checkpoint: Checkpoint) -> dict[str, tuple[str, bytes]]:
    return {
        key: (a.dtype.str, a.tobytes())
        for key in checkpoint.tensors
        for a in [checkpoint.read(key)]
    }


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        ("llama, GQA 2, tied, llama3", torch.bfloat16),
        ("mistral, window", torch.float16),
        ("qwen3", torch.float32),
    ],
)
def test_the_way_there_and_back_keeps_every_bit(
    case: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    kind, settings = GRID[case]
    make(tmp_path / "start", kind, dtype, bos_token_id=3, eos_token_id=[5, 7], **settings)
    (tmp_path / "start" / "chat_template.jinja").write_text("{{ messages }}")
    at = tmp_path / "start"
    for i, to in enumerate(("torch", "jax", "torch", "safetensors", "hf")):
        convert(at, tmp_path / str(i), to)
        at = tmp_path / str(i)
    assert bits(open_any(tmp_path / "start")) == bits(open_any(at))
    configs = [
        transformers.AutoConfig.from_pretrained(path).to_dict() | {"_name_or_path": ""}
        for path in (tmp_path / "start", at)
    ]
    assert configs[0] == configs[1]
    for name in ("generation_config.json", "chat_template.jinja"):
        assert (at / name).read_bytes() == (tmp_path / "start" / name).read_bytes()
    written = json.loads((at / "config.json").read_text())
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"]
    # The form of transformers 4 alone says the same.
    del written["rope_parameters"]
    assert model_from_hf(written, "here") == open_any(at).model
