"""Packed weights for decoding are copies: the model does not change, and is trained on."""

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

import mooshak_torch.decode
from mooshak.config.model import ModelConfig
from mooshak.config.sections import Config, OptimizerConfig, TrainConfig
from mooshak.data.packing import Batch
from mooshak_torch.decode import generate
from mooshak_torch.model import Linear, Model
from mooshak_torch.objectives import CausalLM, make_objective
from mooshak_torch.ops import matmul as products
from mooshak_torch.ops.matmul import pack_weights_for_decode
from mooshak_torch.optimizer import make_optimizer
from mooshak_torch.params import initialize

SIZES = {"vocab_size": 128, "dim": 48, "n_layers": 2, "hidden_dim": 80, "max_seq_len": 40}
MODELS = {
    "mooshak": ModelConfig(**SIZES, n_heads=4),
    "llama": ModelConfig(
        **SIZES, architecture="llama", n_heads=4, n_kv_heads=2, qk_norm=True, qkv_bias=True
    ),
}
PROMPTS = [[1, 5, 9], [3], [7, 8, 9, 10, 11], [2, 2]]
NEW = 32

models = pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)


@pytest.fixture(autouse=True)
def onednn() -> Iterator[None]:
    """Products by oneDNN, whatever processor this is."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this PyTorch has no oneDNN")
    with mock.patch.object(products, "ONEDNN", True):
        yield


@pytest.fixture
def packed() -> Iterator[list[bool]]:
    """One flag per generation: true if it packed the weights."""
    found: list[bool] = []

    def pack(model: Model, *args: object) -> Model:
        decoder = pack_weights_for_decode(model, *args)  # type: ignore[arg-type]
        found.append(decoder is not model)
        return decoder

    with mock.patch.object(mooshak_torch.decode, "pack_weights_for_decode", pack):
        yield found


def model_of(config: ModelConfig) -> Model:
    return initialize(Model(config), 0, gain_std=0.1)


def matrices(model: Model) -> list[Tensor]:
    return [m.weight for m in model.modules() if isinstance(m, Linear)]


def layout(model: Model) -> dict[str, tuple[object, ...]]:
    """Return address, strides and version of each tensor of the state."""
    state = {**dict(model.named_parameters()), **model.state_dict(keep_vars=True)}
    assert list(state) == [name for name, _ in model.named_parameters()]
    return {
        name: (id(p), p.data_ptr(), p.untyped_storage().nbytes(), p.stride(), p._version)
        for name, p in state.items()
    }


def trained(
    config: ModelConfig, steps: int, generate_after: Sequence[int] = (), rows: int = len(PROMPTS)
) -> dict[str, Tensor]:
    """Parameters and moments after so many steps of the fused AdamW."""
    model = model_of(config)
    objective = CausalLM(model, chunk=32)
    optimizer = make_optimizer(model, OptimizerConfig(learning_rate=1e-2))
    for step in range(1, steps + 1):
        batch_BS = torch.from_numpy(np.random.default_rng(step).integers(0, 128, (4, 21)))
        optimizer.zero_grad(set_to_none=True)
        (objective(Batch(batch_BS[:, :-1], batch_BS[:, 1:])) / 80).backward()
        optimizer.step()
        if step in generate_after:
            before = layout(model)
            generate(model, PROMPTS[:rows], NEW)
            assert layout(model) == before
    moments = {
        f"{key}.{name}": optimizer.state[p][key]
        for name, p in model.named_parameters()
        for key in ("exp_avg", "exp_avg_sq")
    }
    return {**{name: p.detach() for name, p in model.named_parameters()}, **moments}


@models
@pytest.mark.parametrize("rows", [1, 4])
def test_generating_does_not_change_training(
    config: ModelConfig, rows: int, packed: list[bool]
) -> None:
    straight = trained(config, 6)
    interrupted = trained(config, 6, generate_after=(2, 3), rows=rows)
    assert packed == [rows == 4] * 2
    assert list(straight) == list(interrupted)
    for name, tensor in straight.items():
        assert torch.equal(tensor, interrupted[name]), name


@models
def test_generate_sees_every_change_of_the_weights(config: ModelConfig, packed: list[bool]) -> None:
    model, other = model_of(config), initialize(Model(config), 1, gain_std=0.1)

    def overwrite_data() -> None:
        for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
            mine.data.copy_(theirs.data + 0.1)

    def step() -> None:
        tokens_1S = torch.tensor(PROMPTS[2:3])
        CausalLM(model, chunk=32)(Batch(tokens_1S[:, :-1], tokens_1S[:, 1:])).backward()
        make_optimizer(model, OptimizerConfig(learning_rate=1e-1)).step()

    changes = [lambda: None, step, lambda: model.load_state_dict(other.state_dict())]
    changes += [overwrite_data]
    rows = []
    for change in changes:
        change()
        fresh = Model(config)
        fresh.load_state_dict(model.state_dict())
        rows.append(generate(model, PROMPTS, NEW).tolist())
        assert rows[-1] == generate(fresh, PROMPTS, NEW).tolist()
    assert all(packed) and len({str(row) for row in rows}) == len(changes)


@models
def test_packed_copy_computes_the_same(config: ModelConfig) -> None:
    model, tokens_BT = model_of(config), torch.arange(24).view(4, 6)
    decoder = pack_weights_for_decode(model, matrices(model), 4, NEW)
    assert decoder is not model and {w.layout for w in matrices(decoder)} == {torch._mkldnn}
    assert {w.layout for w in matrices(model)} == {torch.strided}
    assert decoder.embeddings.weight is model.embeddings.weight
    with torch.no_grad():
        found_BTV, expected_BTV = decoder(tokens_BT), model(tokens_BT)
        exact_BTV = model.double()(tokens_BT)
    noise = torch.dist(expected_BTV.double(), exact_BTV)
    assert torch.dist(found_BTV.double(), exact_BTV) <= 2 * noise


def test_weights_are_packed_only_where_it_pays() -> None:
    model = model_of(MODELS["mooshak"])

    def is_packed(model: Model, rows: int = 4, tokens: int = 32) -> bool:
        return pack_weights_for_decode(model, matrices(model), rows, tokens) is not model

    assert is_packed(model)
    assert is_packed(model, rows=2, tokens=16) and not is_packed(model, rows=2, tokens=15)
    assert is_packed(model, rows=1, tokens=64) and not is_packed(model, rows=1, tokens=63)
    # Of bfloat16 the weights are in float32: each product casts them.
    for dtype in ("float64", "bfloat16", "float16"):
        assert not is_packed(Model(MODELS["mooshak"], dtype))
    with torch.device("meta"):
        assert not is_packed(Model(MODELS["mooshak"]))
    with mock.patch.object(products, "ONEDNN", False):
        assert not is_packed(model)
    n_bytes = sum(w.nbytes for w in matrices(model))
    for limit in (n_bytes, n_bytes - 1):
        with mock.patch.object(products, "MAX_PACKED_BYTES", limit):
            assert is_packed(model) == (limit == n_bytes)


def test_tied_embedding_is_not_packed() -> None:
    """It is looked up as well as multiplied."""
    model = model_of(replace(MODELS["llama"], tie_embeddings=True))
    decoder = pack_weights_for_decode(model, matrices(model), 4, NEW)
    assert decoder is not model and decoder.head_VD is model.embeddings.weight
    assert generate(model, PROMPTS, NEW).shape == (len(PROMPTS), NEW)


def test_packed_copy_is_freed_after_decoding() -> None:
    model, references = model_of(MODELS["mooshak"]), []

    def pack(*args: object) -> Model:
        decoder = pack_weights_for_decode(*args)  # type: ignore[arg-type]
        references.append(weakref.ref(decoder))
        return decoder  # type: ignore[return-value]

    with mock.patch.object(mooshak_torch.decode, "pack_weights_for_decode", pack):
        generate(model, PROMPTS, NEW)
    assert [reference() for reference in references] == [None]


def test_compiled_decoding_packs_nothing(
    packed: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(MODELS["mooshak"])
    monkeypatch.setattr(mooshak_torch.decode, "_compiled_step", lambda: mooshak_torch.decode._step)
    found = generate(model, PROMPTS, NEW, compiled=True)
    assert packed == [] and found.shape == (len(PROMPTS), NEW)


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_layers_with_their_own_forward_are_not_packed(remat: str) -> None:
    train = TrainConfig(remat=remat)  # type: ignore[arg-type]
    model = make_objective(MODELS["mooshak"], Config(train=train)).model
    initialize(model.to_empty(device="cpu"), 0)
    assert pack_weights_for_decode(model, matrices(model), len(PROMPTS), NEW) is model
