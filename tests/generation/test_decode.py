"""Decoding with cache and padding equals the full text through the model at every step."""

import shutil
from dataclasses import replace
from typing import Any
from unittest import mock

import jax
import numpy as np
import pytest
import torch

import mooshak_jax.decode
import mooshak_jax.params
import mooshak_torch.decode
from mooshak.config.model import ModelConfig
from mooshak.errors import InputError
from mooshak_torch.model import Model
from mooshak_torch.ops import matmul
from mooshak_torch.params import initialize

SIZES = {"vocab_size": 128, "dim": 48, "n_layers": 2, "n_heads": 4, "hidden_dim": 80}
MODELS = {
    "mooshak": ModelConfig(**SIZES, max_seq_len=32),
    "llama": ModelConfig(
        **SIZES, max_seq_len=32, architecture="llama", n_kv_heads=2, sliding_window=5, qk_norm=True
    ),
}
PROMPTS = [[1, 5, 9], [3], [7, 8, 9, 10, 11, 12, 13]]
NEW = 10


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_prompts_of_several_lengths_decode_as_alone(model: ModelConfig) -> None:
    torch_model = initialize(Model(model, "float64"), 0, gain_std=0.1)
    found = mooshak_torch.decode.generate(torch_model, PROMPTS, NEW)
    for prompt, row in zip(PROMPTS, found, strict=True):
        ids = list(prompt)
        for _ in range(NEW):
            with torch.no_grad():
                ids.append(int(torch_model(torch.tensor([ids]))[0, -1].argmax()))
        assert ids[len(prompt) :] == row.tolist()
    with jax.enable_x64(True):
        graphdef = mooshak_jax.params.make_graphdef(model, "float64")
        params = mooshak_jax.params.initialize(model, "float64", 0, gain_std=0.1)
        theirs = mooshak_jax.decode.generate(graphdef, params, PROMPTS, NEW)
    assert np.array_equal(found, theirs)


@pytest.mark.slow
def test_caches_do_not_count_the_padding_of_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    model, lengths = MODELS["mooshak"], [len(prompt) for prompt in PROMPTS]
    seen = []

    def recorded(*args: Any) -> Any:
        seen.append(np.array([cache.lengths for cache in args[-1]]).tolist())
        return step(*args)

    torch_model = initialize(Model(model), 0)
    step = mooshak_torch.decode._step
    monkeypatch.setattr(mooshak_torch.decode, "_step", recorded)
    mooshak_torch.decode.generate(torch_model, PROMPTS, 3)
    graphdef = mooshak_jax.params.make_graphdef(model, "float32")
    params = mooshak_jax.params.initialize(model, "float32", 0)
    step = mooshak_jax.decode._step
    monkeypatch.setattr(mooshak_jax.decode, "_step", recorded)
    mooshak_jax.decode.generate(graphdef, params, PROMPTS, 3)
    in_use = [[[n + more for n in lengths]] * model.n_layers for more in (0, 1)]
    empty = [[0] * len(PROMPTS)] * model.n_layers
    assert seen == [*in_use, empty, *in_use]


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied"])
def test_one_sequence_is_decoded_in_bfloat16(tied: bool) -> None:
    model = replace(MODELS["llama"], tie_embeddings=tied)
    prompt = [PROMPTS[1]]  # One token: products of a single row.
    torch_model = initialize(Model(model, "bfloat16"), 0, gain_std=0.1)
    found = mooshak_torch.decode.generate(torch_model, prompt, NEW)
    graphdef = mooshak_jax.params.make_graphdef(model, "bfloat16")
    params = mooshak_jax.params.initialize(model, "bfloat16", 0, gain_std=0.1)
    theirs = mooshak_jax.decode.generate(graphdef, params, prompt, NEW)
    # Rounding may decide between two tokens at some time; the first is far from that.
    assert found.shape == theirs.shape == (1, NEW) and found[0, 0] == theirs[0, 0]


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize(
    ("name", "onednn"), [("mooshak", False), ("llama", torch.backends.mkldnn.is_available())]
)
def test_compiled_decoding_gives_the_same_tokens(name: str, onednn: bool) -> None:
    with mock.patch.object(matmul, "ONEDNN", onednn):
        torch_model = initialize(Model(MODELS[name]), 0, gain_std=0.1)
        for prompts in (PROMPTS, PROMPTS[:1]):
            plain = mooshak_torch.decode.generate(torch_model, prompts, NEW)
            found = mooshak_torch.decode.generate(torch_model, prompts, NEW, compiled=True)
            assert np.array_equal(found, plain)


def test_compiled_decoding_names_a_missing_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    mooshak_torch.decode._compiled_step.cache_clear()
    model = initialize(Model(MODELS["mooshak"]), 0)
    with pytest.raises(InputError, match="--compile needs a C\\+\\+ compiler"):
        mooshak_torch.decode.generate(model, PROMPTS, NEW, compiled=True)
