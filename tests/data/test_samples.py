"""Rows of conversations: best-fit packing, buckets, epochs, cut answers, counted skips."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mooshak.config.sections import Config, SourceConfig
from mooshak.config.sft import SFTConfig
from mooshak.data.conversation_batches import BucketedRows, ConversationData, PackedRows
from mooshak.data.packing import IGNORE_INDEX, Batch
from mooshak.data.samples import Sample, best_fit, make_rows
from mooshak.errors import InputError
from mooshak.tokenizer.base import Tokenizer

NO = IGNORE_INDEX


def sample(*tokens: int, labels: int) -> Sample:
    """Return a sample whose last `labels` tokens are trained."""
    ids = np.array(tokens, np.int32)
    return Sample(ids, np.where(np.arange(len(ids)) < len(ids) - labels, np.int32(NO), ids))


def test_rows_are_shifted_segmented_and_padded() -> None:
    rows = [[sample(5, 6, 7, 2, labels=2), sample(8, 9, 2, labels=1)], []]
    expected = Batch(
        tokens=[[5, 6, 7, 8, 9, 0], [0] * 6],
        labels=[[NO, 7, 2, NO, 2, NO], [NO] * 6],
        segments=[[1, 1, 1, 2, 2, 0], [0] * 6],
        positions=[[0, 1, 2, 0, 1, 0], [0] * 6],
    )
    for found, wanted in zip(make_rows(rows, 6), expected, strict=True):
        if wanted is None:
            assert found is None
        else:
            assert found.dtype == np.int32 and found.tolist() == wanted
    left = make_rows(rows, 6, pad_left=True)
    assert left.tokens[0].tolist() == [0, 5, 6, 7, 8, 9]
    assert left.labels[0].tolist() == [NO, NO, 7, 2, NO, 2]


def test_best_fit_fills_the_fullest_row() -> None:
    assert best_fit([6, 3, 4, 5, 2, 10], 10) == [[5], [0, 2], [3, 1, 4]]
    sizes = np.random.default_rng(0).integers(1, 33, 500).tolist()
    rows = best_fit(sizes, 64)
    assert sorted(i for row in rows for i in row) == list(range(500))
    assert max(sum(sizes[i] for i in row) for row in rows) <= 64
    assert len(rows) <= 1.03 * sum(sizes) / 64


@pytest.mark.parametrize("plan", [PackedRows, BucketedRows])
def test_epoch_has_each_conversation_once(plan: Any) -> None:
    sizes = np.random.default_rng(1).integers(1, 65, 103).tolist()
    made = plan(sizes, 64, 4, seed=7)
    n = len(made.packed) if plan is PackedRows else len(made.batches) * 4
    orders = []
    for epoch in range(2):
        seen, order = Counter[int](), []
        for row in range(epoch * n, epoch * n + n):
            T, rows = made.rows(row // 4)
            assert len(rows) == 4 and sum(sizes[i] for i in rows[row % 4]) <= T <= 64
            seen.update(rows[row % 4])
            order += rows[row % 4]
        assert seen == Counter(range(103))
        orders.append(order)
    assert orders[0] != orders[1]
    assert plan(sizes, 64, 4, seed=8).rows(0) != made.rows(0)
    if plan is BucketedRows:  # No row is longer than its bucket needs.
        assert {made.rows(step)[0] for step in range(n // 4)} == {16, 32, 64}


def data(config: Config, path: Path, *pairs: tuple[str, str], **sft: Any) -> ConversationData:
    """Return the data of prompts and answers in a file."""
    lines = [json.dumps({"prompt": one, "completion": two}) for one, two in pairs]
    path.write_text("\n".join(lines))
    source = SourceConfig("pairs", kind="jsonl", language="hi", path=str(path))
    of_data = replace(config.data, sources=[source], format="conversations")
    return ConversationData(replace(config, data=of_data, sft=SFTConfig(**sft)))


def test_cut_answers_are_counted(
    tiny_config: Config, tiny_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    config = replace(tiny_config, data=replace(tiny_config.data, validation_fraction=0.0))
    long = "the lion " * 30
    found = data(config, tmp_path / "a.jsonl", ("a", "mouse"), ("the", long))
    ids = tiny_tokenizer.encode(long)
    lost = len(tiny_tokenizer.encode("the", bos=True)) + len(ids) + 1 - (config.T + 1)
    assert found.counts | {"cut": 1, "cut_tokens": lost, "skipped": 0} == found.counts
    assert f"1 cut at 32 tokens, which lost {lost} tokens of answers" in found.summary
    batch = found.global_batch(0)
    assert batch.tokens.shape == (8, 32) and (batch.labels != NO).sum() > 8 * 32 / 3


def test_conversations_without_label_are_an_error_or_counted(
    tiny_config: Config, tiny_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    config = replace(tiny_config, data=replace(tiny_config.data, validation_fraction=0.0))
    pairs = [("a", "mouse"), ("the lion " * 30, "mouse"), ("a", " ")]
    path = tmp_path / "a.jsonl"
    with pytest.raises(
        InputError, match=r"line 2: no label is left .* 32 tokens.*max_skipped is 0"
    ):
        data(config, path, *pairs)
    with pytest.raises(
        InputError, match=r"line 3: the answer is empty \(2 .* sft.max_skipped is 1"
    ):
        data(config, path, *pairs, max_skipped=1)
    found = data(config, path, *pairs, max_skipped=2)
    assert found.counts["skipped"] == 2 and "2 skipped without a label" in found.summary


def test_batches_depend_on_step_and_seed_only(
    tiny_config: Config, tiny_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    pairs = [(f"the lion {i}", "चूहा " * (1 + i % 9)) for i in range(90)]
    for packing in ("best_fit", "none"):
        found = data(tiny_config, tmp_path / "a.jsonl", *pairs, packing=packing)
        again = data(tiny_config, tmp_path / "a.jsonl", *pairs, packing=packing)
        assert found.description == again.description
        rows = next(again.batches([5, 2], 3))
        for one, two in zip(rows, found.global_batch(3).rows([5, 2]), strict=True):
            assert np.array_equal(one, two)
        validation = found.validation()["hi"]
        assert 0 < len(validation.tokens) <= 8
        held_out = {row.tobytes() for row in validation.tokens}
        assert not held_out & {row.tobytes() for row in found.global_batch(0).tokens}
        n_train = sum(found.token_counts("hi"))
        assert n_train == sum(one.n_labels for one in found._train) > 0
    other = data(tiny_config, tmp_path / "a.jsonl", *pairs[1:], packing="none")
    assert other.description != found.description


def test_noise_of_a_row_does_not_depend_on_the_others(
    tiny_config: Config, tiny_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    pairs = [(f"the lion {i}", "चूहा " * (1 + i % 9)) for i in range(90)]
    found = data(tiny_config, tmp_path / "a.jsonl", *pairs, neftune_alpha=5.0)
    whole, rows = found.global_batch(3), next(found.batches([5, 2], 3))
    assert whole.noise_keys is not None and whole.noise_scales is not None
    for one, two in zip(rows, whole.rows([5, 2]), strict=True):
        assert np.array_equal(one, two)
    assert ((whole.noise_scales > 0) == (whole.segments > 0)).all()
    assert not np.array_equal(whole.noise_keys, found.global_batch(4).noise_keys)
    assert found.validation()["hi"].noise_keys is None
    plain = data(tiny_config, tmp_path / "a.jsonl", *pairs)
    assert plain.global_batch(3).noise_keys is None and plain.description == found.description


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer": "missing.model"}, "missing.model is missing; fine-tune a checkpoint"),
        ({"weight": 2.0}, "weight: an epoch has each conversation once"),
        ({"shape": {"prompt": "a", "chosen": "b", "rejected": "c"}}, "line 1: .* two answers"),
    ],
)
def test_settings_that_conversations_lack_are_errors(
    changes: dict[str, Any], message: str, tiny_config: Config, tmp_path: Path
) -> None:
    record = changes.get("shape", {"prompt": "a", "completion": "b"})
    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    source = SourceConfig("s", kind="jsonl", path=str(tmp_path / "a.jsonl"))
    other = replace(source, name="t", weight=changes.get("weight", 1.0))
    of_data = replace(tiny_config.data, sources=[source, other], format="conversations")
    tokenizer = tiny_config.tokenizer
    tokenizer = replace(tokenizer, path=changes.get("tokenizer", tokenizer.path))
    with pytest.raises(InputError, match=message):
        ConversationData(replace(tiny_config, data=of_data, tokenizer=tokenizer))
