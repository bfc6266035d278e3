"""Adapters: the same function in both frameworks, merged as unmerged, from equal initial bits."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from mooshak.checkpoints import safetensors
from mooshak.checkpoints.adapters import merged, with_adapters
from mooshak.checkpoints.base import Checkpoint
from mooshak.config.lora import LoraConfig
from mooshak.config.model import ModelConfig, model_from_json, model_to_json
from mooshak.errors import InputError
from mooshak_jax import params as jax_params
from mooshak_torch.lora import disable_adapters
from mooshak_torch.model import Model
from mooshak_torch.params import initialize, load_params, numpy_dtype, to_numpy
from tests.drawn_checkpoints import drawn_checkpoint

BASE = ModelConfig(
    architecture="llama",
    vocab_size=64,
    dim=24,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    head_dim=10,
    hidden_dim=36,
    max_seq_len=16,
    qkv_bias=True,
)
LORA = replace(BASE, lora=LoraConfig(rank=3, alpha=5, rslora=True))
DORA = replace(BASE, lora=LoraConfig(rank=3, dora=True, targets=["wq", "wv", "wo", "w2"]))
ROWS = replace(BASE, lora=LoraConfig(rank=3, trainable_token_indices=[63, 5, 17]))
TIED = replace(ROWS, tie_embeddings=True)
TOKENS_BT = np.random.default_rng(0).integers(0, 64, (2, 9))
TOKENS_BT[:, 3] = 5, 17


@pytest.fixture(autouse=True, scope="module")
def environment() -> Iterator[None]:
    with jax.enable_x64():
        yield


def torch_logits(model: Model) -> np.ndarray:
    with torch.no_grad():
        logits: np.ndarray = model(torch.from_numpy(TOKENS_BT)).double().numpy()
        return logits


def checkpoint_of(model: Model) -> Checkpoint:
    """The model's parameters as a checkpoint."""
    arrays = {name: to_numpy(p.detach()) for name, p in model.named_parameters()}
    tensors = {name: (numpy_dtype(p.dtype), tuple(p.shape)) for name, p in model.named_parameters()}
    return Checkpoint(
        Path("(memory)"),
        "torch",
        model.config,
        None,
        tensors,
        lambda key, rows=slice(None): arrays[key][rows],
    )


MODELS = {"rslora": LORA, "dora": DORA, "rows": ROWS, "tied rows": TIED}


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("scan", [False, True], ids=["layers", "scan"])
def test_adapters_are_the_same_function(model: ModelConfig, scan: bool) -> None:
    ours = torch_logits(initialize(Model(model, "float64"), 3, 0.3))
    layout = replace(model, scan_layers=scan)
    theirs = jax_params.merge(
        jax_params.make_graphdef(layout, "float64"),
        jax_params.initialize(layout, "float64", 3, 0.3),
    )(jnp.asarray(TOKENS_BT))
    assert np.abs(np.asarray(theirs) - ours).max() <= 1e-12 * np.abs(ours).max()
    without = torch_logits(initialize(Model(BASE, "float64"), 3, 0.3))
    assert np.abs(ours - without).max() > 1e-2 * np.abs(ours).max()


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_merged_is_unmerged(model: ModelConfig) -> None:
    adapted = initialize(Model(model, "float64"), 3, 0.3)
    if model is DORA:  # Magnitudes that are not the norms: a trained model's.
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if name.endswith("dora_magnitude"):
                    parameter *= 1 + 0.2 * torch.sin(torch.arange(len(parameter)))
    single = Model(replace(model, lora=None), "float64")
    load_params(dict(single.named_parameters()), merged(checkpoint_of(adapted)))
    ours, theirs = torch_logits(adapted), torch_logits(single)
    assert np.abs(theirs - ours).max() <= 1e-12 * np.abs(ours).max()


def test_merge_reports_what_rounding_loses() -> None:
    source = checkpoint_of(initialize(Model(LORA, "float32"), 3, 0.3))
    sums = np.zeros(3)

    def add(*parts: float) -> None:
        sums[:] += parts

    rounded = merged(source, np.dtype(jnp.bfloat16), report=add)
    assert rounded.read("layers.0.mlp.w2.weight").dtype == jnp.bfloat16
    assert 1 < np.sqrt(sums[1] / sums[0]) < 3
    assert 1e-3 < np.sqrt(sums[2] / sums[1]) < 4e-3  # bfloat16 has 8 bits.
    with pytest.raises(InputError, match="no adapters to merge"):
        merged(drawn_checkpoint(BASE))


