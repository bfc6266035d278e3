"""`init.from`: given values win, and a run resumes after the initial checkpoint is deleted."""

import json
import shutil
from importlib import import_module
from pathlib import Path

import pytest
import yaml

from mooshak.checkpoints.init_from import resolve
from mooshak.config.parse import load_config, load_draft
from mooshak.config.sections import Config
from mooshak.errors import InputError
from mooshak.training.metrics import losses

THETA = 500_000.0


@pytest.fixture
def start(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint whose rope_theta is not the default."""
    path = shutil.copytree(tiny_checkpoint, tmp_path / "start")
    model = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(model | {"rope_theta": THETA}))
    return path


@pytest.fixture
def recipe(start: Path, tiny_config: Config, tmp_path: Path) -> Path:
    """A YAML that begins with that checkpoint; it has neither a model nor a tokenizer."""
    values = {
        "init": {"from": str(start)},
        "data": {
            "dir": str(tmp_path / "tokens"),
            "validation_fraction": 0.2,
            "sources": [vars(source) for source in tiny_config.data.sources],
        },
        "train": {"steps": 4, "batch_size": 4, "sequence_length": 16},
        "evaluate": {"every": 2, "sequences": 4, "batch_size": 4},
        "run": {"dir": str(tmp_path / "run"), "progress": False, "tensorboard": False},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    return tmp_path / "recipe.yaml"


def test_model_and_tokenizer_are_the_checkpoints(recipe: Path, start: Path) -> None:
    config = resolve(load_draft(recipe))
    assert config.model.rope_theta == THETA and config.model.architecture == "llama"
    assert config.tokenizer.path == str(start / "tokenizer.model")


def test_given_default_wins(recipe: Path) -> None:
    """Explicit values are kept, also where they equal a default."""
    assert Config().model.rope_theta == 10_000.0
    given = ["--model.rope_theta", "10000.0", "--tokenizer.path", Config().tokenizer.path]
    config = resolve(load_draft(recipe, given))
    assert config.model.rope_theta == 10_000.0 and config.model.dim == 24
    assert config.tokenizer.path == Config().tokenizer.path
    # The same in the file.
    text = f"model: {{rope_theta: 10000.0}}\n{recipe.read_text()}"
    recipe.write_text(text)
    assert resolve(load_draft(recipe)).model.rope_theta == 10_000.0


def test_missing_checkpoint_is_named(recipe: Path, start: Path) -> None:
    shutil.rmtree(start)
    with pytest.raises(InputError, match=r"there is no checkpoint directory .*/start"):
        resolve(load_draft(recipe))


@pytest.mark.slow
@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_run_continues_without_the_checkpoint(
    framework: str,
    recipe: Path,
    start: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")  # The torch commands set it for good.
    train = import_module(f"mooshak_{framework}.train").train
    whole = ["--run.dir", str(tmp_path / "whole")]
    train(resolve(load_draft(recipe, whole)))
    train(resolve(load_draft(recipe, ["--train.stop_after_step", "2"])))
    shutil.rmtree(start)
    # The same command resumes, and so does the record of the run.
    # Older versions recorded the path of the checkpoint.
    record = tmp_path / "run" / "config.yaml"
    own = str(tmp_path / "run" / "tokenizer" / "tokenizer.model")
    record.write_text(record.read_text().replace(own, str(start / "tokenizer.model")))
    shutil.rmtree(tmp_path / "run" / "tokenizer")
    every = ["--checkpoint.every", "1", "--checkpoint.keep", "1", "--evaluate.every", "0"]
    train(resolve(load_draft(recipe, ["--train.stop_after_step", "3", *every])))
    assert load_config(record).tokenizer.path == own and Path(own).is_file()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "2")
    train(resolve(load_draft(record, ["--train.stop_after_step", "null", "--evaluate.every", "2"])))
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert load_config(record).model.rope_theta == THETA
    # Keys that are given at a resume win.
    given = resolve(load_draft(recipe, ["--model.rope_theta", "123.0"]))
    assert given.model.rope_theta == 123.0
    # Generate and evaluate, also where the checkpoint is copied elsewhere.
    last = tmp_path / "run" / "checkpoints" / "4"
    load = import_module(f"mooshak_{framework}").load
    text = load(last).generate("a clever mouse", max_new_tokens=8).text
    copy = shutil.copytree(last, tmp_path / "elsewhere" / "4")
    assert load(copy).generate("a clever mouse", max_new_tokens=8).text == text
    monkeypatch.setattr("sys.argv", ["evaluate", str(last), "--json"])
    capsys.readouterr()
    import_module(f"mooshak_{framework}.evaluate").main()
    metrics = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    scores = json.loads(capsys.readouterr().out)
    assert scores.keys() == {"hi", "en"}
    for language, score in scores.items():
        expected = json.loads(metrics[-1])[f"bits_per_byte_{language}"]
        assert score["bits_per_byte"] == pytest.approx(expected, rel=1e-6)
