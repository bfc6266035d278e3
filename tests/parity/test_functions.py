"""From operation to training step: torch and JAX against each other in float64.

The sizes all differ, and grouped heads are among them: a missing transpose cannot pass.
"""

import math
from dataclasses import replace
from itertools import product
from pathlib import Path

import jax
import numpy as np
import pytest
import torch

from mooshak.config.model import ModelConfig
from mooshak.data.packing import make_batch
from mooshak_jax import param_names as jax_param_names
from mooshak_jax import params as jax_params
from mooshak_jax import step as jax_step
from mooshak_jax.distributed import mesh as jax_mesh
from mooshak_torch.model import Model
from parity import checker, comparisons, distance, tolerances
from parity.backends import JaxBackend, TorchBackend, canonical
from parity.convert import convert

MODEL = ModelConfig(vocab_size=192, dim=24, n_layers=2, n_heads=3, hidden_dim=40, max_seq_len=48)
GROUPED = ModelConfig(
    vocab_size=128, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=20, max_seq_len=40
)

LLAMA = ModelConfig(
    architecture="llama",
    vocab_size=128,
    dim=24,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    head_dim=10,
    hidden_dim=36,
    max_seq_len=40,
)
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
# A model with full heads: tests/parity/test_faults.py.
MODELS = {
    "grouped heads": GROUPED,
    "llama, tied, llama3 frequencies, one head of keys, biases, normed queries, a window": replace(
        LLAMA,
        tie_embeddings=True,
        rope_scaling=LLAMA3,
        n_kv_heads=1,
        qkv_bias=True,
        wo_bias=True,
        mlp_bias=True,
        qk_norm=True,
        sliding_window=7,
    ),
}


@pytest.mark.slow
@pytest.mark.usefixtures("compiled_in_haste")
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_check_passes_every_line(model: ModelConfig) -> None:
    source = checker.random_checkpoint(model)
    lines = list(
        checker.check(
            source,
            batch=4,
            time=30,
            decode=20,
            parts=checker.IN_THIS_PROCESS,
            controls=False,
            floors=False,
        )
    )
    assert len(lines) > 40
    assert [line for line in lines if not line.passed] == []


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_training_steps_agree_on_meshes(devices: int, accumulation: int) -> None:
    source = checker.random_checkpoint(MODEL)
    tokens = np.random.default_rng(1).integers(0, 192, (10, 4, 31), dtype=np.int32)
    case = comparisons.ParityCase(TorchBackend(source), JaxBackend(source), tokens, 0)
    config = case.config("float64")
    config = replace(config, train=replace(config.train, gradient_accumulation_steps=accumulation))
    truth = list(case.torch.steps(config, case.batches))
    config = replace(config, parallel=replace(config.parallel, mesh=f"data={devices}"))
    steps = list(case.jax.steps(config, case.batches))
    losses = [[step.loss for step in run] for run in (truth, steps)]
    assert np.allclose(*losses, rtol=1e-13, atol=0)
    params = truth[-1].params
    assert (
        max(distance.distance(steps[-1].params[n], params[n]) for n in params) < tolerances.FLOAT64
    )


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_initial_weights_have_equal_bits_in_both(model: ModelConfig) -> None:
    from mooshak_torch.params import initialize

    ours = initialize(Model(model, "float32"), 7)
    theirs = canonical(jax_params.initialize(model, "float32", 7))
    assert [n for n, _ in ours.named_parameters()] == list(model.parameter_shapes())
    assert theirs.keys() == model.parameter_shapes().keys()
    for name, parameter in ours.named_parameters():
        assert np.array_equal(parameter.detach().numpy(), theirs[name]), name


def test_full_model_has_the_canonical_names_and_shapes() -> None:
    full = ModelConfig()
    with torch.device("meta"):
        ours = {name: tuple(p.shape) for name, p in Model(full).named_parameters()}
    assert ours == full.parameter_shapes()
    for model, scan, fuse in product([full, *MODELS.values()], [False, True], [False, True]):
        laid_out = replace(model, scan_layers=scan, fuse_kernels=fuse)
        leaves = jax_params.abstract_params(laid_out, "float32")
        theirs = {
            part.name: part.shape
            for path, leaf in jax.tree_util.tree_leaves_with_path(leaves)
            for part in jax_param_names.canonical_tensors(path, leaf.shape)
        }
        assert theirs == model.parameter_shapes()


