"""Ranges of the configuration: every number has one, it is checked, and `--help` shows it."""

import math
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import pytest

from mooshak.config.fields import Range
from mooshak.config.parse import config_parser, dump_config, load_config, load_draft
from mooshak.config.sections import Config, OptimizerConfig, SourceConfig
from mooshak.errors import InputError


def numbers() -> dict[str, tuple[Range | None, Any]]:
    """Every key that holds a number, not a list of them: its range and its type."""
    sections = {**get_type_hints(Config), "data.sources[x]": SourceConfig}
    return {
        f"{name}.{one.name}": (one.metadata.get("range"), one.type)
        for name, section in sections.items()
        for one in fields(section)
        if {int, float} & {one.type, *get_args(one.type)} and get_origin(one.type) is not list
    }


NUMBERS = numbers()


@pytest.mark.parametrize("key", NUMBERS)
def test_every_number_is_checked(key: str) -> None:
    """One step outside, infinity and NaN are refused, with key, range and value."""
    allowed, kind = NUMBERS[key]
    assert allowed is not None
    section, name = key.rsplit(".", 1)
    is_source = section.startswith("data.sources")
    cls: Any = SourceConfig if is_source else get_type_hints(Config)[section]
    extra = {"name": "x"} if is_source else {}
    outside: list[Any] = [math.nan, -math.inf, "7", True]
    is_float = float in (kind, *get_args(kind))
    outside += [allowed.lowest - 1, int(min(allowed.highest, 2.0**64)) + 2] if not is_float else []
    if allowed.highest < math.inf:
        outside.append(allowed.highest + 1)
    for value in outside:
        with pytest.raises(InputError) as refused:
            cls(**extra, **{name: value})
        assert str(refused.value).startswith(f"{key} must be "), value
        assert str(refused.value).endswith(f"not {value!r}")


def test_help_has_every_range() -> None:
    text = " ".join(config_parser("").format_help().split())
    for key, (allowed, _) in NUMBERS.items():
        if "sources" not in key:
            described = text[text.index(f"--{key} ") :]
            assert f"({allowed}" in described[:500], key


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--optimizer.beta2", "1.0"], "optimizer.beta2 must be at least 0 and below 1, not 1.0"),
        (["--optimizer.learning_rate", ".nan"], "learning_rate must be at least 0 and finite"),
        (["--optimizer.learning_rate", "-1"], "learning_rate must be at least 0 and finite"),
        (["--optimizer.eps", "0"], "optimizer.eps must be at least 1e-30 and finite, not 0"),
        (["--train.gradient_accumulation_steps", "0"], "must be at least 1, not 0"),
        (["--train.stop_after_step", "-1"], "train.stop_after_step must be at least 1, not -1"),
        (["--train.steps", "3000000000"], "train.steps must be at least 1"),
        (
            ["--data.sources", "[{name: a, weight: .nan}]"],
            r"data.sources\[a\].weight must be above",
        ),
        (["--train.steps", "null"], "train.steps"),
        (["--optimizer.learning_rate", "null"], "optimizer.learning_rate"),
    ],
)
def test_number_without_sense_is_refused(options: list[str], message: str, tmp_path: Path) -> None:
    """From overrides, and in the record of a run."""
    with pytest.raises(InputError, match=message):
        load_draft_of(options)
    record = tmp_path / "config.yaml"
    record.write_text(dump_config(Config()))
    with pytest.raises(InputError, match=message):
        load_config(record, options)


def load_draft_of(options: list[str]) -> Config:
    from mooshak.config.parse import parse_config

    return parse_config(config_parser(""), options)[0].config()


@pytest.mark.slow
@pytest.mark.parametrize("value", ["0", ".inf", "null", "0.0"])
def test_no_clipping(value: str, tmp_path: Path) -> None:
    config = load_draft_of(["--optimizer.max_grad_norm", value])
    assert config.optimizer.max_grad_norm is None
    (tmp_path / "again.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "again.yaml") == config
    assert OptimizerConfig(max_grad_norm=math.inf) == OptimizerConfig(max_grad_norm=0)


def test_home_is_expanded_in_every_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "c.yaml").write_text(
        "run: {dir: ~/run}\ndata: {dir: ~/d, sources: [{name: a, kind: text, path: ~/t/*}]}\n"
        "tokenizer: {path: ~/t.model}\n"
    )
    config = load_draft(tmp_path / "c.yaml", ["--init.from", "~/llama"]).config()
    found = (config.run.dir, config.data.dir, config.data.sources[0].path, config.tokenizer.path)
    assert [*found, config.init.from_] == [
        f"{tmp_path}/{name}" for name in ("run", "d", "t/*", "t.model", "llama")
    ]
    with pytest.raises(InputError, match="~nobody-here/run: the home directory of ~ is unknown"):
        load_draft(tmp_path / "c.yaml", ["--run.dir", "~nobody-here/run"])
