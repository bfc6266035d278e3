"""Configuration keys that were renamed: old dotted key -> new one.

On a command line and in a user's YAML, an old key is an error that names the new one. The records
of older runs (RUN/config.yaml) are translated silently.
"""

from typing import Any

RENAMED = {
    "train.accumulation": "train.gradient_accumulation_steps",
    "train.stop_at": "train.stop_after_step",
    "optimizer.clip_norm": "optimizer.max_grad_norm",
    "schedule.final_fraction": "schedule.min_lr_ratio",
    "parallel.coordinator": "parallel.coordinator_address",
    "parallel.processes": "parallel.num_processes",
    "parallel.process": "parallel.process_id",
    "parallel.slices": "parallel.num_slices",
}


def translate(sections: dict[str, Any]) -> dict[str, Any]:
    """Return the sections of a configuration with old keys renamed."""
    result = {name: dict(s) if isinstance(s, dict) else s for name, s in sections.items()}
    for old, new in RENAMED.items():
        section, key = old.split(".")
        values = result.get(section)
        if isinstance(values, dict) and key in values:
            values[new.split(".")[1]] = values.pop(key)
    return result
