"""Policy objectives: by enumeration, in both frameworks, under every split into rows."""

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest
import torch

from mooshak.config.grpo import GRPOConfig
from mooshak.config.model import ModelConfig
from mooshak.config.sections import Config, DataConfig, OptimizerConfig, TrainConfig
from mooshak.data.packing import Batch
from mooshak.data.rollouts import Rollout, make_policy_rows
from mooshak.errors import InputError
from mooshak.numerics.grpo import (
    Tokens,
    group_advantages,
    kl_estimates,
    metric_names,
    token_weights,
)
from mooshak_jax import objectives as jax_objectives
from mooshak_jax import params as jax_params
from mooshak_torch.distributed import mesh as torch_mesh
from mooshak_torch.model import Model
from mooshak_torch.objectives import PolicyLM
from mooshak_torch.params import initialize
from parity.backends.jax import canonical
from tests.training.curves import jax_curve, torch_curve

V, T = 4, 22
MODEL = ModelConfig(vocab_size=V, dim=16, n_layers=1, n_heads=2, hidden_dim=24, max_seq_len=T)
BASE = GRPOConfig(num_generations=4, max_completion_length=5, epsilon=0.1)
LOSSES = {
    "dapo": replace(BASE, epsilon_high=0.3),
    "grpo": replace(BASE, loss_type="grpo", temperature=0.7, beta=0.3),
    "dr_grpo": replace(BASE, loss_type="dr_grpo", scale_rewards="none", temperature=1.6),
    "gspo": replace(
        BASE, loss_type="grpo", importance_sampling_level="sequence", epsilon=0.02, beta=0.2
    ),
}
PROMPTS = ([1, 2], [3])
ANSWERS = ([3, 0, 1], [2, 2], [1], [0, 3, 2, 1], [2], [3, 3, 0], [1, 0], [2, 1, 3, 0, 0])
REWARDS = (1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 1.0, 0.5)
"""Two groups of four samples."""


@pytest.fixture(autouse=True, scope="module")
def environment() -> Iterator[None]:
    with jax.enable_x64():
        yield


@pytest.fixture(scope="module")
def policy() -> Model:
    return initialize(Model(MODEL, "float64"), 3, 0.2)


