"""Fine-tuning on conversations: one loss and gradient, however rows are packed, padded or split."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest

from mooshak.config.model import ModelConfig
from mooshak.config.sections import Config, OptimizerConfig, ParallelConfig, TrainConfig
from mooshak.data.packing import IGNORE_INDEX, Batch
from mooshak.data.samples import Sample, best_fit, make_rows
from mooshak.numerics.neftune import noise_keys, noise_scales
from parity.backends import Backend, JaxBackend, TorchBackend
from parity.backends.base import Step
from parity.checker import random_checkpoint
from parity.distance import Arrays, worst_tensor

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("compiled_in_haste")]

T, VOCAB = 40, 96
MODEL = ModelConfig(vocab_size=VOCAB, dim=24, n_layers=2, n_heads=3, hidden_dim=40, max_seq_len=T)
LLAMA = replace(MODEL, architecture="llama", n_kv_heads=1, sliding_window=6)
CONFIG = Config(
    model=MODEL,
    optimizer=OptimizerConfig(learning_rate=1e-2, max_grad_norm=0.5),
    train=TrainConfig(batch_size=8, dtype="float64", loss_chunk=50, steps=3),
    parallel=ParallelConfig(mesh="data=1"),
)
END = 7  # Also the token of the padding: labels go by position, not by id.


def samples(seed: int, n: int) -> list[Sample]:
    """Return conversations of unequal lengths with one or two answers, which end in `END`."""
    random, made = np.random.default_rng(seed), []
    for number in range(n):
        size = int(random.integers(4, 20))
        tokens = random.integers(0, VOCAB, size + 1, dtype=np.int32)
        labels = np.full_like(tokens, IGNORE_INDEX)
        start = int(random.integers(1, size))
        tokens[-1] = END
        labels[start:] = tokens[start:]
        if number % 3 == 0 and start > 3:
            labels[1:3] = tokens[1:3]
        made.append(Sample(tokens, labels))
    return made


SAMPLES = samples(0, 13)
N_LABELS = sum(sample.n_labels for sample in SAMPLES)


@pytest.fixture(autouse=True, scope="module")
def environment() -> Iterator[None]:
    with jax.enable_x64():
        yield


@pytest.fixture(scope="module", params=["mooshak", "llama"])
def backends(request: pytest.FixtureRequest) -> tuple[Config, Backend, Backend]:
    model = MODEL if request.param == "mooshak" else LLAMA
    source = random_checkpoint(model)
    return replace(CONFIG, model=model), TorchBackend(source), JaxBackend(source)


def alone(number: int) -> Batch:
    """Return a conversation by itself, without padding or segments."""
    sample = SAMPLES[number]
    return Batch(sample.tokens[None, :-1], sample.labels[None, 1:])


def layouts() -> dict[str, list[Batch]]:
    """Return the conversations in every layout: batches whose sums add up to the same."""
    packed = best_fit([sample.size for sample in SAMPLES], T)
    one_each = [[sample] for sample in SAMPLES]
    rows = [[SAMPLES[i] for i in row] for row in packed]
    assert len(rows) < len(SAMPLES) and len({len(row) for row in rows}) > 1
    padded = make_rows(one_each, T)
    return {
        "packed": [make_rows(rows, T)],
        "packed, padded on the left": [make_rows(rows, T, pad_left=True)],
        "padded on the right": [padded],
        "padded on the left": [make_rows(one_each, T, pad_left=True)],
        "padded less": [make_rows(one_each, 20)],
        "padding is the end token": [
            padded._replace(tokens=np.where(padded.segments == 0, np.int32(END), padded.tokens))
        ],
        "micro-batches": padded.chunk(5),
    }


def total(backend: Backend, config: Config, batches: Sequence[Batch]) -> tuple[float, Arrays]:
    """Return loss and gradients over batches, divided by all labels."""
    loss, gradients = 0.0, dict[str, Any]()
    for batch in batches:
        found = backend.forward_backward(config, batch)
        loss += found.loss / N_LABELS
        for name, gradient in found.gradients.items():
            gradients[name] = gradients.get(name, 0.0) + gradient / N_LABELS
    return loss, gradients


def written_out(backend: Backend, config: Config) -> float:
    """Return the mean loss by its definition, from the logits of each conversation alone."""
    nats = 0.0
    for number, sample in enumerate(SAMPLES):
        (logits_SV,) = backend.forward_backward(config, alone(number)).logits
        for position, label in enumerate(sample.labels[1:]):
            if label != IGNORE_INDEX:
                row_V = logits_SV[position] - logits_SV[position].max()
                nats -= row_V[label] - np.log(np.exp(row_V).sum())
    return nats / N_LABELS


def test_layouts_have_one_loss_and_gradient_in_both(backends: tuple) -> None:
    config, torch_backend, jax_backend = backends
    truth, gradients = total(torch_backend, config, [alone(i) for i in range(len(SAMPLES))])
    assert truth == pytest.approx(written_out(torch_backend, config), rel=1e-13)
    for name, batches in layouts().items():
        for backend in (torch_backend, jax_backend):
            loss, found = total(backend, config, batches)
            assert loss == pytest.approx(truth, rel=1e-12, abs=0), (name, backend.name)
            assert worst_tensor(found, gradients)[1] <= 1e-12, (name, backend.name)


def test_end_token_and_its_gradient_count(backends: tuple) -> None:
    """Without the labels of end tokens the loss and the gradient of the head's row are others."""
    config, torch_backend, _ = backends
    batch = layouts()["packed"][0]
    without = np.where(batch.labels == END, np.int32(IGNORE_INDEX), batch.labels)
    assert (without != batch.labels).sum() >= len(SAMPLES)
    one, other = (
        torch_backend.forward_backward(config, batch._replace(labels=labels)).gradients
        for labels in (batch.labels, without)
    )
    row = np.linalg.norm(one["lm_head.weight"][END])
    assert np.linalg.norm(one["lm_head.weight"][END] - other["lm_head.weight"][END]) > 0.1 * row


