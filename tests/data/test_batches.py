"""Batches: a pure function of seed, step and configuration, for any number of processes."""

import hashlib
import pickle
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path

import grain
import numpy as np
import pytest

from mooshak.config.sections import Config
from mooshak.data.batches import (
    Mixture,
    PackedSequences,
    WeightedInterleave,
    batches_of_rows,
    global_batch,
    train_batches,
    validation_sequences,
)
from mooshak.data.packing import Batch
from mooshak.data.shards import TokenShards, load_or_prepare_shards
from mooshak.errors import InputError


@pytest.fixture(scope="module")
def config(tiny_config: Config) -> Config:
    load_or_prepare_shards(tiny_config, progress=False)
    return tiny_config


def take(config: Config, steps: int, **options: int) -> list[np.ndarray]:
    """The rows [B, T + 1] of batches: inputs, and the last label."""
    return list(map(rows_of, islice(train_batches(config, **options), steps)))


def rows_of(batch: Batch) -> np.ndarray:
    assert batch.segments is None and batch.positions is None
    assert (batch.tokens[:, 1:] == batch.labels[:, :-1]).all()
    return np.concatenate([batch.tokens, batch.labels[:, -1:]], 1)


def global_rows(config: Config, step: int) -> np.ndarray:
    return rows_of(global_batch(config, step))


def sequences(config: Config, source: str = "hi", split: str = "train") -> PackedSequences:
    return PackedSequences(TokenShards(Path(config.data.dir) / source, split), config.T)


def test_sequences_share_one_token(config: Config):
    packed = sequences(config)
    tokens = packed.shards.window(0, len(packed.shards))
    assert len(packed) == (len(tokens) - 1) // config.T > 100
    for i in range(len(packed)):
        assert (packed[i] == tokens[i * config.T : i * config.T + config.T + 1]).all()
    assert len(pickle.dumps(packed)) < 1000


@pytest.mark.parametrize("tokens", [0, 1, 32, 33, 64, 65])
def test_number_of_sequences(tokens: int):
    class Fake:
        directory, split = "d", "train"

        def __len__(self) -> int:
            return tokens

    if tokens < 33:
        with pytest.raises(InputError, match=f"has {tokens} tokens, a sequence needs 33"):
            PackedSequences(Fake(), 32)
    else:
        assert len(PackedSequences(Fake(), 32)) == (2 if tokens == 65 else 1)


@pytest.mark.parametrize("weights", [[0.6, 0.4], [3.0, 7.0], [1.0], [0.1, 0.2, 0.7], [1e-3, 1.0]])
def test_weights_hold_in_every_prefix(weights: list[float]):
    shares = np.array(weights) / sum(weights)
    chosen = WeightedInterleave(weights)
    counts = Counter()
    for k in range(5000):
        source, index = chosen[k]
        assert index == counts[source]  # Each source is read from its beginning, without gaps.
        counts[source] += 1
        error = np.abs([counts[i] - share * (k + 1) for i, share in enumerate(shares)])
        assert error.max() < (1 if len(weights) < 3 else 2)
    assert [counts[i] for i in range(len(weights))] == pytest.approx(5000 * shares, abs=1)


def test_weights_hold_far_out():
    """With a rounded weight, the rows would be off by thousands."""
    source, index = WeightedInterleave([3 / 7, 4 / 7])[7 * 10**9]
    assert index == (3 if source == 0 else 4) * 10**9


def test_mixture_reads_the_sources_by_weight(config: Config):
    rows = Mixture(config)
    known = {row.tobytes() for row in sequences(config, "hi")}
    share = np.mean([rows[k].tobytes() in known for k in range(500)])
    assert share == 0.6


def test_epochs_cover_everything_once_in_another_order(config: Config):
    source = config.data.sources[0]
    alone = replace(config, data=replace(config.data, sources=[source]))
    packed, rows = sequences(config), Mixture(alone)
    n = len(packed)
    everything = Counter(packed[i].tobytes() for i in range(n))
    epochs = [[rows[epoch * n + i].tobytes() for i in range(n)] for epoch in range(3)]
    for epoch in epochs:
        assert Counter(epoch) == everything
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_order_is_the_one_of_grain(config: Config):
    """The order of the data never changes: it is that of Grain's transformations."""
    shuffled = []
    for source in config.data.sources:
        seed = hashlib.sha256(f"{config.run.seed}/{source.name}".encode()).digest()[:4]
        dataset = grain.MapDataset.source(sequences(config, source.name))
        shuffled.append(dataset.shuffle(seed=int.from_bytes(seed)).repeat())
    chosen, rows = (
        WeightedInterleave([source.weight for source in config.data.sources]),
        Mixture(config),
    )
    for k in (*range(300), 10**9, 2**40):
        source, index = chosen[k]
        assert (rows[k] == shuffled[source][index]).all()


