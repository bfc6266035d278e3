"""Numbers that are not finite end a run before they are saved, or their step is left out."""

import math
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mooshak.checkpoints.manager import complete_steps
from mooshak.config.sections import CheckpointConfig, Config
from mooshak.data.batches import global_batch
from mooshak.data.packing import Batch
from mooshak.data.shards import load_or_prepare_shards
from mooshak.errors import InputError
from mooshak.tokenizer.base import Tokenizer
from mooshak.training import loop
from mooshak.training.metrics import losses
from mooshak.training.nonfinite import NonFiniteSteps
from parity.convert import open_any

FRAMEWORKS = ("torch", "jax")


@pytest.fixture
def config(tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """Eight steps, with a checkpoint after every second one."""
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    load_or_prepare_shards(tiny_config, progress=False)
    return replace(
        tiny_config,
        train=replace(tiny_config.train, steps=8),
        checkpoint=CheckpointConfig(every=2, keep=1),
        evaluate=replace(tiny_config.evaluate, every=0),
        run=replace(tiny_config.run, dir=str(tmp_path / "run")),
    )


def rates(bad_step: int) -> Callable[[Config, int], float]:
    """A learning rate that is infinite in one step, after which the weights are."""
    return lambda config, step: math.inf if step == bad_step - 1 else 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("mode", ["stop", "skip"])
def test_weights_that_are_not_finite_are_not_saved(
    mode: str, framework: str, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "learning_rate", rates(bad_step=4))
    config = replace(config, train=replace(config.train, on_nonfinite=mode))
    with pytest.raises(InputError, match=r"^step 4: \S+ is not finite, and the checkpoint is not"):
        import_module(f"mooshak_{framework}.train").train(config)
    assert complete_steps(Path(config.run.dir) / "checkpoints") == [2]


@pytest.mark.slow
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_run_stops_at_a_loss_that_is_not_finite(
    framework: str, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last finite checkpoint stays, and the same command resumes from it."""
    train = import_module(f"mooshak_{framework}.train").train
    with monkeypatch.context() as patch:
        patch.setattr(loop, "learning_rate", rates(bad_step=5))
        with pytest.raises(InputError) as stopped:
            train(config)
    message = str(stopped.value)
    assert message.startswith(
        "step 6: loss is nan and grad_norm is nan; its batch is rows 40 .. 47"
    )
    directory = Path(config.run.dir) / "checkpoints"
    assert message.endswith(f"(the last checkpoint is {directory / '4'})")
    assert complete_steps(directory) == [4]
    assert math.isnan(losses(Path(config.run.dir))[6])
    train(config)
    assert complete_steps(directory) == [8]
    assert all(map(math.isfinite, losses(Path(config.run.dir)).values()))


def with_token(batch: Batch[np.ndarray], token: int, other: int) -> Batch[np.ndarray]:
    """The batch with `token` in one place, or, if it is `other`, nowhere."""
    tokens = np.where(batch.tokens == 400, other, batch.tokens)
    tokens[0, 3] = token
    return batch._replace(tokens=tokens)


@pytest.mark.slow
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_skipped_step_changes_nothing(
    framework: str, config: Config, tiny_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row of the embedding is NaN: batches with its token are left out, and no other ones."""
    config = replace(config, train=replace(config.train, on_nonfinite="skip"))
    batches = [global_batch(config, step) for step in range(3)]
    good = [with_token(batch, 7, other=7) for batch in batches]
    bad = with_token(batches[0], 400, other=7)
    trainer_of = import_module(f"mooshak_{framework}.step").Trainer
    results = []
    for sequence in ([good[1], bad, good[2]], [good[1], good[2]]):
        trainer = trainer_of(config)
        trainer.initialize(tiny_tokenizer)
        set_row(framework, trainer, 400, math.nan)
        metrics = [trainer.step(batch, 1e-3, lambda: False)[0] for batch in sequence]
        finite = [math.isfinite(m["loss"]) and math.isfinite(m["grad_norm"]) for m in metrics]
        assert finite == [batch is not bad for batch in sequence]
        assert trainer.find_nonfinite().startswith("embedding")
        results.append((metrics[-1], trainer.trainer_state()))
    assert results[0][0] == results[1][0]  # To the last bit.
    assert [state for _, state in results] == [{"skipped_steps": 1}, {}]


def set_row(framework: str, trainer: Any, row: int, value: float) -> None:
    if framework == "torch":
        trainer.optimizer.state()["params"]["embeddings.weight"].data[row] = value
        return
    leaf = trainer.state["params"]["embeddings"]["embedding"]
    new = leaf.at[row].set(value)
    trainer.state["params"]["embeddings"]["embedding"] = new


@pytest.mark.slow
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_run_without_an_end_of_skipped_steps_stops(
    framework: str,
    config: Config,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(loop, "learning_rate", rates(bad_step=1))
    train = replace(config.train, on_nonfinite="skip", steps=40)
    config = replace(config, train=train, checkpoint=CheckpointConfig(every=0))
    with pytest.raises(InputError, match=r"step 21: .*the last of 20 such steps in succession"):
        import_module(f"mooshak_{framework}.train").train(config)
    assert capsys.readouterr().err.count("its update is left out") == 19


def test_overflow_of_the_loss_scale_is_none_of_this(tiny_config: Config) -> None:
    steps = NonFiniteSteps(tiny_config, is_main=False)
    metrics = {"loss": 1.0, "grad_norm": math.inf, "loss_scale": 1024.0}
    assert steps.check(1, metrics) == "" and steps.in_succession == 0
    assert "step 1: grad_norm is inf" in steps.check(1, metrics | {"loss_scale": 2.0**-17})
    assert "loss is nan" in steps.check(1, metrics | {"loss": math.nan})
    assert "validation_loss is inf" in steps.check(2, {"loss": 1.0, "validation_loss": math.inf})


@pytest.mark.slow
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_no_clipping_leaves_the_gradients(framework: str, config: Config) -> None:
    """0 trains as a limit that no gradient reaches; null and .inf are read as 0 is."""
    curves = []
    for limit in (0.0, 1e9):
        optimizer = replace(config.optimizer, max_grad_norm=limit)
        run = replace(config.run, dir=f"{config.run.dir}-{limit}")
        changed = replace(
            config, optimizer=optimizer, run=run, train=replace(config.train, steps=3)
        )
        import_module(f"mooshak_{framework}.train").train(changed)
        curves.append(losses(Path(run.dir)))
    assert curves[0] == curves[1] and len(curves[0]) == 3
    assert all(map(math.isfinite, curves[0].values()))


@pytest.mark.slow
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_save_is_finished_when_a_step_fails(
    framework: str, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = import_module(f"mooshak_{framework}.step").Trainer
    step, taken = trainer.step, iter(range(99))

    def failing(self: Any, *args: Any) -> Any:
        if next(taken) == 2:
            raise RuntimeError("out of memory")
        return step(self, *args)

    monkeypatch.setattr(trainer, "step", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        import_module(f"mooshak_{framework}.train").train(config)
    path = Path(config.run.dir) / "checkpoints" / "2"
    source = open_any(path)
    assert source.has_optimizer and all(
        np.isfinite(source.read(key)).all() for key in source.tensors
    )
    assert not list(path.parent.glob(".*"))
