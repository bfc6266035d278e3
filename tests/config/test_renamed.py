"""Renamed keys: errors on the command line and in a YAML, translated in the record of a run."""

from dataclasses import fields
from pathlib import Path
from typing import get_type_hints

import pytest
import yaml

from mooshak.config.parse import config_parser, load_config, load_draft, parse_config
from mooshak.config.renamed import RENAMED, translate
from mooshak.config.sections import Config
from mooshak.errors import InputError

VALUES = {
    "train.accumulation": 2,
    "train.stop_at": 5,
    "optimizer.clip_norm": 0.5,
    "schedule.final_fraction": 0.2,
    "parallel.coordinator": "auto",
    "parallel.processes": 2,
    "parallel.process": 1,
    "parallel.slices": 2,
}
"""Old key -> a value that is not its default."""
ADDRESS = {"parallel.coordinator": "localhost:1"}
"""The three keys of several processes go together."""


def sections(values: dict[str, object]) -> dict[str, dict[str, object]]:
    """Dotted keys as sections."""
    result: dict[str, dict[str, object]] = {}
    for dotted, value in values.items():
        section, key = dotted.split(".")
        result.setdefault(section, {})[key] = value
    return result


def test_renamed_keys_are_covered() -> None:
    assert VALUES.keys() == RENAMED.keys()
    known = {
        f"{name}.{field.name}"
        for name, section in get_type_hints(Config).items()
        for field in fields(section)
    }
    assert set(RENAMED.values()) <= known and not RENAMED.keys() & known


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_old_key_names_the_new_one(old: str, new: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"option --{old} was renamed; use {new}$"):
        parse_config(config_parser(""), [f"--{old}", str(VALUES[old])])
    # A user's file may have any name, also the one of a record.
    for name in ("mine.yaml", "config.yaml"):
        path = tmp_path / name
        path.write_text(yaml.safe_dump(sections({old: VALUES[old]})))
        with pytest.raises(InputError, match=f"key {old} was renamed; use {new}$"):
            load_draft(path)


def test_old_keys_of_a_record_are_translated(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(sections(VALUES | ADDRESS)))
    (tmp_path / "environment.json").write_text("{}")
    drafts = [
        parse_config(config_parser(""), words)[0]
        for words in (["--config", str(path)], [f"--config={path}"])
    ]
    for config in (*(draft.config() for draft in drafts), load_config(path)):
        for old, new in RENAMED.items():
            section, key = new.split(".")
            assert getattr(getattr(config, section), key) == (VALUES | ADDRESS)[old], new
    # What is overridden on the command line has the new name there too.
    changed = load_draft(path, ["--train.gradient_accumulation_steps", "4"])
    assert changed.config().train.gradient_accumulation_steps == 4
    assert "train.gradient_accumulation_steps" in changed.given
    with pytest.raises(InputError, match=r"--train\.accumulation was renamed"):
        load_draft(path, ["--train.accumulation", "4"])


def test_translate_changes_nothing_else() -> None:
    values = {"train": {"accumulation": 2, "steps": 3}, "data": {"dir": "x"}, "run": None}
    translated = translate(values)
    assert translated == {
        "train": {"gradient_accumulation_steps": 2, "steps": 3},
        "data": {"dir": "x"},
        "run": None,
    }
    assert values["train"] == {"accumulation": 2, "steps": 3}
