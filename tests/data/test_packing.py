"""Document masks in batches: segments, positions and ignored labels, from text to loss."""

import math
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path

import jax
import numpy as np
import pytest
import torch

from mooshak.config.sections import Config
from mooshak.corpus.filters import in_validation
from mooshak.corpus.readers import documents
from mooshak.data import manifest
from mooshak.data.batches import (
    PackedSequences,
    batches_of_rows,
    global_batch,
    train_batches,
    validation_sequences,
)
from mooshak.data.packing import IGNORE_INDEX, Batch, make_batch, pad_rows
from mooshak.data.shards import TokenShards, prepare
from mooshak.errors import InputError
from mooshak.evaluation.bits_per_byte import bits_per_byte, text_bytes, unigram_nats
from mooshak.tokenizer.base import Tokenizer


def int32(*rows: list[int]) -> np.ndarray:
    return np.array(rows, np.int32)


def assert_equal(batch: Batch, expected: Batch) -> None:
    for name, found, wanted in zip(Batch._fields, batch, expected, strict=True):
        if wanted is None:
            assert found is None, name
        else:
            assert found.dtype == np.int32 and np.array_equal(found, wanted), name


def test_ignored_label_is_that_of_pytorch() -> None:
    assert torch.nn.CrossEntropyLoss().ignore_index == IGNORE_INDEX


def test_make_batch_without_segments_shifts_by_one() -> None:
    rows_BS = int32([1, 7, 8, 2, 1], [5, 2, 1, 9, 2])
    expected = Batch(int32([1, 7, 8, 2], [5, 2, 1, 9]), int32([7, 8, 2, 1], [2, 1, 9, 2]))
    assert_equal(make_batch(rows_BS), expected)


def test_make_batch_restarts_with_each_document() -> None:
    # A complete document and the start of one; the end of one, then one that fills the row; and
    # a document whose first token is the last of the row, a label only.
    rows_BS = int32([1, 7, 8, 2, 1, 6], [5, 2, 1, 9, 9, 9], [4, 4, 4, 4, 2, 1])
    documents_BS = int32([1, 1, 1, 1, 2, 2], [3, 3, 4, 4, 4, 4], [1, 1, 1, 1, 1, 2])
    no = IGNORE_INDEX
    expected = Batch(
        tokens=int32([1, 7, 8, 2, 1], [5, 2, 1, 9, 9], [4, 4, 4, 4, 2]),
        labels=int32([7, 8, 2, no, 6], [2, no, 9, 9, 9], [4, 4, 4, 2, no]),
        segments=int32([1, 1, 1, 1, 2], [3, 3, 4, 4, 4], [1, 1, 1, 1, 1]),
        positions=int32([0, 1, 2, 3, 0], [0, 1, 0, 1, 2], [0, 1, 2, 3, 4]),
    )
    assert_equal(make_batch(rows_BS, documents_BS), expected)


def test_batch_is_a_pytree_and_splits_by_rows() -> None:
    plain = make_batch(np.arange(35, dtype=np.int32).reshape(5, 7))
    masked = make_batch(*np.arange(70, dtype=np.int32).reshape(2, 5, 7))
    for batch, n_arrays in ((plain, 2), (masked, 4)):
        assert len(jax.tree.leaves(batch)) == n_arrays
        doubled = jax.tree.map(lambda array: 2 * array, batch)
        assert isinstance(doubled, Batch)
        assert_equal(doubled, batch.map(lambda array: array + array))
        sizes = [len(part.tokens) for part in batch.chunk(2)]
        assert sizes == [3, 2]
        joined = jax.tree.map(lambda *arrays: np.concatenate(arrays), *batch.chunk(2))
        assert_equal(joined, batch)
        assert_equal(batch.rows([4, 0]), batch.map(lambda array: array[[4, 0]]))
    assert plain.context == {} and list(masked.context) == ["positions_BT", "segments_BT"]