def test_batch_is_a_pure_function_of_the_step(config: Config):
    stream = take(config, 40)
    assert stream[0].shape == (8, 33) and stream[0].dtype == np.int32
    for step in (39, 0, 17):
        assert (stream[step] == global_rows(config, step)).all()
    other_seed = replace(config, run=replace(config.run, seed=1))
    assert (global_rows(config, 0) != global_rows(other_seed, 0)).any()


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_process_reads_any_rows_of_the_batch(config: Config, workers: int):
    rows = [1, 2, 6]
    divided = replace(config, data=replace(config.data, workers=workers))
    for step, batch in enumerate(islice(batches_of_rows(divided, rows, 3), 4), 3):
        assert (rows_of(batch) == global_rows(config, step)[rows]).all()


def test_inputs_and_targets_are_shifted_by_one(config: Config):
    """The rows are windows of the text: what is predicted is what follows."""
    batch = global_rows(config, 3)
    text = [sequences(config, name).shards for name in ("hi", "en")]
    tokens = [shards.window(0, len(shards)).tobytes() for shards in text]
    assert all(any(row.tobytes() in t for t in tokens) for row in batch)


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("start_step", [0, 5])
def test_processes_only_divide_the_batch(config: Config, processes: int, start_step: int):
    parts = [
        take(config, 6, start_step=start_step, process=p, processes=processes)
        for p in range(processes)
    ]
    for i in range(6):
        together = np.concatenate([part[i] for part in parts])
        assert (together == global_rows(config, start_step + i)).all()


@pytest.mark.slow
@pytest.mark.parametrize(("process", "processes"), [(0, 1), (1, 2)])
def test_workers_change_nothing(config: Config, process: int, processes: int):
    options = {"start_step": 3, "process": process, "processes": processes}
    with_workers = replace(config, data=replace(config.data, workers=2))
    expected, found = take(config, 7, **options), take(with_workers, 7, **options)
    assert all((a == b).all() for a, b in zip(expected, found, strict=True))


def test_late_step_is_reached_without_reading_earlier_ones(config: Config):
    (batch,) = take(config, 1, start_step=10**9, process=1, processes=2)
    assert (batch == global_rows(config, 10**9)[4:]).all()


def test_changed_source_keeps_the_order_of_the_others(config: Config):
    only = [replace(config, data=replace(config.data, sources=[s])) for s in config.data.sources]
    first_hi = [row.tobytes() for row in global_rows(only[0], 0)]
    mixed = [row.tobytes() for row in np.concatenate(take(config, 3))]
    assert [row for row in mixed if row in first_hi] == first_hi


def test_indivisible_batch_is_refused(config: Config):
    with pytest.raises(InputError, match="batch_size 8 is not divisible by 3 processes"):
        train_batches(config, processes=3)
    with pytest.raises(InputError, match="process 2 is not in"):
        train_batches(config, process=2, processes=2)


def test_too_little_text(config: Config):
    model = replace(config.model, max_seq_len=10**6)
    train = replace(config.train, sequence_length=10**6)
    with pytest.raises(InputError, match="a sequence needs 1000001; add text or lower"):
        train_batches(replace(config, model=model, train=train))


def test_validation_is_fixed_and_spread_out(config: Config):
    found = validation_sequences(config)
    assert list(found) == ["hi", "en"]
    for language, batch in found.items():
        packed, rows = sequences(config, language, "validation"), rows_of(batch)
        assert rows.shape == (8, 33) and rows.dtype == np.int32
        chosen = [i * len(packed) // 8 for i in range(8)]
        assert (rows == np.stack([packed[i] for i in chosen])).all()
    for most in (0, 10**6):
        every = replace(config, evaluate=replace(config.evaluate, sequences=most))
        rows = rows_of(validation_sequences(every)["hi"])
        assert len(rows) == len(sequences(config, "hi", "validation"))


def test_validation_of_a_language_with_two_sources(config: Config):
    sources = [replace(source, language="hi") for source in config.data.sources]
    both = replace(config, data=replace(config.data, sources=sources))
    rows = rows_of(validation_sequences(both)["hi"])
    known = {row.tobytes() for row in sequences(config, "en", "validation")}
    assert 0 < sum(row.tobytes() in known for row in rows) < len(rows)


def test_validation_is_not_trained_on(config: Config):
    steps = 2 * len(sequences(config)) // 8
    trained = {row.tobytes() for batch in take(config, steps) for row in batch}
    found = map(rows_of, validation_sequences(config).values())
    held_out = [row.tobytes() for rows in found for row in rows]
    assert not trained & set(held_out)


def test_too_little_validation(config: Config):
    assert (
        validation_sequences(replace(config, data=replace(config.data, validation_fraction=0.0)))
        == {}
    )
    long = replace(
        config,
        model=replace(config.model, max_seq_len=10**6),
        train=replace(config.train, sequence_length=10**6),
    )
    with pytest.raises(InputError, match=r"validation split in language hi has \d+ tokens"):
        validation_sequences(long)