@pytest.mark.parametrize("lora", [LORA.lora, DORA.lora, ROWS.lora], ids=["rslora", "dora", "rows"])
def test_initial_adapters_do_not_change_the_model(lora: LoraConfig) -> None:
    base = drawn_checkpoint(BASE)
    adapted = Model(replace(BASE, lora=lora), "float64")
    load_params(
        dict(adapted.named_parameters()), with_adapters(base, lora, 7, np.dtype(np.float64))
    )
    plain = Model(BASE, "float64")
    load_params(dict(plain.named_parameters()), base)
    ours = torch_logits(plain)
    assert np.abs(torch_logits(adapted) - ours).max() <= 1e-13 * np.abs(ours).max()
    assert adapted.layers[1].attention.wq.lora_a.weight.std() > 0.05


@pytest.mark.slow
def test_bfloat16_stores_a_base_that_is_not_trained_in_bfloat16() -> None:
    model = initialize(Model(DORA, "bfloat16"), 3, 0.3)
    layer = model.layers[0]
    assert layer.mlp.w1.weight.dtype == torch.bfloat16 and not layer.mlp.w1.weight.requires_grad
    assert layer.attention.wq.lora_a.weight.dtype == torch.float32
    assert layer.mlp_norm.weight.dtype == model.head_VD.dtype == torch.float32
    graphdef = jax_params.make_graphdef(DORA, "bfloat16")
    params = jax_params.initialize(DORA, "bfloat16", 3, 0.3)
    kernel = params["layers"][0]["mlp"]["w1"]["kernel"]
    assert kernel.dtype == jnp.bfloat16
    assert np.array_equal(np.asarray(kernel).T, to_numpy(layer.mlp.w1.weight.detach()))
    theirs = jax_params.merge(graphdef, params)(jnp.asarray(TOKENS_BT))
    ours = torch_logits(model)
    assert np.abs(np.asarray(theirs, np.float64) - ours).max() < 0.05 * np.abs(ours).max()


def test_adapters_are_part_of_the_model_description(tmp_path: Path) -> None:
    assert model_from_json(model_to_json(DORA), "config.json") == DORA != LORA
    assert len({DORA, LORA, BASE, replace(BASE)}) == 3
    source = drawn_checkpoint(DORA)
    safetensors.write_checkpoint(tmp_path / "adapted", source)
    again = safetensors.open_checkpoint(tmp_path / "adapted")
    name = "layers.1.attention.wo.dora_magnitude"
    assert again.model == DORA and np.array_equal(again.read(name), source.read(name))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"rank": 2, "targets": ["q_proj"]}, "lora.targets has no 'q_proj'; did you mean wq"),
        ({"targets": ["wq"]}, "lora.targets needs adapters; set lora.rank"),
        ({"rank": -1}, "lora.rank must be at least 0"),
        ({"rank": 2, "modules_to_save": ["head"]}, "lora.modules_to_save has no 'head'"),
    ],
)
def test_wrong_settings_are_named(settings: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        LoraConfig(**settings)
    with pytest.raises(InputError, match="fuse_kernels false"):
        replace(LORA, fuse_kernels=True)


def test_trained_rows_replace_those_of_their_tables() -> None:
    model = initialize(Model(ROWS, "float64"), 3, 0.3)
    ids = ROWS.lora.trainable_token_indices if ROWS.lora else []
    assert ids == [5, 17, 63]
    whole = merged(checkpoint_of(model))
    for name, table in (("embeddings", model.embeddings), ("lm_head", model.lm_head)):
        found = whole.read(f"{name}.weight")
        np.testing.assert_array_equal(found[ids], table.token_rows.detach().numpy())
        others = np.setdiff1d(np.arange(64), ids)
        np.testing.assert_array_equal(found[others], table.weight.detach().numpy()[others])
        assert np.abs(found[ids] - table.weight.detach().numpy()[ids]).min(1).max() > 0
        np.testing.assert_array_equal(whole.read(f"{name}.weight", slice(10, 20)), found[10:20])
    with disable_adapters(model):
        off = torch_logits(model)
    base = initialize(Model(BASE, "float64"), 3, 0.3)
    np.testing.assert_array_equal(off, torch_logits(base))
    assert np.abs(torch_logits(model) - off).max() > 0.01


def test_trained_rows_that_cannot_be_are_refused() -> None:
    with pytest.raises(InputError, match=r"\[64\]: model.vocab_size is 64"):
        replace(BASE, lora=LoraConfig(rank=2, trainable_token_indices=[64]))
    with pytest.raises(InputError, match="must be token ids"):
        LoraConfig(rank=2, trainable_token_indices=[-1])
    with pytest.raises(InputError, match="remove one"):
        LoraConfig(rank=2, modules_to_save=["lm_head"], trainable_token_indices=[1])
    with pytest.raises(InputError, match="needs adapters"):
        LoraConfig(trainable_token_indices=[1])