def test_padding_rows_have_no_label_that_counts() -> None:
    batch = make_batch(int32([3, 4, 5]), int32([1, 1, 2]))
    padded = pad_rows(batch, 3)
    assert_equal(padded.rows([0]), batch)
    rest = padded.rows(slice(1, None))
    assert rest.tokens.shape == (2, 2) and (rest.labels == IGNORE_INDEX).all()
    assert not any(array.any() for array in (rest.tokens, rest.segments, rest.positions))
    assert_equal(pad_rows(batch, 1), batch)


@pytest.fixture(scope="module")
def masked(tiny_config: Config, tiny_tokenizer: Tokenizer, tmp_path_factory) -> Config:
    """Shards of about 2,000 tokens, read with document masks."""
    directory = tmp_path_factory.mktemp("masked")
    data = replace(tiny_config.data, dir=str(directory), document_mask=True)
    config = replace(tiny_config, data=data)
    prepare(config, tiny_tokenizer, progress=False)
    return config


def texts_of(config: Config, tokenizer: Tokenizer, source: int, split: str) -> list[list[int]]:
    """The documents of a split as token ids with BOS and EOS."""
    held_out = split == "validation"
    return [
        tokenizer.encode(text, True, True)
        for text in documents(config.data.sources[source], config)
        if in_validation(text, config.data.validation_fraction) == held_out
    ]


