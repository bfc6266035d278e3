"""PyTorch on several processes (gloo): every layout trains as one process does."""

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import pytest
import torch
from document_masks import packed_batch
from ranks import FIGURES, Ranks, assert_same, metrics

import mooshak_jax.train
from mooshak.checkpoints.manager import complete_steps
from mooshak.config.model import ModelConfig
from mooshak.config.parse import dump_config, load_config
from mooshak.config.sections import Config
from mooshak.errors import InputError
from mooshak_torch.checkpoint import open_checkpoint
from mooshak_torch.planner import plan
from mooshak_torch.train import train
from parity.convert import convert

pytestmark = pytest.mark.slow

STEPS = 6

LAYOUTS: dict[str, tuple[Any, ...]] = {
    "ddp": ("--parallel.strategy", "ddp", "--train.gradient_accumulation_steps", 2),
    "fsdp": ("--parallel.strategy", "fsdp", "--train.gradient_accumulation_steps", 2),
    "kept": ("--mesh", "fsdp=-1", "--parallel.reshard_after_forward", "false"),
    "hsdp": ("--parallel.strategy", "hsdp", "--train.remat", "full"),
    "offload": ("--mesh", "fsdp=-1", "--parallel.cpu_offload", "true", "--parallel.prefetch", 2),
    "tensor": ("--mesh", "fsdp=-1,tensor=2", "--train.remat", "full"),
    "sequence": ("--mesh", "data=-1,tensor=2", "--parallel.sequence_parallel", "true"),
}
LAYOUTS["sequence"] += ("--train.remat", "dots")

ZERO = {
    f"zero{stage}": ("--parallel.strategy", "deepspeed", "--parallel.zero_stage", stage)
    for stage in (1, 2, 3)
}
"""DeepSpeed computes in float32 here."""

LLAMA = ("--model.architecture", "llama", "--model.head_dim", 6, "--model.qk_norm", "true")
LLAMA += ("--model.qkv_bias", "true", "--model.wo_bias", "true", "--model.mlp_bias", "true")
LLAMA += ("--model.tie_embeddings", "true")
"""The other architecture with everything that can be in it."""


@pytest.fixture(scope="module")
def config(tiny_config: Config, tiny_tokenizer: object, tmp_path_factory: Any) -> Path:
    """A tiny model whose widths four processes do not divide, in float64."""
    model = ModelConfig(
        vocab_size=512, dim=40, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=42, max_seq_len=32
    )
    changed = replace(
        tiny_config,
        model=model,
        train=replace(tiny_config.train, steps=STEPS, dtype="float64"),
        optimizer=replace(tiny_config.optimizer, learning_rate=1e-2, max_grad_norm=0.5),
        schedule=replace(tiny_config.schedule, warmup_steps=2),
        # Three sequences, one at a time: neither two nor four processes have equally many.
        evaluate=replace(tiny_config.evaluate, every=STEPS, sequences=3, batch_size=1),
    )
    path: Path = tmp_path_factory.mktemp("parallel") / "config.yaml"
    path.write_text(dump_config(changed))
    return path


@pytest.fixture(scope="module")
def alone(config: Path) -> Path:
    """The run of one process."""
    directory = config.parent / "alone"
    train(load_config(config, ["--run.dir", str(directory)]))
    return directory


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: Any) -> Iterator[Ranks]:
    started = Ranks(tmp_path_factory.mktemp("ranks") / "log")
    yield started
    started.close()


class Run(TypedDict):
    """A run in some layout, on so many processes."""

    options: tuple[Any, ...]
    processes: int
    directory: Path
    held: list[dict[str, int]]
    """Return the bytes that each process holds."""


