"""Bits per byte and the unigram coder: literal values, and counts of a corpus."""

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mooshak.config.parse import dump_config
from mooshak.config.sections import Config, ParallelConfig
from mooshak.data.packing import IGNORE_INDEX, Batch
from mooshak.data.shards import TokenShards, prepare
from mooshak.errors import InputError
from mooshak.evaluation.bits_per_byte import (
    _layout_fits,
    bits_per_byte,
    options,
    report,
    text_bytes,
    token_counts,
    unigram_nats,
    validation_metrics,
)
from mooshak.tokenizer.base import Tokenizer

NO = IGNORE_INDEX


def test_bits_per_byte_of_a_uniform_model_over_single_bytes() -> None:
    labels = np.zeros((3, 10), np.int32)
    assert math.isclose(bits_per_byte(30 * math.log(256), labels, np.ones(256, np.int32)), 8.0)


def test_bits_per_byte_counts_the_bytes_of_labels_only() -> None:
    labels = np.array([[0, 2, NO], [1, NO, 2]], np.int32)
    bytes_V = np.array([1, 3, 5], np.uint8)
    assert text_bytes(labels, bytes_V) == 1 + 5 + 3 + 5
    assert math.isclose(bits_per_byte(7 * math.log(2), labels, bytes_V), 0.5)


def test_text_bytes_do_not_overflow() -> None:
    assert text_bytes(np.zeros(1000, np.int32), np.array([255], np.uint8)) == 255_000


def test_unigram_coder_adds_one_to_each_count() -> None:
    # Laplace: 4, 1 and 3 of 8 where 3, 0 and 2 of 5 were counted; 2^-1 2^-1 2^-3 in all.
    nats = unigram_nats(np.array([3, 0, 2]), np.array([[0, NO, 0, 1]]))
    assert math.isclose(nats, 5 * math.log(2), rel_tol=1e-15)
    nats = unigram_nats(np.array([3, 0, 2]), np.array([[2, 2]]))
    assert math.isclose(nats, 2 * math.log(8 / 3), rel_tol=1e-15)


def test_tokens_are_counted_per_language(fresh_config: Config, tiny_tokenizer: Tokenizer) -> None:
    prepare(fresh_config, tiny_tokenizer, progress=False)
    for language in ("hi", "en"):
        shards = TokenShards(Path(fresh_config.data.dir) / language, "train")
        counted = Counter(shards.window(0, len(shards)).tolist())
        found = token_counts(fresh_config, language)
        assert found.shape == (512,) and {i: int(n) for i, n in enumerate(found) if n} == counted


def test_validation_loss_is_per_token_of_all_languages() -> None:
    batches = {
        "hi": Batch(np.zeros((1, 3)), np.array([[0, 1, NO]])),
        "en": Batch(np.ones((1, 3)), np.array([[1, 1, 0]])),
    }
    nats = {0.0: 4 * math.log(2), 1.0: 6 * math.log(2)}
    found = validation_metrics(
        lambda batch: nats[batch.tokens[0, 0]], batches, np.array([1, 3], np.uint8)
    )
    assert math.isclose(found.pop("validation_loss"), 10 * math.log(2) / 5)
    assert found == pytest.approx({"bits_per_byte_hi": 4 / 4, "bits_per_byte_en": 6 / 7})


def test_report_is_a_table_or_an_object(capsys: pytest.CaptureFixture[str]) -> None:
    names = ("tokens", "loss", "bits_per_byte", "unigram_bits_per_byte", "ratio", "bytes")
    scores = {"hi": dict(zip(names, (1234, 2.5, 0.75, 1.5, 2.0, 99), strict=True))}
    report(scores, as_json=True)
    assert json.loads(capsys.readouterr().out) == scores
    report(scores, as_json=False)
    row = next(line for line in capsys.readouterr().out.splitlines() if "hi" in line)
    assert row.replace("│", " ").split() == ["hi", "1,234", "2.5000", "0.7500", "1.5000", "2.00"]


@pytest.mark.parametrize(
    ("module", "mesh", "strategy", "world", "fits"),
    [
        ("mooshak_torch.evaluate", "", "auto", "", True),
        ("mooshak_torch.evaluate", "data=1", "single", "1", True),
        ("mooshak_torch.evaluate", "fsdp=2", "auto", "", False),
        ("mooshak_torch.evaluate", "data=-1", "ddp", "1", False),
        ("mooshak_torch.evaluate", "fsdp=2", "auto", "2", True),
        ("mooshak_jax.evaluate", "fsdp=2", "auto", "", True),
    ],
)
def test_layout_of_a_run_is_used_where_it_fits(
    module: str, mesh: str, strategy: str, world: str, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", world)
    config = Config(parallel=ParallelConfig(mesh=mesh, strategy=strategy))  # type: ignore[arg-type]
    assert _layout_fits(config, module) is fits


@pytest.mark.parametrize("given", [False, True])
def test_configuration_is_that_of_the_run(
    given: bool, tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    checkpoint = tmp_path / "run" / "checkpoints" / "8"
    (checkpoint / "dcp").mkdir(parents=True)
    config = replace(tiny_config, parallel=ParallelConfig(mesh="fsdp=2"))
    (tmp_path / "run" / "config.yaml").write_text(dump_config(config), "utf-8")
    words = ["--mesh", "data=2"] if given else []
    monkeypatch.setattr("sys.argv", ["evaluate", *words, str(checkpoint), "--device", "cpu"])
    found, arguments = options("mooshak_torch.evaluate", "Evaluate.")
    assert found.parallel == ParallelConfig(mesh="data=2" if given else "")
    assert arguments.source == checkpoint and found.model == config.model
    words = ["evaluate", str(checkpoint), "--data.validation_fraction", "0"]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(InputError, match="no text is held out"):
        options("mooshak_torch.evaluate", "Evaluate.")
