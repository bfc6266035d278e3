"""Preference objectives: by enumeration, in both frameworks, under every split into rows."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest
import torch

from mooshak.config.dpo import DPOConfig
from mooshak.config.model import ModelConfig
from mooshak.config.sections import Config, DataConfig, OptimizerConfig, TrainConfig
from mooshak.data.packing import IGNORE_INDEX, Batch
from mooshak.data.samples import Sample, make_rows
from mooshak.errors import InputError
from mooshak.numerics.preference import METRICS, Pairs, kto_losses, pair_losses
from mooshak_jax import objectives as jax_objectives
from mooshak_jax import params as jax_params
from mooshak_torch import reference as torch_reference
from mooshak_torch import step as torch_step
from mooshak_torch.distributed import mesh as torch_mesh
from mooshak_torch.model import Model
from mooshak_torch.objectives import PreferenceLM
from mooshak_torch.params import initialize
from parity.backends.jax import canonical
from tests.training.curves import Curve, jax_curve, torch_curve

V, T = 4, 22
MODEL = ModelConfig(vocab_size=V, dim=16, n_layers=1, n_heads=2, hidden_dim=24, max_seq_len=T)
LOSSES = {
    "sigmoid": DPOConfig(beta=0.7),
    "cdpo": DPOConfig(beta=0.7, label_smoothing=0.2),
    "normalized": DPOConfig(beta=3.0, length_normalized=True),
    "robust": DPOConfig("robust", beta=0.7, label_smoothing=0.2),
    "ipo": DPOConfig("ipo", beta=0.4),
    "apo_zero": DPOConfig("apo_zero", beta=0.6),
    "simpo": DPOConfig("simpo", beta=2.0, gamma=0.3),
    "orpo": DPOConfig("orpo", beta=0.3),
}
PAIRS = [
    ([1, 2], [3, 0, 1], [2, 2]),
    ([3], [1], [0, 3, 2]),
    ([0, 1, 2], [2], [3]),
    ([2, 2], [1, 1], [1, 0]),
    ([1], [0, 2, 3], [3, 3, 0]),
    ([3, 1, 0], [2, 0], [1]),
    ([2], [3, 1], [0, 0]),
    ([0, 3], [1, 2], [2, 1, 3]),
]
"""Prompt, chosen answer, rejected answer."""


@pytest.fixture(autouse=True, scope="module")
def environment() -> Iterator[None]:
    with jax.enable_x64():
        yield


@pytest.fixture(scope="module")
def policy() -> Model:
    return initialize(Model(MODEL, "float64"), 3, 0.2)


@pytest.fixture(scope="module")
def reference() -> Model:
    return initialize(Model(MODEL, "float64"), 4, 0.2)


def answer_log_prob(model: Model, prompt: list[int], answer: list[int]) -> float:
    """log p(answer | prompt), from the probabilities of all answers of its length."""
    every = [list(one) for one in itertools.product(range(V), repeat=len(answer))]
    with torch.no_grad():
        logits = model(torch.tensor([prompt + one for one in every])).numpy()
    p_NTV = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    first = len(prompt) - 1
    p_N = [
        math.prod(p[first + i, t] for i, t in enumerate(one))
        for one, p in zip(every, p_NTV, strict=True)
    ]
    assert abs(sum(p_N) - 1) < 1e-12
    return math.log(p_N[every.index(answer)])


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def expected(name: str, pair: tuple, policy: Model, reference: Model) -> tuple[float, float]:
    """The loss of a pair and its reward margin, written out."""
    dpo, (prompt, chosen, rejected) = LOSSES[name], pair
    b, e = dpo.beta, dpo.label_smoothing
    pc, pr = (answer_log_prob(policy, prompt, one) for one in (chosen, rejected))
    rc, rr = (answer_log_prob(reference, prompt, one) for one in (chosen, rejected))
    c, r = pc - rc, pr - rr
    if name == "simpo":
        c, r = pc / len(chosen), pr / len(rejected)
        return -math.log(sigma(b * (c - r) - dpo.gamma)), b * (c - r)
    if name == "orpo":
        c, r = pc / len(chosen), pr / len(rejected)
        odds = [math.exp(x) / (1 - math.exp(x)) for x in (c, r)]
        return -c - b * math.log(sigma(math.log(odds[0] / odds[1]))), b * (c - r)
    if name in ("ipo", "normalized"):
        c, r = c / len(chosen), r / len(rejected)
    h = b * (c - r)
    loss = {
        "sigmoid": -math.log(sigma(h)),
        "normalized": -math.log(sigma(h)),
        "cdpo": -(1 - e) * math.log(sigma(h)) - e * math.log(sigma(-h)),
        "robust": (-(1 - e) * math.log(sigma(h)) + e * math.log(sigma(-h))) / (1 - 2 * e),
        "ipo": (c - r - 1 / (2 * b)) ** 2,
        "apo_zero": 1 - sigma(b * c) + sigma(b * r),
    }[name]
    return loss, h


def samples(pair: tuple) -> list[Sample]:
    prompt, *answers = pair
    return [
        Sample(
            np.array(prompt + one, np.int32),
            np.array([IGNORE_INDEX] * len(prompt) + one, np.int32),
        )
        for one in answers
    ]


def rows(groups: list[list[int]], reference: Model, pad_left: bool = False) -> Batch:
    """A batch with these pairs in each row."""
    made = make_rows([[s for i in row for s in samples(PAIRS[i])] for row in groups], T, pad_left)
    reference_BS = np.zeros((len(groups), 2 * max(map(len, groups))))
    for number, row in enumerate(groups):
        for k, i in enumerate(row):
            prompt, *answers = PAIRS[i]
            for side, one in enumerate(answers):
                reference_BS[number, 2 * k + side] = answer_log_prob(reference, prompt, one)
    return made._replace(reference=reference_BS)


PADDED = [[i] for i in range(8)]
PACKED = [[0, 1], [2, 3], [4], [], [5, 6], [7], [], []]


def config(dpo: DPOConfig, parts: int = 1, **changes: Any) -> Config:
    return Config(
        model=MODEL,
        data=DataConfig(format="preferences"),
        dpo=dpo,
        optimizer=OptimizerConfig(learning_rate=1e-2),
        train=TrainConfig(
            batch_size=8, dtype="float64", loss_chunk=40, gradient_accumulation_steps=parts
        ),
        **changes,
    )


def torch_batch(batch: Batch) -> Batch:
    return torch_mesh.make_parallel(config(DPOConfig())).shard_local_batch(batch)


@pytest.mark.slow
@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_those_of_enumeration(name: str, policy: Model, reference: Model) -> None:
    batch = rows(PACKED, reference)
    objective = PreferenceLM(policy, 40, LOSSES[name])
    policy.zero_grad()
    loss = objective(torch_batch(batch))
    loss.backward()
    found = [expected(name, pair, policy, reference) for pair in PAIRS]
    total, margins = (sum(values) for values in zip(*found, strict=True))
    assert abs(loss.item() - total) <= 1e-12 * abs(total)
    metrics = objective.metrics
    assert list(metrics) == list(METRICS)
    assert abs(metrics["rewards/margins"].item() - margins) < 1e-11
    assert metrics["rewards/accuracies"] == sum(margin > 0 for _, margin in found)
    # The same function and gradients in JAX.
    params = jax_params.initialize(MODEL, "float64", 3, 0.2)
    theirs = jax_objectives.PreferenceLM(
        jax_params.make_graphdef(MODEL, "float64"), 40, LOSSES[name]
    )
    value, grads = jax.jit(jax.value_and_grad(theirs))(params, batch)
    assert abs(float(value) - total) <= 1e-12 * abs(total)
    for key, grad in canonical(grads).items():
        ours = dict(policy.named_parameters())[key].grad.numpy()
        assert np.abs(grad - ours).max() <= 1e-12 * np.abs(ours).max(), key


KTO = DPOConfig("kto", beta=0.8, desirable_weight=1.5, undesirable_weight=0.5)
WEIGHTS = [1.5, -0.5, 1.5, 1.5, -0.5, -0.5, 1.5, -0.5]


def kto_rows(groups: list[list[int]], reference: Model) -> Batch:
    """Answers, each with the answer to another prompt, as rows."""
    batch = rows(groups, reference)
    assert batch.reference is not None
    weights_BP = np.zeros((len(groups), batch.reference.shape[1] // 2))
    for number, row in enumerate(groups):
        weights_BP[number, : len(row)] = [WEIGHTS[i] for i in row]
    return batch._replace(weights=weights_BP)


@pytest.fixture(scope="module")
def near() -> Model:
    """A reference under which the baseline of KTO is positive."""
    return initialize(Model(MODEL, "float64"), 2)


def test_kto_is_that_of_enumeration_under_every_split(near: Model) -> None:
    model = initialize(Model(MODEL, "float64"), 0)
    ratios = np.array(
        [
            [answer_log_prob(m, prompt, one) for one in answers for m in (model, near)]
            for prompt, *answers in PAIRS
        ]
    )
    answer, other = ratios[:, 0] - ratios[:, 1], ratios[:, 2] - ratios[:, 3]
    z = max(0.0, other.mean())
    assert z > 0.01
    h = KTO.beta * np.sign(WEIGHTS) * (answer - z)
    loss = float(np.mean(np.abs(WEIGHTS) * (1 - 1 / (1 + np.exp(-h)))))
    truth = torch_curve(config(KTO), kto_rows(PADDED, near))
    np.testing.assert_allclose([truth[0][0], truth[0][2]], [loss, z], rtol=1e-12)
    assert truth[0][3] == np.mean(h > 0)
    for parts, layout in ((8, PADDED), (2, PACKED)):
        np.testing.assert_allclose(
            torch_curve(config(KTO, parts), kto_rows(layout, near)), truth, rtol=1e-11
        )


@pytest.mark.slow
def test_jax_takes_the_same_steps_of_kto(near: Model) -> None:
    truth = torch_curve(config(KTO), kto_rows(PADDED, near))
    np.testing.assert_allclose(jax_curve(config(KTO, 2), kto_rows(PACKED, near)), truth, rtol=1e-11)


@pytest.mark.parametrize("parts", [2, 8])
@pytest.mark.parametrize("name", ["sigmoid", "orpo"])
def test_splits_and_packing_change_no_step(name: str, parts: int, reference: Model) -> None:
    truth = torch_curve(config(LOSSES[name]), rows(PADDED, reference))
    assert truth[0][0] != truth[1][0]
    for layout, left in ((PADDED, True), (PACKED, False)):
        found = torch_curve(config(LOSSES[name], parts), rows(layout, reference, left))
        np.testing.assert_allclose(found, truth, rtol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("parts, mesh", [(1, "data=1"), (2, "data=2,fsdp=2")])
def test_jax_takes_the_same_steps(parts: int, mesh: str, reference: Model) -> None:
    settings = config(LOSSES["sigmoid"], parts)
    settings = replace(settings, parallel=replace(settings.parallel, mesh=mesh))
    truth = torch_curve(config(LOSSES["sigmoid"]), rows(PADDED, reference))
    np.testing.assert_allclose(jax_curve(settings, rows(PACKED, reference)), truth, rtol=1e-12)


def test_float32_metrics_stay_float32_next_to_float64() -> None:
    with jax.enable_x64(True):
        pairs = Pairs(*jax.numpy.arange(6, dtype="float32"))
        found = pair_losses(pairs, DPOConfig(), jax.numpy)[1]
        found |= kto_losses(pairs, pairs.n_chosen, pairs.chosen, DPOConfig("kto"), jax.numpy)[1]
    assert {value.dtype.name for value in found.values()} == {"float32"}


def test_first_loss_of_dpo_is_ln_2() -> None:
    itself = initialize(Model(MODEL, "float64"), 0)
    curve = torch_curve(config(DPOConfig()), rows(PACKED, itself))
    assert abs(curve[0][0] - math.log(2)) < 1e-12
    assert abs(curve[0][4]) < 1e-12  # Margins.
    assert curve[1][0] < math.log(2) - 1e-4 and curve[1][4] > 1e-4


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"label_smoothing": 0.5}, r"dpo.label_smoothing must be at least 0 and below 0.5"),
        ({"loss": "ipo", "label_smoothing": 0.1}, r"is one of sigmoid, robust, simpo, not of ipo"),
        ({"beta": 0.0}, r"dpo.beta must be above 0"),
    ],
)
def test_wrong_settings_are_named(settings: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        DPOConfig(**settings)


def live_curve(is_trained: bool) -> Curve:
    """The steps of `torch_curve` with a live reference; `is_trained` plants a fault."""
    settings = config(DPOConfig(beta=0.7, precompute_reference=False))
    parallel, curve = torch_mesh.make_parallel(settings), []
    objective, optimizer = torch_step.make_state(settings, parallel, None, None)
    frozen = torch_reference.make_reference(objective, settings, parallel, None)  # type: ignore[arg-type]
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    without = rows(PACKED, initialize(Model(MODEL, "float64"), 5))
    local = parallel.shard_local_batch(without)
    for _ in range(3):
        reference = objective if is_trained else frozen
        batch = torch_reference.add_reference(reference, local, settings)
        loss, norm = torch_step.train_step(objective, optimizer, batch, 1e-2, settings, parallel)
        curve.append((loss.item(), norm.item(), *map(float, objective.metrics.values())))
    return curve


def test_live_reference_is_the_initial_model_and_frozen() -> None:
    itself = initialize(Model(MODEL, "float64"), 0)
    truth = torch_curve(config(LOSSES["sigmoid"]), rows(PACKED, itself))
    found = live_curve(is_trained=False)
    # But for the accuracies of the first step, whose margins are rounding.
    np.testing.assert_allclose([row[:5] for row in found], [row[:5] for row in truth], atol=1e-12)
    assert found[2][0] < math.log(2) - 1e-4
    wrong = live_curve(is_trained=True)
    assert all(abs(row[0] - math.log(2)) < 1e-12 for row in wrong)