def test_evaluation_agrees_with_a_partial_last_batch() -> None:
    from mooshak_torch.distributed.mesh import make_parallel
    from mooshak_torch.objectives import CausalLM
    from mooshak_torch.step import evaluate

    source = checker.random_checkpoint(MODEL)
    sequences = np.random.default_rng(2).integers(0, 192, (5, 31), dtype=np.int32)
    case = comparisons.ParityCase(TorchBackend(source), JaxBackend(source), sequences[None, :4], 0)
    config = case.config("float64")
    config = replace(config, evaluate=replace(config.evaluate, batch_size=3))
    objective = CausalLM(TorchBackend(source).model("float64"), config.train.loss_chunk)
    batch = make_batch(sequences)
    truth = evaluate(objective, batch, config, make_parallel(config))["loss"]
    config = replace(config, parallel=replace(config.parallel, mesh="data=2"))
    mesh = jax_mesh.make_parallel(config)
    measure = jax_step.make_evaluate(config, mesh)
    params = jax_params.load_params(jax_params.abstract_params(MODEL, "float64", mesh), source.read)
    found = jax_step.evaluate(measure, params, batch, config, mesh)["loss"]
    assert np.isclose(found, truth, rtol=1e-13)


def test_greedy_decoding_of_a_list_equals_one_by_one() -> None:
    from mooshak_torch.decode import generate

    model = TorchBackend(checker.random_checkpoint(MODEL)).model("float64")
    prompts = [[1, 5, 9], [7], [1, 2, 3, 4, 5, 6]]
    together = generate(model, prompts, 12)
    assert [generate(model, [prompt], 12)[0].tolist() for prompt in prompts] == together.tolist()


@pytest.mark.parametrize("kind", ["torch", "jax", "safetensors"])
def test_training_state_round_trip_is_exact(kind: str, tmp_path: Path) -> None:
    from mooshak.checkpoints.base import FULL_SLICE, MOMENTS
    from mooshak.checkpoints.safetensors import write_checkpoint
    from parity.convert import open_any

    drawn = checker.random_checkpoint(MODEL)
    tensors = {
        key: (np.dtype(np.float32), shape)
        for name, shape in MODEL.parameter_shapes().items()
        for key, shape in [(name, shape), *((f"{m}.{name}", shape) for m in MOMENTS)]
    }
    state = {"format_version": 1, "step": 17, "seed": 3, "data": {"sources": []}}

    def read(key: str, rows: slice = FULL_SLICE) -> np.ndarray:
        name = key.removeprefix("exp_avg.").removeprefix("exp_avg_sq.")
        return (drawn.read(name, rows) * len(key)).astype(np.float32)

    write_checkpoint(
        tmp_path / "start", replace(drawn, tensors=tensors, trainer_state=state, read=read)
    )
    convert(tmp_path / "start", tmp_path / "middle", kind)
    assert open_any(tmp_path / "middle").format == kind
    convert(tmp_path / "middle", tmp_path / "end", "safetensors")
    for name in ("config.json", "trainer_state.json", "model.safetensors", "optimizer.safetensors"):
        assert (tmp_path / "start" / name).read_bytes() == (tmp_path / "end" / name).read_bytes()


def test_float32_loss_sums_are_equally_accurate() -> None:
    source = checker.random_checkpoint(replace(LLAMA, max_seq_len=64))
    tokens = np.random.default_rng(1).integers(0, 128, (20, 4, 64), dtype=np.int32)
    case = comparisons.ParityCase(TorchBackend(source), JaxBackend(source), tokens, 0)
    truth = case.torch.losses(case.config("float64"), case.batches)
    apart = [
        distance.distance(backend.losses(case.config("float32"), case.batches), truth)
        for backend in (case.torch, case.jax)
    ]
    # One chain of 252 additions would be off by 1.1e-7.
    assert max(apart) < 8e-8


def test_counts_have_all_digits_and_differences_two() -> None:
    shown = [checker._number(value) for value in (192.0, 0.0, 1.234e-15, math.inf, 2.5)]
    assert shown == ["192", "0", "1.2e-15", "inf", "2.5"]