def curves(parts: Sequence[int], batches: Sequence[Batch]) -> Iterator[list[Step]]:
    """Yield the steps in torch and in JAX, with these numbers of micro-batches."""
    source = random_checkpoint(MODEL)
    for backend in (TorchBackend(source), JaxBackend(source)):
        for n in parts:
            train = replace(CONFIG.train, gradient_accumulation_steps=n)
            yield list(backend.steps(replace(CONFIG, train=train), batches))


def test_steps_are_the_same_under_every_split() -> None:
    """Rows with unequal numbers of labels, one of padding only: the denominator is global."""
    batches = []
    for seed in range(3):
        chosen = [[sample] for sample in samples(seed + 1, 7)]
        batches.append(make_rows([*chosen, []], T))
    assert_equal(curves((1, 2, 4), batches))
    # A mean of the means of micro-batches is far away.
    counts = [(batch.labels != IGNORE_INDEX).sum() for batch in batches[0].chunk(2)]
    assert counts[1] > 1.2 * counts[0]


def assert_equal(found: Iterator[list[Step]]) -> list[Step]:
    """All curves are the first one, which is returned."""
    truth = next(found)
    for steps in found:
        for step, wanted in zip(steps, truth, strict=True):
            assert step.loss == pytest.approx(wanted.loss, rel=1e-12, abs=0)
            assert step.norm == pytest.approx(wanted.norm, rel=1e-12, abs=0)
            assert worst_tensor(step.params, wanted.params)[1] <= 1e-12
    return truth


def test_neftune_is_the_same_in_both_and_under_every_split() -> None:
    plain = make_rows([[sample] for sample in samples(1, 8)], T)
    assert plain.segments is not None
    scales = noise_scales(plain.segments, 5.0, MODEL.dim)
    noisy = [
        plain._replace(noise_keys=noise_keys(0, step, range(8), T), noise_scales=scales)
        for step in range(2)
    ]
    with_noise = assert_equal(curves((1, 4), noisy))
    (without,) = TorchBackend(random_checkpoint(MODEL)).steps(CONFIG, [plain])
    assert abs(with_noise[0].loss / without.loss - 1) > 1e-4
