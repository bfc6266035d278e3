"""Bad input ends in one line and exit code 2 in both frameworks, and destroys nothing."""

import importlib
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from mooshak.checkpoints.formats import ensure_readable_format
from mooshak.config.parse import dump_config
from mooshak.config.sections import Config, SourceConfig
from mooshak.errors import InputError

FRAMEWORKS = ("torch", "jax")
STEPS = 2

Refused = Callable[..., str]


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Runs a command that must end with exit code 2 and one line; returns the line."""
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")  # The torch commands set it for good.

    def run(module: str, *arguments: object) -> str:
        monkeypatch.setattr("sys.argv", [module, *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            importlib.import_module(module).main()
        assert stopped.value.code == 2
        # What is made on the way (tokenizer, token shards) is told there too.
        told = [line for line in capsys.readouterr().err.splitlines() if "tokenizing" not in line]
        assert len(told) == 1 and told[0].startswith("error: ")
        return told[0]

    return run


@pytest.fixture(scope="module")
def run_config(tiny_config: Config, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run of two steps, with a checkpoint of each framework."""
    from mooshak_torch.train import train
    from parity.convert import convert

    run = replace(tiny_config.run, dir=str(tmp_path_factory.mktemp("runs") / "torch"))
    train_config = replace(tiny_config.train, steps=STEPS)
    config = replace(tiny_config, run=run, train=train_config)
    train(config)
    directory = Path(run.dir)
    (directory.parent / "jax" / "checkpoints").mkdir(parents=True)
    for name in ("config.yaml", "metrics.jsonl"):
        shutil.copy(directory / name, directory.parent / "jax" / name)
    checkpoint = Path("checkpoints") / str(STEPS)
    convert(directory / checkpoint, directory.parent / "jax" / checkpoint, "jax")
    return config


@pytest.fixture
def run_of(run_config: Config, tmp_path: Path) -> Callable[[str], tuple[Path, Path]]:
    """A copy of the framework's run, to be damaged: its configuration and its checkpoint."""

    def copy(framework: str) -> tuple[Path, Path]:
        directory = tmp_path / "run"
        shutil.copytree(Path(run_config.run.dir).parent / framework, directory)
        copied = replace(run_config, run=replace(run_config.run, dir=str(directory)))
        return written(copied, tmp_path), directory / "checkpoints" / str(STEPS)

    return copy


def written(config: Config, directory: Path) -> Path:
    """The configuration as a file."""
    path = directory / "written.yaml"
    path.write_text(dump_config(config))
    return path


def contents(directory: Path) -> dict[Path, bytes]:
    """Every file of a directory."""
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"train: {stepz: 3}", "unknown key train.stepz; did you mean train.steps?"),
        (b"train: [3", "written.yaml is not YAML"),
        (b"\x89PNG\r\n\x1a\n\0\0", "written.yaml is not YAML"),
    ],
    ids=["unknown key", "not YAML", "binary"],
)
def test_config(
    framework: str, text: bytes, message: str, refused: Refused, tmp_path: Path
) -> None:
    (tmp_path / "written.yaml is not YAML").write_bytes(text)
    assert message in refused(
        f"mooshak_{framework}.train", "--config", tmp_path / "written.yaml is not YAML"
    )


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize(
    ("kind", "content", "message"),
    [
        ("text", None, "no file matches"),
        ("text", b"", "are empty"),
        ("text", b"\x89PNG\xff\0", "is not UTF-8 text"),
        ("jsonl", b'{"text": "a"}\n{"text": "b\n{"text"\n', "line 3: not JSON"),
        ("parquet", b"PAR1 and no more", "not a complete Parquet file"),
    ],
    ids=["missing", "empty", "binary", "broken lines", "truncated"],
)
def test_corpus(
    framework: str,
    kind: str,
    content: bytes | None,
    message: str,
    refused: Refused,
    fresh_config: Config,
    tmp_path: Path,
) -> None:
    corpus = tmp_path / "corpus"
    if content is not None:
        corpus.write_bytes(content)
    source = SourceConfig("mine", kind=kind, path=str(corpus))
    data = replace(fresh_config.data, sources=[source], max_broken_lines=1)
    config = written(replace(fresh_config, data=data), tmp_path)
    line = refused(f"mooshak_{framework}.train", "--config", config)
    assert message in line and str(corpus) in line
    assert not list(Path(data.dir).glob("*/manifest.json"))


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_tokenizer_of_another_vocabulary(
    framework: str, refused: Refused, fresh_config: Config, tmp_path: Path
) -> None:
    before = Path(fresh_config.tokenizer.path).read_bytes()
    here = ("--config", written(fresh_config, tmp_path))
    line = refused(f"mooshak_{framework}.train", *here, "--model.vocab_size", 640)
    assert "has 505 tokens, model.vocab_size is 640" in line
    assert Path(fresh_config.tokenizer.path).read_bytes() == before


