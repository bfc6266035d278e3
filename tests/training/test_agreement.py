"""Processes of a run fail together, and refuse other settings or data than those of the first."""

from dataclasses import replace

import pytest

from mooshak.checkpoints.together import fail_together
from mooshak.config.sections import Config, ParallelConfig
from mooshak.errors import InputError, PeerError
from mooshak.training.agreement import check_agreement
from tests.peers import Peer, run_peers

SHARDS = {"hindi": {"tokens": 7, "sha256": "a"}}


def test_failure_of_one_process_is_raised_in_all() -> None:
    def process(peer: Peer) -> None:
        with fail_together(peer):
            if peer.rank == 1:
                raise FileNotFoundError(2, "No such file", "/data/train.npy")

    raised = run_peers(3, process)
    assert sorted(raised) == [0, 1, 2] and isinstance(raised[1], FileNotFoundError)
    for rank in (0, 2):
        assert type(raised[rank]) is PeerError
        assert str(raised[rank]) == "rank 1 failed: No such file: /data/train.npy"


def test_processes_without_a_failure_continue() -> None:
    def process(peer: Peer) -> None:
        with fail_together(peer):
            pass

    assert not run_peers(2, process) and not run_peers(1, process)


def other_seed(config: Config) -> tuple[Config, dict]:
    return replace(config, run=replace(config.run, seed=3)), SHARDS


def other_weight(config: Config) -> tuple[Config, dict]:
    sources = [replace(config.data.sources[0], weight=2.0), *config.data.sources[1:]]
    return replace(config, data=replace(config.data, sources=sources)), SHARDS


def other_data(config: Config) -> tuple[Config, dict]:
    return config, {"hindi": {"tokens": 7, "sha256": "b"}}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (other_seed, "run.seed: 3, not 0"),
        (other_weight, "data.sources.0.weight: 2.0, not 0.6"),
        (other_data, "the tokens of source hindi"),
    ],
)
def test_process_that_differs_is_named_in_all(change, reason: str, tiny_config: Config) -> None:  # type: ignore[no-untyped-def]
    def process(peer: Peer) -> None:
        config, shards = change(tiny_config) if peer.rank == 2 else (tiny_config, SHARDS)
        check_agreement(peer, config, shards)

    raised = run_peers(3, process)
    text = f"rank 2 differs from rank 0 in {reason}; start all processes with the same "
    assert sorted(raised) == [0, 1, 2]
    assert all(isinstance(e, InputError) and str(e).startswith(text) for e in raised.values())


def test_places_and_the_number_of_a_process_may_differ(tiny_config: Config) -> None:
    def process(peer: Peer) -> None:
        config = replace(
            tiny_config,
            data=replace(tiny_config.data, dir=f"/local/{peer.rank}", workers=peer.rank),
            parallel=ParallelConfig(
                coordinator_address="host:1", num_processes=2, process_id=peer.rank
            ),
        )
        check_agreement(peer, config, SHARDS)

    assert not run_peers(2, process)
