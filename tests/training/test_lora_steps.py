"""Training of adapters and of a part of the model: frozen parameters stay, and have no moments."""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from mooshak.config.lora import LoraConfig
from mooshak.config.parse import dump_config
from mooshak.config.sections import Config
from mooshak.errors import InputError
from mooshak_jax import params as jax_params
from mooshak_jax import step as jax_step
from mooshak_jax.distributed import mesh as jax_mesh
from mooshak_torch import step as torch_step
from mooshak_torch.distributed import mesh as torch_mesh
from parity.backends.jax import canonical
from tests.training.test_accumulation import BATCHES, CONFIG

LORA = replace(
    CONFIG,
    train=replace(CONFIG.train, gradient_accumulation_steps=2),
    lora=LoraConfig(rank=3, dora=True, modules_to_save=["lm_head", "norms"]),
)
ROWS = replace(CONFIG, lora=LoraConfig(rank=3, trainable_token_indices=[0, 7, 50, 191]))
PARTIAL = replace(CONFIG, train=replace(CONFIG.train, freeze_embeddings=True, freeze_layers=1))

Trees = dict[str, dict[str, np.ndarray]]


@pytest.fixture(autouse=True, scope="module")
def environment() -> Iterator[None]:
    with jax.enable_x64():
        yield


def torch_steps(config: Config) -> tuple[list[float], Trees]:
    """Losses, and the state after the last step."""
    parallel = torch_mesh.make_parallel(config)
    objective, optimizer = torch_step.make_state(config, parallel, None, None)
    losses = []
    for batch in BATCHES:
        batch = parallel.shard_local_batch(batch)
        loss, norm = torch_step.train_step(objective, optimizer, batch, 1e-2, config, parallel)
        losses += [loss.item(), norm.item()]
    trees = optimizer.state().items()
    return losses, {k: {n: t.detach().numpy() for n, t in tree.items()} for k, tree in trees}


def jax_steps(config: Config) -> tuple[list[float], Trees]:
    parallel = jax_mesh.make_parallel(config)
    params = jax_params.initialize(config.model, "float64", 0, parallel=parallel)
    state = jax_step.initial_state(params, config.frozen)
    step, losses = jax_step.make_train_step(config, parallel), []
    for batch in BATCHES:
        state, loss, norm = step(state, parallel.shard_local_batch(batch), 1e-2)
        losses += [float(loss), float(norm)]
    return losses, {k: canonical(state[k]) for k in ("params", "exp_avg", "exp_avg_sq")}


def check(ours: tuple[list[float], Trees], theirs: tuple[list[float], Trees]) -> None:
    np.testing.assert_allclose(theirs[0], ours[0], rtol=1e-12)
    for group, tree in ours[1].items():
        assert theirs[1][group].keys() == tree.keys()
        for name, value in tree.items():
            np.testing.assert_allclose(
                theirs[1][group][name],
                value,
                rtol=0,
                atol=1e-11 * np.abs(value).max(),
                err_msg=name,
            )


@pytest.mark.slow
@pytest.mark.parametrize("config", [LORA, ROWS, PARTIAL], ids=["lora", "rows", "partial"])
def test_only_trained_parameters_change(config: Config) -> None:
    ours = torch_steps(config)
    before = jax_params.initialize(config.model, "float64", 0)
    trained = before_names(before) - config.frozen
    assert ours[1]["exp_avg"].keys() == trained and 0 < len(trained) < len(ours[1]["params"])
    for name, value in canonical(before).items():
        same = np.array_equal(value, ours[1]["params"][name])
        assert same == (name in config.frozen), name
    check(ours, jax_steps(config))


def before_names(tree: Any) -> set[str]:
    return set(canonical(tree))


@pytest.mark.slow
def test_mesh_with_adapters_takes_the_same_steps() -> None:
    parallel = replace(LORA.parallel, mesh="data=2,fsdp=2,tensor=2")
    scanned = replace(LORA, model=replace(LORA.model, scan_layers=True), parallel=parallel)
    ours, theirs = torch_steps(LORA), jax_steps(scanned)
    check(ours, theirs)


def test_layers_that_are_stacked_cannot_be_frozen() -> None:
    with pytest.raises(InputError, match=r"set model.scan_layers false"):
        replace(PARTIAL, model=replace(PARTIAL.model, scan_layers=True))
    with pytest.raises(InputError, match=r"remove train.freeze_embeddings"):
        replace(LORA, train=PARTIAL.train)
    with pytest.raises(InputError, match=r"leaves none of the 2 layers"):
        replace(CONFIG, train=replace(CONFIG.train, freeze_layers=2))


@pytest.mark.slow
def test_adapters_resume_in_the_other_framework(
    fresh_config: Config, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    train = replace(fresh_config.train, steps=6, dtype="float64", sequence_length=32)
    config = replace(fresh_config, train=train)
    file = tmp_path / "config.yaml"
    text = dump_config(config).split("\n")
    # The model is that of the checkpoint.
    lines, skipping = [], False
    for line in text:
        if line and not line.startswith(" ") and not line.startswith("-"):
            skipping = line.startswith(("model:", "init:"))
        if not skipping:
            lines.append(line)
    file.write_text("\n".join(lines))
    common = ["--config", str(file), "--init.from", str(tiny_checkpoint)]
    common += ["--lora.rank", "2", "--checkpoint.every", "3", "--evaluate.every", "0"]

    def run(framework: str, directory: str, *more: str) -> list[float]:
        command = [sys.executable, "-m", f"mooshak_{framework}.train", *common, *more]
        command += ["--run.dir", str(tmp_path / directory)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        metrics = (tmp_path / directory / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["loss"] for line in metrics]

    whole = run("torch", "whole")
    run("torch", "parts", "--train.stop_after_step", "3")
    assert len(whole) == 6 and whole[5] != whole[0]
    np.testing.assert_allclose(run("jax", "parts"), whole, rtol=1e-12)