def brute_force(texts: list[list[int]], start: int, T: int) -> Batch:
    """One row of a batch, token by token from the documents."""
    stream = [
        (token, number, place)
        for number, text in enumerate(texts)
        for place, token in enumerate(text)
    ]
    row = stream[start : start + T + 1]
    first, in_first = row[0][1], row[0][2]
    tokens, labels, segments, positions = [], [], [], []
    for (token, number, place), (label, next_number, _) in pairwise(row):
        tokens.append(token)
        labels.append(label if number == next_number else IGNORE_INDEX)
        segments.append(number - first + 1)
        positions.append(place - in_first if number == first else place)
    return Batch(*map(int32, (tokens, labels, segments, positions)))


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("source", [0, 1])
def test_segments_are_those_of_the_documents(
    masked: Config, tiny_tokenizer: Tokenizer, source: int, split: str
) -> None:
    texts = texts_of(masked, tiny_tokenizer, source, split)
    shards = TokenShards(Path(masked.data.dir) / masked.data.sources[source].name, split)
    ends = np.cumsum([shard["tokens"] for shard in shards_of(shards)])
    random_ = np.random.default_rng(source)
    # Windows anywhere, and around every border of two shards; up to several shards long.
    for T in (1, 2, 31, 300, 4500):
        last = len(shards) - T - 1
        if last < 0:
            continue
        starts = [*random_.integers(0, last + 1, 8), 0, last]
        starts += [end + shift for end in ends[:-1] for shift in (-T - 1, -T, -T // 2, -1, 0)]
        for start in {int(s) for s in starts if 0 <= s <= last}:
            rows = shards.window(start, T + 1)[None], shards.segments(start, T + 1)[None]
            assert_equal(make_batch(*rows), brute_force(texts, start, T))


def shards_of(shards: TokenShards) -> list[dict]:
    found = manifest.read_manifest(shards.directory)["shards"]
    return [shard for shard in found if shard["split"] == shards.split]


def test_segments_check_their_window(masked: Config) -> None:
    shards = TokenShards(Path(masked.data.dir) / "hi", "train")
    assert len(shards.segments(5, 0)) == 0
    for start, length in ((-1, 2), (len(shards), 1), (0, len(shards) + 1)):
        with pytest.raises(IndexError):
            shards.segments(start, length)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_document_mask_changes_no_token(
    masked: Config, tiny_tokenizer: Tokenizer, workers: int
) -> None:
    plain = replace(masked, data=replace(masked.data, document_mask=False))
    divided = replace(masked, data=replace(masked.data, workers=workers))
    every = [texts_of(masked, tiny_tokenizer, source, "train") for source in (0, 1)]
    streams = [np.concatenate(texts).astype(np.int32).tobytes() for texts in every]
    for step, batch in enumerate(islice(train_batches(divided, 2), 3), 2):
        assert_equal(batch, global_batch(masked, step))
        unmasked = global_batch(plain, step)
        assert np.array_equal(batch.tokens, unmasked.tokens)
        counts = batch.labels != IGNORE_INDEX
        assert 0 < counts.sum() < counts.size
        assert np.array_equal(batch.labels[counts], unmasked.labels[counts])
        assert set(unmasked.labels[~counts]) == {tiny_tokenizer.bos_id}
        for row in range(len(counts)):
            tokens_S = np.append(unmasked.tokens[row], unmasked.labels[row, -1:])
            found = [stream.find(tokens_S.tobytes()) // 4 for stream in streams]
            expected = [
                brute_force(texts, start, masked.T)
                for texts, start in zip(every, found, strict=True)
                if start >= 0
            ]
            assert any(
                all(
                    a is b is None or np.array_equal(a[0], b[row])
                    for a, b in zip(e, batch, strict=True)
                )
                for e in expected
            )
    some = next(batches_of_rows(divided, [6, 1], 4))
    assert_equal(some, global_batch(masked, 4).rows([6, 1]))


def test_validation_has_document_masks(masked: Config, tiny_tokenizer: Tokenizer) -> None:
    every = replace(masked, evaluate=replace(masked.evaluate, sequences=0))
    for source, (_, batch) in enumerate(validation_sequences(every).items()):
        texts = texts_of(masked, tiny_tokenizer, source, "validation")
        for row in range(len(batch.tokens)):
            expected = brute_force(texts, row * masked.T, masked.T)
            assert_equal(batch.rows(slice(row, row + 1)), expected)


def test_document_mask_without_offsets_is_refused() -> None:
    class Old:
        directory, split, has_offsets = "d", "train", False

        def __len__(self) -> int:
            return 100

    assert len(PackedSequences(Old(), 32)) == 3
    with pytest.raises(InputError, match=r"no document offsets; add them .* --data.document_mask"):
        PackedSequences(Old(), 32, document_mask=True)


def test_bits_per_byte_ignores_ignored_labels() -> None:
    token_bytes_V = np.array([1, 2, 4, 8])
    labels_NT = int32([0, 1, IGNORE_INDEX, 2], [IGNORE_INDEX, 1, 1, IGNORE_INDEX])
    assert text_bytes(labels_NT, token_bytes_V) == 1 + 2 + 4 + 2 + 2
    assert math.isclose(bits_per_byte(22 * math.log(2), labels_NT, token_bytes_V), 2.0)
    # With one added to each count the frequencies are 1/2, 1/4, 1/8 and 1/8.
    counts_V = np.array([31, 15, 7, 7])
    nats = (1 + 3 * 2 + 3) * math.log(2)
    assert math.isclose(unigram_nats(counts_V, labels_NT), nats, rel_tol=1e-15)


def test_scores_without_document_mask_are_unchanged(
    masked: Config, tiny_tokenizer: Tokenizer
) -> None:
    """To the last bit the sums over sequences [N, T + 1], as before labels could be ignored."""
    plain = replace(masked, data=replace(masked.data, document_mask=False))
    token_bytes_V = tiny_tokenizer.token_bytes()
    counts_V = np.random.default_rng(0).integers(0, 10**6, 512)
    for batch in validation_sequences(plain).values():
        sequences_NS = np.concatenate([batch.tokens, batch.labels[:, -1:]], 1)
        n_bytes = int(token_bytes_V[sequences_NS[:, 1:]].sum(dtype=np.int64))
        assert text_bytes(batch.labels, token_bytes_V) == n_bytes
        log_p_V = np.log(counts_V + 1.0) - math.log(counts_V.sum() + len(counts_V))
        assert unigram_nats(counts_V, batch.labels) == -log_p_V[sequences_NS[:, 1:]].sum()
