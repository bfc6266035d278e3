"""llama.cpp decodes our GGUF export greedily: its tokens are ours, but for true ties."""

from pathlib import Path

import numpy as np
import pytest
import torch

from mooshak.checkpoints import safetensors
from mooshak.config.model import ModelConfig
from mooshak.tokenizer.base import Tokenizer
from mooshak.tokenizer.files import files_of_tokenizer
from parity import export_gguf
from tests.drawn_checkpoints import drawn_checkpoint
from tests.serving.conftest import load

pytestmark = pytest.mark.slow

llama_cpp = pytest.importorskip("llama_cpp")

N_PROMPTS, N_TOKENS = 20, 64
MODEL = ModelConfig(
    architecture="llama",
    vocab_size=512,
    dim=64,
    n_layers=3,
    n_heads=4,
    n_kv_heads=2,
    hidden_dim=128,
    max_seq_len=128,
)


def test_llama_cpp_decodes_our_export(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    files = files_of_tokenizer(tiny_tokenizer.path)
    source = drawn_checkpoint(MODEL, 2, scale=2.0, tokenizer_files=files)
    safetensors.write_checkpoint(tmp_path / "ours", source)
    export_gguf.write_checkpoint(tmp_path / "model.gguf", source)
    lm = load("torch", tmp_path / "ours")
    llama = llama_cpp.Llama(
        str(tmp_path / "model.gguf"), n_ctx=128, n_threads=1, n_threads_batch=1, verbose=False
    )
    random = np.random.default_rng(0)
    n_different = 0
    for _ in range(N_PROMPTS):
        prompt = random.integers(3, tiny_tokenizer.vocab_size, random.integers(1, 24)).tolist()
        ours = lm.generate(prompt, max_new_tokens=N_TOKENS, ignore_eos=True)
        llama.reset()
        tokens = llama.generate(prompt, top_k=1, temp=0.0, repeat_penalty=1.0)
        theirs = [next(tokens) for _ in range(N_TOKENS)]
        if theirs == ours.token_ids:
            continue
        # Sums in another order choose the other token only where two logits are equal.
        n_different += 1
        t = next(t for t in range(N_TOKENS) if theirs[t] != ours.token_ids[t])
        with torch.no_grad():
            logits_V = lm.model(torch.tensor([prompt + theirs[:t]]))[0, -1].double()
        gap = abs(logits_V[theirs[t]] - logits_V[ours.token_ids[t]])
        assert gap <= 1e-4 * logits_V.abs().max()
    assert n_different <= 1
