"""YAML files: duplicate keys, odd numbers, empty sections, nulls, moved records of runs."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from mooshak.checkpoints.manager import record_of
from mooshak.config.parse import config_parser, dump_config, load_config, load_draft, parse_config
from mooshak.config.sections import Config, RunConfig, SourceConfig, TokenizerConfig
from mooshak.errors import InputError


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "train:\n  steps: 3\nrun: {seed: 1}\ntrain:\n  batch_size: 4",
            "train stands twice, in lines 1 and 4",
        ),
        ("train:\n  steps: 3\n  steps: 4", "train.steps stands twice, in lines 2 and 3"),
        (
            "data:\n  sources:\n  - name: a\n    weight: 1\n    weight: 2",
            r"data.sources\[0\].weight stands twice, in lines 4 and 5",
        ),
        ("train:\n  steps:\n", "line 2: train.steps is null, and needs a value"),
        ("run: {dir: null}", "line 1: run.dir is null, and needs a value"),
        ("data: {sources: ~}", "line 1: data.sources is null"),
        ("train: 3", "line 1: section train has no keys but the value 3"),
        ("- train", "does not consist of sections"),
        (
            "data: {sources: [null]}",
            "data.sources: None is not an object with the keys of a source",
        ),
        ("train: {stop_after_step: ''}", "train.stop_after_step must be an integer or null, not"),
        ("train: {steps: 010}", "line 1: train.steps 010 is a number in base 8 to YAML"),
        ("train:\n  steps: 1:30", "line 2: train.steps 1:30 is a number in base 60"),
        ("run: {seed: -017}", "line 1: run.seed -017 is a number in base 8"),
        ("data: {sources: [{name: a, language: no}]}", "sources: language must be a text, not F"),
        ("run: !!python/object/apply:os.system [date]", r"no keys but the value \[...\]"),
        ("run: {dir: ''}", "run.dir is empty; name a path"),
        ("data: {dir: $HOME/d}", r"data.dir \$HOME/d: variables are not replaced here"),
        ('run: {dir: "a\\0b"}', "run.dir 'a.x00b' contains a NUL character"),
        ("a: 1\n---\nb: 2", "is not YAML: .*a single document"),
        ("train: {dtype: bf16}", "train.dtype must be one of 'float64', .*, not bf16"),
    ],
)
def test_wrong_file_is_refused_with_its_lines(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        load_draft(path)


@pytest.mark.parametrize(
    "text", ["", "# nothing", "null", "evaluate:\n  # every: 3\nmodel:\ntrain: {steps: 7}"]
)
def test_empty_section_is_its_defaults(text: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    config = load_config(tmp_path / "mine.yaml")
    assert config == replace(Config(), train=config.train, schedule=config.schedule)
    assert config.train.steps == (7 if "7" in text else 1000)


def test_marks_and_line_ends_of_other_systems_are_read(tmp_path: Path) -> None:
    text = "\ufefftrain:\r\n  steps: 7\r\noptimizer: {learning_rate: 1e-3}\r\n"
    (tmp_path / "mine.yaml").write_text(text, "utf-8", newline="")
    config = load_config(tmp_path / "mine.yaml")
    assert (config.train.steps, config.optimizer.learning_rate) == (7, 0.001)


def test_configuration_that_is_no_file_is_named(tmp_path: Path) -> None:
    for path, message in (
        (f"{tmp_path}/none.yaml", f"--config {tmp_path}/none.yaml does not exist; name a YAML"),
        (str(tmp_path), f"--config {tmp_path} is not a readable file"),
        ("", "--config names no file"),
    ):
        with pytest.raises(InputError, match=message):
            load_draft(path)


def test_options_win_wherever_they_stand(tmp_path: Path) -> None:
    for name, steps in (("a", 3), ("b", 4)):
        (tmp_path / f"{name}.yaml").write_text(f"train: {{steps: {steps}, batch_size: {steps}}}")
    a, b = (f"--config={tmp_path / name}.yaml" for name in "ab")
    option = ["--train.steps", "7"]
    for words in ([*option, a, b], [a, *option, b], [a, b, *option]):
        train = parse_config(config_parser(""), words)[0].config().train
        assert (train.steps, train.batch_size) == (7, 4)
    with pytest.raises(InputError, match="--config: expected one argument"):
        parse_config(config_parser(""), ["--config"])


def test_record_of_a_run_has_absolute_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sources = [
        SourceConfig("a", kind="text", path="text/*.txt"),
        SourceConfig("b", kind="huggingface", path="owner/name"),
        SourceConfig("c"),
    ]
    config = Config(
        tokenizer=TokenizerConfig(path="t.model"),
        run=RunConfig(dir="runs/a"),
    )
    config = replace(config, data=replace(config.data, dir="d", sources=sources))
    record = record_of(config)
    assert [source.path for source in record.data.sources] == [
        f"{tmp_path}/text/*.txt",
        "owner/name",
        "",
    ]
    assert (record.tokenizer.path, record.data.dir) == (f"{tmp_path}/t.model", f"{tmp_path}/d")
    assert record.run.dir == f"{tmp_path}/runs/a" and record.init.from_ == ""
    assert record_of(record) == record


def test_record_of_a_moved_run_is_of_its_new_place(tmp_path: Path) -> None:
    """Otherwise a run that is resumed after a move would write to the old place."""
    old, new = tmp_path / "old", tmp_path / "new"
    (old / "tokenizer").mkdir(parents=True)
    (old / "tokenizer" / "tokenizer.model").touch()
    config = Config(
        tokenizer=TokenizerConfig(path=str(tmp_path / "gone.model")), run=RunConfig(dir=str(old))
    )
    (old / "config.yaml").write_text(dump_config(record_of(config)))
    (old / "environment.json").write_text("{}")
    assert load_config(old / "config.yaml").run.dir == str(old)
    shutil.move(old, new)
    moved = load_draft(new / "config.yaml").config()
    assert moved.run.dir == str(new)
    assert moved.tokenizer.path == str(new / "tokenizer" / "tokenizer.model")
    given = load_draft(new / "config.yaml", ["--run.dir", "other", "--tokenizer.path", "mine"])
    assert (given.config().run.dir, given.config().tokenizer.path) == ("other", "mine")
