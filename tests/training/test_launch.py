"""Environments and paths of a launch: each trains, or ends in one line that names the cause."""

import importlib
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mooshak.config.parse import dump_config
from mooshak.config.sections import Config
from mooshak.corpus import readers
from mooshak.training.metrics import losses

FRAMEWORKS = ("torch", "jax")
Run = Callable[..., str]


@pytest.fixture
def run(
    tiny_config: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Run:
    """Train for two steps by a command; returns its error line, or an empty text."""
    train = replace(tiny_config.train, steps=2)
    here = replace(tiny_config.run, dir=str(tmp_path / "run"))
    config = replace(tiny_config, train=train, run=here, schedule=tiny_config.schedule)
    (tmp_path / "mine.yaml").write_text(dump_config(config))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")

    def main(framework: str, *options: object) -> str:
        module = f"mooshak_{framework}.train"
        words = [module, "--config", str(tmp_path / "mine.yaml"), *map(str, options)]
        monkeypatch.setattr("sys.argv", words)
        try:
            importlib.import_module(module).main()
        except SystemExit as stopped:
            told = [
                line for line in capsys.readouterr().err.splitlines() if "tokenizing" not in line
            ]
            assert stopped.code == 2 and len(told) == 1, told
            return told[0]
        return ""

    return main


@pytest.mark.slow
def test_one_process_without_a_launcher_trains(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cluster's environment may have WORLD_SIZE=1."""
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert run("torch") == "" and len(losses(tmp_path / "run")) == 2


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "2"}, "RANK, MASTER_ADDR, MASTER_PORT not set; start the processes with"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two', not an integer of at least 1; unset it"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0', not an integer of at least 1"),
        ({"WORLD_SIZE": "2", "RANK": "-1"}, "RANK is '-1', not an integer"),
    ],
)
def test_incomplete_environment_is_named(
    variables: dict[str, str], message: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert message in run("torch")


@pytest.mark.slow
def test_user_without_a_home_trains(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a container that runs as a user whom it does not know."""
    import pwd

    def unknown(uid: int) -> Any:
        raise KeyError(uid)

    for name in ("HOME", "XDG_CACHE_HOME", "JAX_COMPILATION_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    assert run("jax") == "" and len(losses(tmp_path / "run")) == 2


@pytest.mark.slow
@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("key", ["run.dir", "data.dir"])
def test_directory_that_is_a_file_is_named(
    key: str, framework: str, run: Run, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        line = run(framework, f"--{key}", path)
        assert line.startswith("error: ") and str(tmp_path / "file") in line
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("kind", ["text", "jsonl", "parquet"])
def test_corpus_that_cannot_be_read_is_named(
    kind: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a tokenizer is trained on it, and while it becomes tokens."""
    file = tmp_path / "corpus.txt"
    file.write_text('{"text": "a"}')

    def denied(*args: Any, **kwargs: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(file))

    # Tests may run as root, who may read everything.
    if kind == "parquet":
        import pyarrow.parquet

        monkeypatch.setattr(pyarrow.parquet, "ParquetFile", denied)
    else:
        monkeypatch.setattr(readers, "open", denied, raising=False)
    source = f"{{name: mine, kind: {kind}, path: '{file}'}}"
    options = ("--data.sources", f"[{source}]", "--data.dir", tmp_path / "shards")
    monkeypatch.setattr(readers, "input_state", lambda source: None)
    for more in ((), ("--tokenizer.path", tmp_path / "new.model")):
        line = run("torch", *options, *more)
        assert str(file) in line and "Permission denied" in line
    assert not (tmp_path / "new.model").exists() and not (tmp_path / "run").exists()


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_full_disk_is_one_line(
    framework: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the record of the run is written: nothing is half-written, and the lock is gone."""
    replace_file = os.replace

    def full(source: Any, target: Any) -> None:
        if str(target).endswith("config.yaml"):
            raise OSError(28, "No space left on device", str(target))
        replace_file(source, target)

    monkeypatch.setattr(os, "replace", full)
    line = run(framework)
    assert line == f"error: No space left on device: {tmp_path}/run/config.yaml; free some space"
    assert not (tmp_path / "run").exists()