@pytest.fixture(scope="module")
def runs(config: Path, ranks: Ranks) -> dict[str, Run]:
    """Every layout on two and on four processes: its run, ddp-2 or zero3-4."""
    result: dict[str, Run] = {}
    for processes in (2, 4):
        for name, options in (LAYOUTS | ZERO).items():
            if name in ZERO:
                options = (*options, "--train.dtype", "float32")
            directory = config.parent / f"{name}-{processes}"
            argv = [config, *options, "--run.dir", directory]
            held = ranks.run(processes, "trained", argv)
            result[directory.name] = Run(
                options=options, processes=processes, directory=directory, held=held
            )
    return result


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_trains_as_one_process(
    name: str, processes: int, runs: dict[str, Run], alone: Path
) -> None:
    assert len(metrics(alone)) == STEPS and len(metrics(alone, "validation_loss")) == 1
    figures = (*FIGURES, "validation_loss")
    assert_same(runs[f"{name}-{processes}"]["directory"], alone, figures=figures)


def test_ranks_divide_by_the_labels_of_all_rows(config: Path, tmp_path: Path, ranks: Ranks) -> None:
    """Rows with unequal numbers of ignored labels, on processes and in accumulation parts."""
    path = tmp_path / "batches.npy"
    batches = [packed_batch(seed, 8, 32, 512)[:4] for seed in range(3)]  # Those of text.
    np.save(path, batches)
    (truth,) = ranks.run(1, "stepped", [config], path)
    assert truth[-1][0] != truth[0][0]
    for processes, name in ((2, "ddp"), (2, "fsdp"), (4, "hsdp"), (4, "tensor")):
        for found in ranks.run(processes, "stepped", [config, *LAYOUTS[name]], path):
            assert np.array(found) == pytest.approx(np.array(truth), rel=1e-12, abs=0), name


@pytest.fixture(scope="module")
def weighted_alone(config: Path, ranks: Ranks) -> Path:
    """The run of one process with weighted log-probabilities per token."""
    directory = config.parent / "weighted"
    ranks.run(1, "weighted", [config, "--run.dir", directory])
    return directory


@pytest.mark.parametrize("name", ["ddp", "fsdp", "tensor", "sequence", "zero3"])
def test_weighted_log_probs_train_as_one_process(
    name: str, config: Path, ranks: Ranks, alone: Path, weighted_alone: Path, tmp_path: Path
) -> None:
    options = (LAYOUTS | ZERO)[name]
    if name in ZERO:
        options = (*options, "--train.dtype", "float32")
    ranks.run(2, "weighted", [config, *options, "--run.dir", tmp_path])
    assert_same(tmp_path, weighted_alone, tolerance=5e-6 if name in ZERO else 1e-12)
    assert metrics(tmp_path) != pytest.approx(metrics(alone), rel=1e-3)


@pytest.fixture(scope="module")
def ddp32(config: Path, ranks: Ranks) -> Path:
    """DDP in float32, on two processes."""
    directory = config.parent / "ddp32"
    argv = [config, *LAYOUTS["ddp"], "--train.dtype", "float32", "--run.dir", directory]
    ranks.run(2, "trained", argv)
    return directory


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("name", ZERO)
def test_zero_trains_as_ddp(name: str, processes: int, runs: dict[str, Run], ddp32: Path) -> None:
    directory = runs[f"{name}-{processes}"]["directory"]
    assert_same(directory, ddp32, tolerance=5e-6)
    # Its checkpoint is as any: every tensor and every moment, whole.
    there, here = (open_checkpoint(run / "checkpoints" / str(STEPS)) for run in (directory, ddp32))
    assert list(there.tensors) == list(here.tensors) and there.has_optimizer
    for key in here.tensors:
        difference = np.linalg.norm(there.read(key) - here.read(key))
        assert difference <= 1e-3 * np.linalg.norm(here.read(key)), key


