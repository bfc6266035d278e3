"""Planners: predictions against measured memory, checkpoints and traffic."""

import gc
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import mooshak_jax.plan as jax_plan
import mooshak_jax.planner as jax_planner
from mooshak.config.lora import LoraConfig
from mooshak.config.model import Dtype, ModelConfig
from mooshak.config.parse import dump_config
from mooshak.config.sections import Config, ParallelConfig, TrainConfig
from mooshak.data.packing import Batch
from mooshak.hardware import DEVICES, peak_flops
from mooshak.plan import Plan
from mooshak_jax.hlo import collectives
from mooshak_torch import plan as torch_plan
from mooshak_torch import planner as torch_planner
from mooshak_torch.objectives import make_objective
from mooshak_torch.params import initialize


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100-80g"),
        ("NVIDIA A100-SXM4-80GB", "a100-80g"),
        ("NVIDIA A10", "a10-24g"),
        ("NVIDIA L40S", "l40s-48g"),
        ("NVIDIA GeForce RTX 4090", "4090-24g"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v5p", "v5p"),
        ("TPU v6 lite", "v6e"),
    ],
)
def test_peaks_by_the_names_of_the_drivers(kind: str, name: str) -> None:
    assert peak_flops(kind) == DEVICES[name].flops


@pytest.mark.parametrize("kind", ["cpu", "NVIDIA A10G", "NVIDIA L40", "TPU v7"])
def test_no_peak_is_guessed(kind: str) -> None:
    assert peak_flops(kind) is None


def test_json_of_a_plan_keeps_its_keys() -> None:
    """Other programs read them, so renames in the code do not change them."""
    device = DEVICES["v5e"]
    sent = {"all-reduce": 6, "all-gather": 4}
    times = {"compute": 0.5, "links": 2.0}
    plan = Plan("4 v5e", "data=4", device, 4, {"parameters": 8}, 100, sent, 10**12, times)
    document = plan.to_json()
    assert (document["devices"], document["fits"], document["bytes_per_device"]) == (4, True, 8)
    assert (document["bytes_moved_per_step"], document["collectives"]) == (10, sent)
    assert (document["seconds"], document["bound"]) == (times, "links")
    assert document["mfu_ceiling"] == 1e12 / 4 / device.flops / 2.0
    assert set(document) == {
        *("machine", "layout", "devices", "hardware", "capacity", "fits"),
        *("bytes_per_device", "memory", "bytes_moved_per_step", "collectives"),
        *("flops_per_step", "seconds", "bound", "mfu_ceiling"),
    }


@pytest.mark.slow
def test_two_cpu_processes_start_next_to_libtpu() -> None:
    """libtpu, where it is installed, complains of a missing TPU and lets one process have it."""
    code = "import mooshak_jax, jax; print(jax.devices()[0].platform, flush=True); input()"
    command = [sys.executable, "-c", code]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    processes = [subprocess.Popen(command, text=True, **pipes) for _ in range(2)]
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "cpu\n"
        # Both stand at input() now: each has its devices while the other does.
        assert [process.communicate("\n", timeout=60)[1] for process in processes] == ["", ""]
    finally:
        for process in processes:
            process.kill()


PROGRAMS = """
import json, math
import jax, jax.numpy as jnp, numpy as np
from functools import partial
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
jax.config.update("jax_num_cpu_devices", 8)
from mooshak_jax.hlo import collectives

mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "fsdp"))
found = {}

def compiled(name, function, shape, spec, out, dtype=jnp.float32):
    array = jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
    mapped = jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=out, check_vma=False)
    text = jax.jit(mapped).lower(array).compile().as_text()
    found[name] = [(c.kind, c.size, c.count, c.bytes_sent, c.groups) for c in collectives(text)]

gather = partial(jax.lax.all_gather, axis_name="fsdp", tiled=True)
compiled("gather", gather, (8, 16), P("fsdp"), P(), jnp.bfloat16)
scatter = partial(jax.lax.psum_scatter, axis_name="fsdp", tiled=True)
compiled("scatter", scatter, (8, 16), P(), P("fsdp"))
compiled("reduce", partial(jax.lax.psum, axis_name="data"), (8, 16), P("data"), P())
compiled("both", partial(jax.lax.psum, axis_name=("data", "fsdp")), (8, 16), P(), P())
exchange = lambda x: jax.lax.all_to_all(x, "fsdp", 1, 0, tiled=True)
compiled("exchange", exchange, (8, 16), P("fsdp"), P(None, "fsdp"))
ring = [(i, (i + 1) % 4) for i in range(4)]
compiled("ring", lambda x: jax.lax.ppermute(x, "fsdp", ring), (8, 16), P("fsdp"), P("fsdp"))

def loop(x):
    def outer(x, _):
        def inner(x, _):
            return jnp.sin(jax.lax.psum(x, "fsdp")), None
        return jax.lax.scan(inner, x, None, length=3)[0], None
    return jax.lax.scan(outer, x, None, length=5)[0]

compiled("loop", loop, (8, 16), P(), P())
print(json.dumps(found))
"""


