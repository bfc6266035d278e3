"""Agreement of the processes of a run: one configuration, and the same data on every machine."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from mooshak.checkpoints.formats import Processes
from mooshak.config.sections import Config
from mooshak.errors import InputError

OWN = ("process_id", "dir", "path", "workers", "progress", "tensorboard")
"""Keys in which processes may differ: places, and what changes no number."""

TOKENS = "the tokens of source "


def check_agreement(processes: Processes, config: Config, shards: Mapping[str, Any]) -> None:
    """Compare configuration and data of all processes; all of them call it.

    `shards` describes the training tokens of each source. Raises `InputError`, in all processes, if
    one has other settings or tokens than the first: each would train on other rows, or another
    model, and the result would be of neither.
    """
    if processes.world_size == 1:
        return
    mine = dict(_flat(asdict(config))) | {f"{TOKENS}{k}": v for k, v in shards.items()}
    first, *others = map(json.loads, processes.gather(json.dumps(mine, sort_keys=True)))
    for rank, theirs in enumerate(others, 1):
        for key in sorted(first.keys() | theirs.keys()):
            if first.get(key) != theirs.get(key):
                values = f": {theirs.get(key)}, not {first.get(key)}"
                processes.close()
                raise InputError(
                    f"rank {rank} differs from rank 0 in {key}"
                    f"{'' if key.startswith(TOKENS) else values}; start all processes with the "
                    "same configuration and data"
                )


def _flat(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted name and the value of every setting that processes share."""
    items = enumerate(values) if isinstance(values, list) else values.items()
    for key, value in items:
        name = f"{prefix}{key}".removesuffix("_")
        if isinstance(value, dict | list):
            yield from _flat(value, f"{name}.")
        elif key not in OWN:
            yield name, value