def test_indivisible_batch_or_devices(
    refused: Refused, fresh_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = ("--config", written(fresh_config, tmp_path))
    # How many devices there are in this process depends on the tests before this one.
    assert "data=7" in refused("mooshak_jax.train", *here, "--mesh", "data=7")
    assert "axis=size" in refused("mooshak_jax.train", *here, "--mesh", "date=2")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert "8 is not divisible by mesh data=3" in refused("mooshak_torch.train", *here)


@pytest.mark.slow
@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--model.hidden_dim", 64), "another model: its hidden_dim is 48"),
        (("--run.seed", 5), "was written with seed 0, this run has 5"),
        (("--train.batch_size", 4), "was written with batch_size 8, this run has 4"),
        (("--data.document_mask", "true"), "with document_mask False, this run has True"),
        (("--train.steps", 1), "after train.steps 1"),
        (("--resume", "never"), "continue them with --resume auto"),
        (("--resume", "/nowhere"), "no checkpoint directory /nowhere"),
        (("--resume", os.curdir), "is not a checkpoint: it needs one of"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_checkpoint_of_another_run(
    framework: str,
    options: tuple[object, ...],
    message: str,
    refused: Refused,
    run_of: Callable[[str], tuple[Path, Path]],
    tmp_path: Path,
) -> None:
    config, _ = run_of(framework)
    before = contents(tmp_path)
    assert message in refused(f"mooshak_{framework}.train", "--config", config, *options)
    assert contents(tmp_path) == before


@pytest.mark.slow
@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize(
    ("damaged", "message"),
    [
        ("weights", "truncated"),
        ("metadata", "no readable"),
        ("config.json", "config.json is not JSON"),
        ("trainer_state.json", "trainer_state.json is not JSON"),
    ],
)
def test_truncated_checkpoint(
    framework: str,
    damaged: str,
    message: str,
    refused: Refused,
    run_of: Callable[[str], tuple[Path, Path]],
    tmp_path: Path,
) -> None:
    config, checkpoint = run_of(framework)
    names = {"metadata": {"torch": "dcp/.metadata", "jax": "orbax/_METADATA"}[framework]}
    file = checkpoint / names.get(damaged, damaged)
    if damaged == "weights":
        state = checkpoint / {"torch": "dcp", "jax": "orbax"}[framework]
        file = max(filter(Path.is_file, state.rglob("*")), key=lambda path: path.stat().st_size)
    os.truncate(file, 100)
    before = contents(tmp_path)
    further = ("--config", config, "--train.steps", 4)
    for resume in ("auto", checkpoint):
        assert message in refused(f"mooshak_{framework}.train", *further, "--resume", resume)
    assert message in refused(f"mooshak_{framework}.evaluate", checkpoint)
    assert message in refused(f"mooshak_{framework}.generate", checkpoint, "--prompt", "a")
    assert message in refused("parity.convert", checkpoint, tmp_path / "target")
    assert contents(tmp_path) == before


@pytest.mark.slow
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_truncated_safetensors(
    framework: str, refused: Refused, run_of: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    from parity.convert import convert

    config, checkpoint = run_of(framework)
    convert(checkpoint, tmp_path / "copy", "safetensors")
    file = tmp_path / "copy" / "optimizer.safetensors"
    os.truncate(file, file.stat().st_size // 2)
    options = ("--config", config, "--run.dir", tmp_path / "new", "--resume", tmp_path / "copy")
    assert "optimizer.safetensors is truncated" in refused(f"mooshak_{framework}.train", *options)
    line = refused("parity.convert", tmp_path / "copy", tmp_path / "target", "--to", framework)
    assert "optimizer.safetensors is truncated" in line
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_checkpoint_with_tensors_of_another_model(
    framework: str, refused: Refused, run_of: Callable[[str], tuple[Path, Path]]
) -> None:
    config, checkpoint = run_of(framework)
    model = json.loads((checkpoint / "config.json").read_text()) | {"n_layers": 3}
    (checkpoint / "config.json").write_text(json.dumps(model))
    further = ("--config", config, "--model.n_layers", 3, "--train.steps", 4)
    assert "tensor layers.2" in refused(f"mooshak_{framework}.train", *further)


@pytest.mark.slow
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_evaluation_that_does_not_fit(
    framework: str, refused: Refused, run_of: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    from parity.convert import convert

    _, checkpoint = run_of(framework)
    evaluate = f"mooshak_{framework}.evaluate"
    assert "its n_layers is 2" in refused(evaluate, checkpoint, "--model.n_layers", 3)
    other = ("--tokenizer.path", tmp_path / "other.model", "--tokenizer.vocab_size", 400)
    line = refused(evaluate, checkpoint, *other)
    assert "other.model is missing" in line and not (tmp_path / "other.model").exists()
    assert "no text is held out" in refused(evaluate, checkpoint, "--data.validation_fraction", 0)
    assert "no checkpoint directory" in refused(evaluate, tmp_path / "no")
    convert(checkpoint, tmp_path / "weights", "safetensors", weights_only=True)
    assert "is not in a run directory; give --config" in refused(evaluate, tmp_path / "weights")


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_weights_are_no_training_state(
    framework: str, refused: Refused, run_of: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    from parity.convert import convert

    config, checkpoint = run_of(framework)
    convert(checkpoint, tmp_path / "weights", "safetensors", weights_only=True)
    options = ("--run.dir", tmp_path / "new", "--resume", tmp_path / "weights")
    line = refused(f"mooshak_{framework}.train", "--config", config, *options)
    assert "has only weights" in line and not (tmp_path / "new").exists()


@pytest.mark.parametrize("to", ["torch", "jax", "safetensors"])
def test_destination_exists(
    to: str, refused: Refused, run_of: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    _, checkpoint = run_of("torch")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "thesis.txt").write_text("years of work")
    before = contents(tmp_path)
    options = (checkpoint, tmp_path / "there", "--to", to)
    assert "exists already" in refused("parity.convert", *options)
    assert contents(tmp_path) == before


def test_pickled_metadata_is_not_executed(
    refused: Refused, run_of: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    """DCP's metadata are a pickle: a stranger's must not run."""

    class Evil:
        def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
            return os.mkdir, (str(tmp_path / "ran"),)

    config, checkpoint = run_of("torch")
    (checkpoint / "dcp" / ".metadata").write_bytes(pickle.dumps(Evil()))
    line = refused("mooshak_torch.train", "--config", config)
    assert "mkdir is not allowed in a checkpoint" in line
    assert not (tmp_path / "ran").exists()


@pytest.mark.slow
def test_failed_conversion_is_reported_by_all(
    refused: Refused, run_of: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    """The first process says why, and the others, which convert nothing, say the same."""
    config, checkpoint = run_of("jax")
    shutil.rmtree(checkpoint / "orbax")
    (checkpoint / "orbax").mkdir()
    before = contents(tmp_path)
    line = refused("mooshak_torch.train", "--config", config)
    assert "could not be converted: " in line and contents(tmp_path) == before

    class Second:
        is_main = False

        def broadcast(self, text: str) -> str:
            return json.dumps([str(tmp_path), line.partition("converted: ")[2]])

        def barrier(self) -> None:
            raise AssertionError("there is nothing to wait for")

    with (
        pytest.raises(InputError, match=re.escape(line.removeprefix("error: "))),
        ensure_readable_format(checkpoint, "torch", Second()),
    ):
        pass
    assert contents(tmp_path) == before