@pytest.mark.slow
def test_collectives_of_compiled_programs_against_the_formulas() -> None:
    """On a mesh of 2 x 4; every array has 128 numbers."""
    run = subprocess.run(
        [sys.executable, "-c", PROGRAMS], text=True, capture_output=True, check=True
    )
    found = json.loads(run.stdout)
    rows = [[0, 1, 2, 3], [4, 5, 6, 7]]
    # CPUs have no all-gather in bfloat16: XLA casts before it.
    (gather,) = found["gather"]
    assert gather in (
        ["all-gather", 256, 1, 192.0, rows],
        ["all-gather", 512, 1, 384.0, rows],
    )
    assert found["scatter"] == [["reduce-scatter", 512, 1, 384.0, rows]]
    columns = [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert found["reduce"] == [["all-reduce", 256, 1, 256.0, columns]]
    assert found["both"] == [["all-reduce", 512, 1, 896.0, [list(range(8))]]]
    assert found["exchange"] == [["all-to-all", 128, 1, 96.0, rows]]
    assert found["ring"] == [["collective-permute", 128, 1, 128.0, rows]]
    assert found["loop"] == [["all-reduce", 512, 15, 15 * 768.0, rows]]


# What XLA writes for a TPU: no trip counts, a counter that steps by two, a collective in pieces of
# which one stands in the loop, a start and its end, and a reduce-scatter as a fused all-reduce.
TPU_PROGRAM = """HloModule jit_step, is_scheduled=true

%cond (p: (u32[], f32[8,4])) -> pred[] {
  %limit = u32[]{:T(128)} constant(8)
  %p = (u32[]{:T(128)}, f32[8,4]{1,0:T(8,128)S(1)}) parameter(0)
  %at = u32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %less = pred[]{:T(512)} compare(%at, %limit), direction=LT
}

%body (p.1: (u32[], f32[8,4])) -> (u32[], f32[8,4]) {
  %two = u32[]{:T(128)} constant(2)
  %p.1 = (u32[]{:T(128)}, f32[8,4]{1,0:T(8,128)S(1)}) parameter(0)
  %at.1 = u32[]{:T(128)} get-tuple-element(%p.1), index=0
  %x = f32[8,4]{1,0:T(8,128)S(1)} get-tuple-element(%p.1), index=1
  %start = (f32[8,4]{1,0}, f32[8,4]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%x), channel_id=1, source_target_pairs={{0,1},{1,2},{2,3},{3,0}}
  %next = u32[]{:T(128)} add(%at.1, %two)
  %piece.1 = f32[8,4]{1,0} fusion(%x), kind=kOutput, calls=%pieces.1
  %end = f32[8,4]{1,0:T(8,128)} collective-permute-done(%start)
  ROOT %both = (u32[]{:T(128)}, f32[8,4]{1,0}) tuple(%next, %end)
}

%pieces (a: bf16[2,4]) -> bf16[8,4] {
  %a = bf16[2,4]{1,0} parameter(0)
  ROOT %g = bf16[8,4]{1,0} all-gather(%a), channel_id=7, replica_groups=mesh['axis_0'=4] {'axis_0'}, dimensions={0}, frontend_attributes={chain_id="3"}
}

%pieces.1 (a.1: bf16[2,4]) -> bf16[8,4] {
  %a.1 = bf16[2,4]{1,0} parameter(0)
  ROOT %g.1 = bf16[8,4]{1,0} all-gather(%a.1), channel_id=7, replica_groups=mesh['axis_0'=4] {'axis_0'}, dimensions={0}, frontend_attributes={chain_id="3"}
}

%add (c: f32[], d: f32[]) -> f32[] {
  %c = f32[] parameter(0)
  %d = f32[] parameter(1)
  ROOT %sum = f32[] add(%c, %d)
}

%all-reduce-scatter (b: f32[8,4]) -> f32[4,4] {
  %b = f32[8,4]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %r = f32[8,4]{1,0} all-reduce(%b), channel_id=9, replica_groups=[2,2]<=[2,2]T(1,0), to_apply=%add
  ROOT %s = f32[4,4]{1,0} dynamic-slice(%r, %zero, %zero), dynamic_slice_sizes={4,4}
}

ENTRY %main (x: f32[8,4]) -> f32[4,4] {
  %x.1 = f32[8,4]{1,0:T(8,128)} parameter(0)
  %zero.1 = u32[]{:T(128)} constant(0)
  %copy = u32[]{:T(128)} copy(%zero.1)
  %first = bf16[8,4]{1,0} fusion(%x.1), kind=kCustom, calls=%pieces
  %state = (u32[]{:T(128)}, f32[8,4]{1,0}) tuple(%copy, %x.1)
  %while = (u32[]{:T(128)}, f32[8,4]{1,0}) while(%state), condition=%cond, body=%body
  %y = f32[8,4]{1,0} get-tuple-element(%while), index=1
  ROOT %out = f32[4,4]{1,0} fusion(%y), kind=kCustom, calls=%all-reduce-scatter
}
"""  # noqa: E501


@pytest.mark.parametrize(
    "groups",
    [
        "[2,2]<=[2,2]T(1,0)",
        "{{0,2},{1,3}}",
        "mesh['a'=2,'b'=2] {'a'}",
        "mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}",
        "mesh['a'=1,'b'=2,'c'=2], device_ids=(0,2,1,3) {'c'}",
    ],
)
def test_collectives_of_a_program_for_a_tpu(groups: str) -> None:
    program = TPU_PROGRAM.replace("[2,2]<=[2,2]T(1,0)", groups)
    found = {c.kind: (c.size, c.count, c.bytes_sent, c.groups) for c in collectives(program)}
    assert found == {
        "collective-permute": (128, 4, 512.0, ((0, 1, 2, 3),)),
        "all-gather": (64, 1, 48.0, ((0, 1, 2, 3),)),
        "reduce-scatter": (128, 1, 64.0, ((0, 2), (1, 3))),
    }


def test_loop_of_unknown_length_is_refused() -> None:
    endless = TPU_PROGRAM.replace("direction=LT", "direction=NE")
    with pytest.raises(ValueError, match="unknown number of iterations"):
        collectives(endless)


BIG = ModelConfig(
    vocab_size=2048,
    dim=256,
    n_layers=4,
    n_heads=2,
    hidden_dim=1024,
    max_seq_len=256,
    scan_layers=True,
)

# 13 GB of parameters and moments, and their gradients: more than a chip of v5e has.
WIDE = ModelConfig(
    vocab_size=2**18, dim=2048, n_layers=1, n_heads=16, hidden_dim=1024, max_seq_len=256
)


def small_plan(topology: str, mesh: str, model: ModelConfig = BIG) -> Plan:
    train = TrainConfig(batch_size=8, dtype="bfloat16", remat="full")
    config = Config(model=model, train=train, parallel=ParallelConfig(mesh=mesh))
    return jax_planner.plan(config, topology)


@pytest.mark.slow
def test_plan_compiles_for_absent_tpus() -> None:
    """The bytes of a device are exact; it sends at most 1.1 times what FSDP must send."""
    plan = small_plan("v5e:2x2", "fsdp=4")
    assert plan.fits and plan.bytes_sent is not None
    # Gains are whole on every device.
    gains = 2 * BIG.n_layers * BIG.dim
    shards = (BIG.parameter_count() - gains) // 4 + gains
    assert plan.memory["parameters"] == 4 * shards
    assert plan.memory["optimizer"] == 8 * shards
    # With full remat a layer's input stays; the head's gradients are made in the forward pass.
    inputs = 2 * 8 * 256 * BIG.dim // 4
    assert plan.memory["activations"] >= BIG.n_layers * inputs
    assert plan.flops == 8 * 256 * BIG.flops_per_token(256)
    # Layers are gathered twice in bfloat16, and the head, here one piece, once; the embedding is
    # never gathered: its rows come. Gradients are reduced once in float32.
    head = BIG.vocab_size * BIG.dim
    layers = BIG.parameter_count() - gains - 2 * head
    gathered = 3 / 4 * ((2 + 2) * layers + 2 * head)
    assert plan.bytes_sent["all-gather"] == pytest.approx(gathered, rel=0.01)
    reduced = 3 / 4 * 4 * (layers + head)
    needed = 3 / 4 * (2 + 2 + 4) * BIG.parameter_count()
    assert gathered + reduced < sum(plan.bytes_sent.values()) < 1.1 * needed
    assert 0 < plan.mfu <= 1

    whole = small_plan("v5e:2x2", "data=4")
    assert whole.memory["parameters"] == 4 * BIG.parameter_count()
    # Gradients are reduced whole, in float32; nothing is gathered.
    sent = whole.bytes_sent or {}
    reduced = 2 * 3 / 4 * 4 * BIG.parameter_count()
    assert sent["all-reduce"] == pytest.approx(reduced, rel=0.01)
    assert sum(sent.values()) == pytest.approx(sent["all-reduce"], rel=0.01)


@pytest.mark.slow
def test_plan_reports_what_does_not_fit() -> None:
    plan = small_plan("v5e:1x1", "", WIDE)
    assert not plan.fits and plan.bytes_sent is None
    assert plan.total > plan.capacity > 15e9
    assert plan.to_json()["bytes_moved_per_step"] is None


@pytest.mark.slow
def test_sweep_ranks_every_mesh(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = replace(BIG, n_layers=1, vocab_size=512, max_seq_len=128)
    config = Config(model=model, train=TrainConfig(batch_size=8, dtype="bfloat16"))
    (tmp_path / "config.yaml").write_text(dump_config(config))
    argv = ["plan", "--config", f"{tmp_path}/config.yaml", "--topology", "v5e:1x2", "--sweep"]
    monkeypatch.setattr(sys, "argv", [*argv, "--plot", f"{tmp_path}/plan.svg"])
    jax_plan.main()
    shown = capsys.readouterr().out
    assert {mesh for mesh in ("data=2", "fsdp=2", "tensor=2") if mesh in shown} == {
        "data=2",
        "fsdp=2",
        "tensor=2",
    }
    assert (tmp_path / "plan.svg").read_text().count("<svg") == 1


@pytest.mark.parametrize(
    ("main", "argv", "message"),
    [
        (jax_plan.main, ["--topology", "v9:4x4"], "kinds are v6e, v5p, v5e, v4"),
        (jax_plan.main, ["--topology", "v5e:3x5"], "topology v5e:3x5"),
        (jax_plan.main, ["--topology", "v5e:2x2", "--mesh", "fsdp=3"], "does not divide"),
        (jax_plan.main, ["--topology", "v5e:2x2", "--mesh", "fsdp=2"], "v5e:2x2 has 4"),
        (torch_plan.main, ["--gpu", "v100"], "no figures for 'v100'"),
        (torch_plan.main, ["--gpu", "v5e"], "mooshak_jax.plan"),
        (torch_plan.main, ["--gpus", "0"], "--gpus must be at least 1"),
        (torch_plan.main, ["--gpus", "8", "--mesh", "fsdp=3"], "does not divide"),
        (torch_plan.main, ["--strategy", "ddp", "--mesh", "fsdp=8"], "only the axis data"),
    ],
)
def test_wrong_plan_ends_in_one_line(
    main: Callable[[], None],
    argv: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["plan", *argv])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error


def alive() -> list[torch.Tensor]:
    """Tensors that Python knows of."""
    return [thing for thing in gc.get_objects() if type(thing) is torch.Tensor]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("remat", ["none", "dots", "full"])
@pytest.mark.parametrize("rank", [0, 4])
def test_activations_are_what_autograd_saves(rank: int, dtype: Dtype, remat: str) -> None:
    """Storages that live after the forward pass of real tensors, all but the parameters'.

    Those that autograd saves go through hooks; selective remat keeps its own in Python.
    """
    model = ModelConfig(
        vocab_size=320, dim=64, n_layers=3, n_heads=4, n_kv_heads=2, hidden_dim=176, max_seq_len=96
    )
    train = TrainConfig(batch_size=2, dtype=dtype, remat=remat, loss_chunk=50)
    config = Config(model=model, train=train, lora=LoraConfig(rank=rank))
    objective = make_objective(config.model, config).to_empty(device="cpu")
    initialize(objective.model, seed=0)
    tokens_BS = torch.randint(model.vocab_size, (2, 97))
    tensors = [*objective.parameters(), *objective.buffers(), *alive()]
    before = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    saved: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = objective(Batch(tokens_BS[:, :-1], tokens_BS[:, 1:]))
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in [*saved, *alive()]}
    measured = sum(s.nbytes() for place, s in storages.items() if place not in before)
    assert loss.requires_grad
    predicted, temporary = torch_planner.activation_bytes(config, rows=2, sharded=False)
    assert predicted == pytest.approx(measured, rel=0.1)
    assert temporary > 0