SHARES = {"ddp": 1, "sequence": 2}
"""Into how many parts a layout cuts the state, where that is not the number of processes."""


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("name", LAYOUTS)
def test_process_holds_its_shard(
    name: str, processes: int, config: Path, runs: dict[str, Run]
) -> None:
    parts = 2 if name == "hsdp" else SHARES.get(name, processes)
    whole = 8 * load_config(config).model.parameter_count()
    for held in runs[f"{name}-{processes}"]["held"]:
        for what, size in held.items():
            share = whole / parts * (2 if what == "optimizer" else 1)
            # Rows are dealt out whole: the last process has fewer of 42, the others more.
            assert abs(size - share) < 0.05 * share, what


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("name", LAYOUTS | ZERO)
def test_process_holds_the_planned_memory(
    name: str, processes: int, config: Path, runs: dict[str, Run]
) -> None:
    """To 2 %, of the process that holds most."""
    run = runs[f"{name}-{processes}"]
    planned = planned_memory(config, name, run["options"], processes)
    for what in ("parameters", "gradients", "optimizer"):
        most = max(held[what] for held in run["held"])
        assert planned[what] == pytest.approx(most, rel=0.02), what


def planned_memory(
    config: Path, name: str, options: tuple[Any, ...], processes: int
) -> dict[str, int]:
    """Return the planner's figures of a layout."""
    strategy = name if name in ("ddp", *ZERO) else "fsdp"
    if name == "hsdp":
        options = (*options, "--mesh", f"data={processes // 2},fsdp=2")
    if name == "offload":
        # What is held is the same; the host has it.
        options = (*options, "--parallel.cpu_offload", "false")
    configured = load_config(config, [*map(str, options)])
    return plan(configured, "h100-80g", processes, strategy).memory


@pytest.mark.parametrize("processes", [2, 4])
def test_zero_3_replicates_small_parameters(
    processes: int, config: Path, tmp_path: Path, ranks: Ranks
) -> None:
    """The embedding and the head are not: they are larger than DeepSpeed's threshold."""
    options = (*ZERO["zero3"], "--train.dtype", "float32", "--train.stop_after_step", 2)
    options += ("--model.dim", 200, "--model.head_dim", 50, "--model.n_layers", 1)
    held = ranks.run(processes, "trained", [config, *options, "--run.dir", tmp_path])
    planned = planned_memory(config, "zero3", options, processes)
    for what in ("parameters", "gradients", "optimizer"):
        assert planned[what] == pytest.approx(max(rank[what] for rank in held), rel=0.02), what


def test_checkpoint_restores_in_every_layout(
    config: Path, alone: Path, ranks: Ranks, runs: dict[str, Run]
) -> None:
    """To the last bit, with the optimizer: from one process, and from two on four and four on two.

    DeepSpeed, which starts anew for each, takes two: of layouts that cut otherwise.
    """
    whole = len(load_config(config).model.parameter_shapes())
    for name, run in (*runs.items(), ("alone", None)):
        processes = 1 if run is None else run["processes"]
        others = {key: r for key, r in runs.items() if r["processes"] != processes}
        stage = next((stage for stage in ZERO if stage in name), None)
        if stage:
            cut_otherwise = ("tensor", *(other for other in ZERO if other != stage))[:2]
            others = {key: r for key, r in others.items() if key.startswith(cut_otherwise)}
        written = [other["directory"] for other in others.values()] + ([] if stage else [alone])
        checkpoints = [directory / "checkpoints" / str(STEPS) for directory in written]
        options = () if run is None else run["options"]
        compared = ranks.run(processes, "restored", [config, *options], *checkpoints)
        # Under DeepSpeed each process has some of the tensors to compare, and all of them whole.
        assert (sum(compared) if stage else min(compared)) == 3 * whole * len(written)


