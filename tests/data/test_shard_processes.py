"""Shards that several processes request at once are prepared by one of them."""

import multiprocessing
from dataclasses import replace
from pathlib import Path

import pytest

from mooshak.config.sections import Config
from mooshak.data.shards import load_or_prepare_shards


def ensure(config: Config, queue: multiprocessing.Queue) -> None:
    queue.put(load_or_prepare_shards(config, progress=False)[1])


@pytest.mark.slow
def test_shards_are_made_by_one_process(fresh_config: Config, tmp_path: Path) -> None:
    """As torchrun starts them: nothing is there, the tokenizer included."""
    tokenizer = replace(fresh_config.tokenizer, path=str(tmp_path / "t.model"))
    config = replace(fresh_config, tokenizer=tokenizer)
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    processes = [context.Process(target=ensure, args=(config, queue)) for _ in range(3)]
    for process in processes:
        process.start()
    manifests = [queue.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert manifests[0] == manifests[1] == manifests[2]
