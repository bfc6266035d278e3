"""Generation takes short ways: a causal prompt, keys as far as they are written, one position of
the prompt through the output head. The long way is the whole text through the model, each time."""

import shutil
from dataclasses import replace
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import mooshak_jax.decode
import mooshak_jax.model
import mooshak_jax.params
import mooshak_torch.decode
from mooshak.config.model import ModelConfig
from mooshak.errors import InputError
from mooshak_torch.model import Model, make_caches
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


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_prompts_of_several_lengths_continue_as_each_does_alone(model: ModelConfig) -> None:
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


def test_compiled_decoding_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    mooshak_torch.decode._compiled_step.cache_clear()
    model = initialize(Model(MODELS["mooshak"]), 0)
    with pytest.raises(InputError, match="--compile needs a C\\+\\+ compiler"):
        mooshak_torch.decode.generate(model, PROMPTS, NEW, compiled=True)


def test_a_cache_gives_out_what_is_written() -> None:
    model = initialize(Model(MODELS["mooshak"], "float64"), 0)
    (cache, *_) = caches = make_caches(model, 2, 9)
    tokens_BT = torch.arange(12).view(2, 6)
    expected = model(tokens_BT)
    first = model(tokens_BT[:, :4], caches=caches)
    assert cache.written == 4
    rest = model(tokens_BT[:, 4:], torch.tensor([[4, 5], [4, 5]]), caches)
    assert cache.written == 6 and not cache.k_BSGK[:, 6:].any()
    torch.testing.assert_close(torch.cat((first, rest), 1), expected, rtol=1e-12, atol=1e-13)


def test_a_cache_gives_out_what_is_written_in_jax() -> None:
    with jax.enable_x64(True):
        graphdef = mooshak_jax.params.make_graphdef(MODELS["llama"], "float64")
        params = mooshak_jax.params.initialize(MODELS["llama"], "float64", 0, gain_std=0.1)
        model = mooshak_jax.params.merge(graphdef, params)
        caches = mooshak_jax.model.make_caches(model, 2, 9)
        tokens_BT = jnp.arange(12).reshape(2, 6)
        expected, parts = model(tokens_BT), []
        for start, end in ((0, 4), (4, 6)):
            assert caches[0].written == (start > 0)
            positions_BT = jnp.tile(jnp.arange(start, end), (2, 1))
            parts.append(model(tokens_BT[:, start:end], positions_BT, caches))
        assert caches[0].k_BSGK[:, :6].all() and not caches[0].k_BSGK[:, 6:].any()
        np.testing.assert_allclose(jnp.concatenate(parts, 1), expected, rtol=1e-12, atol=1e-13)


def test_decoding_changes_the_layout_of_matrices_and_no_value() -> None:
    model = initialize(Model(MODELS["llama"]), 0, gain_std=0.1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tokens_BT = torch.tensor(PROMPTS[2:])
    logits_BTV = model(tokens_BT)
    first = mooshak_torch.decode.generate(model, PROMPTS, NEW)
    assert np.array_equal(mooshak_torch.decode.generate(model, PROMPTS, NEW), first)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    torch.testing.assert_close(model(tokens_BT), logits_BTV, rtol=1e-5, atol=1e-5)
    model(tokens_BT).sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())