def test_run_resumes_in_every_layout(config: Path, tmp_path: Path, ranks: Ranks) -> None:
    """A step in each, of the other architecture; then a signal to one of two processes, a
    checkpoint of JAX, and one process."""
    steps = len(LAYOUTS) + 6
    options = [config, *LLAMA, "--model.n_layers", 1, "--train.steps", steps]
    options += ["--evaluate.every", 0, "--run.dir"]
    for step, layout in enumerate(LAYOUTS.values(), 1):
        argv = [*options, tmp_path / "chain", *layout, "--train.stop_after_step", step]
        ranks.run(4, "trained", argv)
    stopped = len(LAYOUTS) + 3
    argv = [*options, tmp_path / "chain", "--mesh", "fsdp=2"]
    ranks.run(2, "signalled", argv)
    assert f"stopped after step {stopped}, saved" in ranks.log.read_text()
    assert complete_steps(tmp_path / "chain" / "checkpoints")[-1] == stopped
    saved = tmp_path / "chain" / "checkpoints" / str(stopped)
    convert(saved, tmp_path / "jax", "jax")
    shutil.rmtree(saved)
    shutil.move(tmp_path / "jax", saved)
    assert ranks.run(2, "converted", [*argv, "--train.stop_after_step", stopped + 1]) == [1, 0]
    for directory in ("chain", "alone"):
        argv = [str(option) for option in (*options[1:], tmp_path / directory)]
        train(load_config(config, argv))
    assert len(metrics(tmp_path / "chain")) == steps
    assert_same(tmp_path / "chain", tmp_path / "alone")


def test_zero_resumes_in_every_stage(
    config: Path, tmp_path: Path, ranks: Ranks, ddp32: Path
) -> None:
    options = [config, "--train.dtype", "float32", "--train.gradient_accumulation_steps", 2]
    for stop, name in ((2, "zero3"), (3, "zero1"), (4, "zero2"), (STEPS, "zero3")):
        argv = [*options, *ZERO[name], "--run.dir", tmp_path, "--train.stop_after_step", stop]
        ranks.run(2, "trained", argv)
    assert_same(tmp_path, ddp32, tolerance=5e-6)


def test_fsdp_rounds_to_bfloat16_as_ddp(
    config: Path, tmp_path: Path, ranks: Ranks, ddp32: Path
) -> None:
    """In bfloat16: what it gathers narrow is what is multiplied narrow."""
    for name in ("ddp", "fsdp"):
        argv = [config, *LAYOUTS[name], "--train.dtype", "bfloat16", "--evaluate.every", 0]
        ranks.run(2, "trained", [*argv, "--train.stop_after_step", 5, "--run.dir", tmp_path / name])
    # Until the order of a sum in float32 makes a weight round to the other bfloat16.
    there, here = metrics(tmp_path / "fsdp"), metrics(tmp_path / "ddp")
    assert there == pytest.approx(here, rel=1e-7, abs=0)
    assert here != pytest.approx(metrics(ddp32)[:5], rel=1e-6, abs=0)


def test_resume_on_uneven_shards_is_exact(config: Path, tmp_path: Path, ranks: Ranks) -> None:
    """torchtitan #809 and #1702: the loss differed after a resume."""
    uneven = ("--model.n_heads", 3, "--model.n_kv_heads", 3, "--model.dim", 30)
    options = [config, *uneven, "--model.head_dim", 10, "--train.dtype", "float32"]
    options += ["--mesh", "fsdp=4", "--run.dir"]
    for directory, stop in (("whole", STEPS), ("parts", 3), ("parts", STEPS)):
        ranks.run(4, "trained", [*options, tmp_path / directory, "--train.stop_after_step", stop])
    for key in ("loss", "grad_norm"):
        assert metrics(tmp_path / "parts", key) == metrics(tmp_path / "whole", key)


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_generating_does_not_change_training(
    name: str, config: Path, tmp_path: Path, ranks: Ranks
) -> None:
    options = [config, *LAYOUTS[name], "--train.dtype", "float32", "--train.stop_after_step", 5]
    ranks.run(2, "trained", [*options, "--run.dir", tmp_path / "trained"])
    packed = ranks.run(2, "generating", [*options, "--run.dir", tmp_path / "generating"])
    assert packed == [[name == "ddp" and torch.backends.mkldnn.is_available()]] * 2
    for figure in FIGURES:
        assert metrics(tmp_path / "generating", figure) == metrics(tmp_path / "trained", figure)
    there, here = (
        open_checkpoint(tmp_path / do / "checkpoints/5") for do in ("generating", "trained")
    )
    assert here.has_optimizer
    for key in here.tensors:
        assert np.array_equal(there.read(key), here.read(key)), key


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_compiled_layers_train_alike(config: Path, tmp_path: Path, ranks: Ranks) -> None:
    options = [config, *LAYOUTS["fsdp"], "--train.stop_after_step", 3, "--evaluate.every", 0]
    for run in ("plain", "compiled"):
        compiled = ("--train.compile", run == "compiled", "--run.dir", tmp_path / run)
        ranks.run(2, "trained", [*options, *compiled])
    assert_same(tmp_path / "compiled", tmp_path / "plain")