@pytest.fixture(scope="module")
def old() -> Model:
    """The model that sampled; near the policy, so that only some ratios are clipped."""
    model = initialize(Model(MODEL, "float64"), 3, 0.2)
    other = dict(initialize(Model(MODEL, "float64"), 5, 0.2).named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(other[name]).div_(2)
    return model


@pytest.fixture(scope="module")
def reference() -> Model:
    return initialize(Model(MODEL, "float64"), 4, 0.2)


def answer_log_probs(model: Model, i: int, temperature: float) -> list[float]:
    """log p of each token of answer i: from the probabilities of all answers of its length."""
    prompt, answer = PROMPTS[i // 4], ANSWERS[i]
    every = [list(one) for one in itertools.product(range(V), repeat=len(answer))]
    with torch.no_grad():
        logits = model(torch.tensor([prompt + one for one in every])).numpy() / temperature
    p_NTV = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    joint = np.array(
        [
            np.prod([p[len(prompt) - 1 + t, token] for t, token in enumerate(one)])
            for one, p in zip(every, p_NTV, strict=True)
        ]
    )
    assert abs(joint.sum() - 1) < 1e-12
    # p(first t tokens) is the sum over all answers that begin with them.
    starts = [1.0] + [
        sum(p for one, p in zip(every, joint, strict=True) if one[:t] == answer[:t])
        for t in range(1, len(answer) + 1)
    ]
    return [float(np.log(b / a)) for a, b in itertools.pairwise(starts)]


def samples(old: Model, grpo: GRPOConfig) -> list[Rollout]:
    rewards = np.array(REWARDS).reshape(2, 4)
    advantages = group_advantages(rewards, grpo).ravel()
    return [
        Rollout(
            where="",
            index=i % 4,
            prompt="",
            completion="",
            reward=REWARDS[i],
            advantage=float(advantages[i]),
            is_truncated=False,
            prompt_ids=PROMPTS[i // 4],
            completion_ids=ANSWERS[i],
            old_log_probs=answer_log_probs(old, i, grpo.temperature),
        )
        for i in range(8)
    ]


PADDED = [[i] for i in range(8)]
PACKED = [[0, 1], [2, 3, 4], [5], [], [6, 7], [], [], []]


def rows(grpo: GRPOConfig, groups: list[list[int]], old: Model, reference: Model) -> Batch:
    """A batch with these samples in each row."""
    found = samples(old, grpo)
    weights = token_weights(list(map(len, ANSWERS)), grpo)
    made = make_policy_rows(
        [[found[i] for i in row] for row in groups], [weights[row] for row in groups], T
    )
    if not grpo.beta:
        return made
    others = [
        [
            replace(one, old_log_probs=answer_log_probs(reference, i, grpo.temperature))
            for i, one in zip(row, (found[i] for i in row), strict=True)
        ]
        for row in groups
    ]
    theirs = make_policy_rows(others, [weights[row] for row in groups], T)
    return made._replace(reference=theirs.old_log_probs)


def expected(grpo: GRPOConfig, policy: Model, old: Model, reference: Model) -> dict[str, float]:
    """The loss of the batch, and its mean metrics, written out."""
    rewards = np.array(REWARDS).reshape(2, 4)
    advantages = rewards - rewards.mean(1, keepdims=True)
    if grpo.scale_rewards == "group":
        advantages /= rewards.std(1, ddof=1, keepdims=True) + 1e-4
    low, high = 1 - grpo.epsilon, 1 + (grpo.epsilon_high or grpo.epsilon)
    per_sample, kls, clipped = [], [], {"low": 0, "high": 0}
    for i, A in enumerate(advantages.ravel()):
        p, q, r = (
            np.array(answer_log_probs(m, i, grpo.temperature)) for m in (policy, old, reference)
        )
        ratio = np.exp(p - q)
        used = ratio
        if grpo.importance_sampling_level == "sequence":
            used = np.full(len(p), np.prod(ratio) ** (1 / len(p)))
        kl = ratio * (np.exp(r - p) - (r - p) - 1)
        surrogate = [min(x * A, min(max(x, low), high) * A) for x in used]
        clipped["low"] += sum(x < low and A < 0 for x in used)
        clipped["high"] += sum(x > high and A > 0 for x in used)
        per_sample.append(-np.array(surrogate) + grpo.beta * kl)
        kls += list(kl)
    n, flat = sum(map(len, ANSWERS)), np.concatenate(per_sample)
    loss = {
        "dapo": flat.mean(),
        "grpo": np.mean([one.mean() for one in per_sample]),
        "dr_grpo": flat.sum() / (8 * grpo.max_completion_length),
    }[grpo.loss_type]
    result = {"loss": float(loss)}
    result |= {f"clip_ratio/{end}_mean": clipped[end] / n for end in ("low", "high")}
    return result | ({"kl": float(np.mean(kls))} if grpo.beta else {})


def config(grpo: GRPOConfig, parts: int = 1, **changes: Any) -> Config:
    return Config(
        model=MODEL,
        data=DataConfig(format="prompts"),
        grpo=grpo,
        optimizer=OptimizerConfig(learning_rate=1e-2),
        train=TrainConfig(
            batch_size=8, dtype="float64", loss_chunk=40, gradient_accumulation_steps=parts
        ),
        **changes,
    )


def torch_batch(batch: Batch) -> Batch:
    return torch_mesh.make_parallel(config(BASE)).shard_local_batch(batch)


@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_those_of_enumeration(
    name: str, policy: Model, old: Model, reference: Model
) -> None:
    grpo = LOSSES[name]
    batch = rows(grpo, PACKED, old, reference)
    objective = PolicyLM(policy, 40, grpo)
    policy.zero_grad()
    loss = objective(torch_batch(batch))
    loss.backward()
    truth, n = expected(grpo, policy, old, reference), sum(map(len, ANSWERS))
    assert 0 < truth["clip_ratio/low_mean"] + truth["clip_ratio/high_mean"] < 0.6
    assert abs(loss.item() / n - truth["loss"]) <= 1e-12 * abs(truth["loss"])
    assert tuple(objective.metrics) == metric_names(grpo)
    for key in truth.keys() - {"loss"}:
        assert abs(objective.metrics[key].item() / n - truth[key]) <= 1e-12
    # The same function and gradients in JAX.
    params = jax_params.initialize(MODEL, "float64", 3, 0.2)
    theirs = jax_objectives.PolicyLM(jax_params.make_graphdef(MODEL, "float64"), 40, grpo)
    value, grads = jax.jit(jax.value_and_grad(theirs))(params, batch)
    assert abs(float(value) - loss.item()) <= 1e-12 * abs(loss.item())
    for key, grad in canonical(grads).items():
        ours = dict(policy.named_parameters())[key].grad.numpy()
        assert np.abs(grad - ours).max() <= 1e-12 * np.abs(ours).max(), key


def test_gradient_of_the_kl_term_is_that_of_the_kl(
    policy: Model, old: Model, reference: Model
) -> None:
    """Summed over all next tokens, drawn from another policy than the one that is trained."""
    grpo, prompt = replace(BASE, beta=1.0, temperature=0.7), [1, 2, 0]
    models = {"policy": policy, "old": old, "reference": reference}
    log_p = {
        name: torch.log_softmax(model(torch.tensor([prompt]))[0, -1] / grpo.temperature, 0)
        for name, model in models.items()
    }
    policy.zero_grad()
    kl = (log_p["policy"].exp() * (log_p["policy"] - log_p["reference"].detach())).sum()
    kl.backward()
    truth = {name: p.grad.clone() for name, p in policy.named_parameters()}
    old_V, reference_V = (log_p[name].detach().numpy() for name in ("old", "reference"))
    first = samples(old, grpo)[0]
    every = [
        [replace(first, prompt_ids=prompt, completion_ids=[v], advantage=0.0, old_log_probs=[x])]
        for v, x in enumerate(old_V.tolist())
    ]
    # The weights of the tokens are their probabilities.
    batch = make_policy_rows(every, np.exp(old_V).reshape(V, 1), T)
    reference_BT = np.where(batch.labels >= 0, reference_V[:, None], 0)
    objective = PolicyLM(policy, 40, grpo)
    policy.zero_grad()
    estimate = objective(torch_batch(batch._replace(reference=reference_BT)))
    estimate.backward()
    torch.testing.assert_close(estimate, kl, rtol=1e-12, atol=0)
    for name, p in policy.named_parameters():
        assert (p.grad - truth[name]).abs().max() <= 1e-12 * truth[name].abs().max(), name


def test_kl_estimator_without_ratio_has_another_gradient() -> None:
    """That of KL(p_ref || p), even for tokens drawn from p itself."""
    logits = torch.tensor(np.random.default_rng(0).normal(size=V), requires_grad=True)
    log_p_V, reference_V = torch.log_softmax(logits, 0), torch.full((V,), -np.log(V))
    tokens = Tokens(log_p_V, log_p_V.detach(), reference_V, torch.zeros(V))
    estimate = (log_p_V.detach().exp() * kl_estimates(tokens, torch)).sum()
    (found,) = torch.autograd.grad(estimate, logits, retain_graph=True)
    torch.testing.assert_close(found, log_p_V.detach().exp() - reference_V.exp())
    kl = (log_p_V.exp() * (log_p_V - reference_V)).sum()
    torch.testing.assert_close(estimate, kl)
    (truth,) = torch.autograd.grad(kl, logits)
    assert (found - truth).abs().max() > 0.01


def test_equal_rewards_have_no_advantage() -> None:
    rewards = np.array([[0.1, 0.1, 0.1], [1.0, 0.0, 0.5]])
    for scale in ("group", "batch", "none"):
        found = group_advantages(rewards, replace(BASE, scale_rewards=scale))
        assert not found[0].any() and abs(found[1].sum()) < 1e-12
    assert list(found[1]) == [0.5, -0.5, 0.0]


@pytest.mark.parametrize("parts", [2, 8])
@pytest.mark.parametrize("name", LOSSES)
def test_splits_and_packing_change_no_step(
    name: str, parts: int, old: Model, reference: Model
) -> None:
    grpo = LOSSES[name]
    truth = torch_curve(config(grpo), rows(grpo, PADDED, old, reference))
    assert truth[0][0] != truth[1][0]
    for layout in (PADDED, PACKED):
        found = torch_curve(config(grpo, parts), rows(grpo, layout, old, reference))
        np.testing.assert_allclose(found, truth, rtol=1e-12, atol=1e-13)


@pytest.mark.slow
@pytest.mark.parametrize("name, parts, mesh", [("grpo", 1, "data=1"), ("gspo", 2, "data=2,fsdp=2")])
def test_jax_takes_the_same_steps(
    name: str, parts: int, mesh: str, old: Model, reference: Model
) -> None:
    grpo = LOSSES[name]
    settings = config(grpo, parts)
    settings = replace(settings, parallel=replace(settings.parallel, mesh=mesh))
    truth = torch_curve(config(grpo), rows(grpo, PADDED, old, reference))
    found = jax_curve(settings, rows(grpo, PACKED, old, reference))
    np.testing.assert_allclose(found, truth, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"num_generations": 1}, "grpo.num_generations must be at least 2"),
        ({"temperature": 0.0}, "grpo.temperature must be at least 1e-06"),
        ({"epsilon": 1.0}, "grpo.epsilon must be above 0 and below 1"),
    ],
)
def test_wrong_settings_are_named(settings: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        GRPOConfig(**settings)