def test_impossible_layout_is_refused_before_allocation(
    config: Path, tmp_path: Path, ranks: Ranks
) -> None:
    """Meshes that do not fit, before anything is allocated; a process that does not come."""
    wrong = [
        (("--mesh", "fsdp=3"), "mesh fsdp=3 needs 3 processes and there are 2"),
        (("--mesh", "fsdp=-1,data=4"), "mesh fsdp=-1,data=4 needs 4 processes and there are 2"),
        (("--mesh", "date=2"), "expected axis=size with the axes data, fsdp, tensor"),
        (("--parallel.strategy", "ddp", "--mesh", "fsdp=2"), "ddp has only the axis data"),
        (("--parallel.strategy", "single"), "single, but torchrun started 2 processes"),
        (("--mesh", "tensor=2", "--model.n_kv_heads", 1), "n_kv_heads 1 is not divisible"),
        (("--parallel.cpu_offload", "true"), "cpu_offload requires parallel.strategy fsdp"),
        (
            ("--train.gradient_accumulation_steps", 8),
            "train.batch_size 8 is not divisible by mesh data=2",
        ),
        ((*ZERO["zero1"], "--train.dtype", "float64"), "in float32 or bfloat16, not float64"),
    ]
    options = [config, "--run.dir", tmp_path / "run", "--train.dtype", "float32"]
    for argv, message in wrong:
        for said, joined, allocated in ranks.run(2, "refused", [*options, *argv]):
            assert message in said and "\n" not in said
            assert not joined and not allocated
    assert not (tmp_path / "run").exists()
    late = [*options, "--mesh", "fsdp=2", "--parallel.timeout", 2]
    said, _ = ranks.run(2, "absent", late, tmp_path / "given_up")
    assert "rank 0 of 2 waited in all_gather" in said
    assert "Timed out" in said and "\n" not in said
    with pytest.raises(InputError, match="needs torchrun"):
        train(load_config(config, ["--parallel.strategy", "fsdp"]))
    with pytest.raises(InputError, match="needs a loss scale, which only"):
        mooshak_jax.train.train(load_config(config, ["--train.dtype", "float16"]))


def test_float16_skips_overflows_and_resumes_exactly(
    config: Path, tmp_path: Path, ranks: Ranks
) -> None:
    steps = 10  # The first ones are skipped.
    options = [config, "--train.dtype", "float16", "--mesh", "fsdp=-1", "--train.steps", steps]
    for run, stop in (("whole", steps), ("parts", 6), ("parts", steps)):
        argv = [*options, "--train.stop_after_step", stop, "--run.dir", tmp_path / run]
        ranks.run(2, "overflowing", argv)
    whole = metrics(tmp_path / "whole")
    assert metrics(tmp_path / "parts") == whole and whole[-1] < whole[0]
    # What one process finds in its shards, both skip.
    scales = metrics(tmp_path / "whole", "loss_scale")
    assert scales[0] == 2.0**29 and 2.0**15 < scales[-1] < 2.0**28
    assert scales[-1] == scales[-2]
    state = json.loads((tmp_path / f"whole/checkpoints/{steps}/trainer_state.json").read_text())
    assert state["loss_scale"]["scale"] == scales[-1]
    assert state["loss_scale"]["skipped"] == 30 - math.log2(scales[-1])
