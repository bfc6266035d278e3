"""Cross entropy and log-probabilities per token: both frameworks against plain log_softmax.

Shapes: B batch, T time, D model width, V vocabulary.
"""

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mooshak.config.sections import Config, ParallelConfig
from mooshak.data.packing import IGNORE_INDEX
from mooshak_jax.distributed.mesh import make_parallel
from mooshak_jax.ops import cross_entropy as jax_ops
from mooshak_torch.model import Linear
from mooshak_torch.ops import cross_entropy as torch_ops

FUNCTIONS = ("cross_entropy", "token_log_probs")


@pytest.fixture(autouse=True, scope="module")
def float64() -> Iterator[None]:
    with jax.enable_x64():
        yield


class Given(NamedTuple):
    """Hidden states, head, labels, and the upstream gradient of the log-probabilities."""

    x_BTD: np.ndarray
    w_VD: np.ndarray
    labels_BT: np.ndarray
    upstream_BT: np.ndarray


def given(B: int = 2, T: int = 7, D: int = 5, V: int = 11) -> Given:
    """Return random arrays in float64; some labels are ignored, some weights zero or negative."""
    random = np.random.default_rng(0)
    x_BTD, w_VD = random.normal(size=(B, T, D)), random.normal(size=(V, D))
    labels_BT, upstream_BT = random.integers(0, V, (B, T)), random.normal(size=(B, T))
    labels_BT[0, 3:5], upstream_BT[:, 1] = IGNORE_INDEX, 0
    labels_BT[0, 0], labels_BT[-1, -1] = 0, V - 1
    assert (upstream_BT < 0).any() and (upstream_BT > 0).any()
    return Given(x_BTD, w_VD, labels_BT, upstream_BT)


def plain(data: Given) -> list[np.ndarray]:
    """Return log-probabilities and their gradients of x and w, from all logits at once."""
    x_BTD, w_VD = (torch.tensor(a, requires_grad=True) for a in data[:2])
    is_label_BT = torch.tensor(data.labels_BT) != IGNORE_INDEX
    labels_BT = torch.tensor(data.labels_BT).where(is_label_BT, 0)
    log_p_BTV = (x_BTD @ w_VD.T).log_softmax(-1)
    log_probs_BT = log_p_BTV.gather(-1, labels_BT[..., None])[..., 0].where(is_label_BT, 0)
    grads = torch.autograd.grad(log_probs_BT, (x_BTD, w_VD), torch.tensor(data.upstream_BT))
    return [log_probs_BT.detach().numpy(), *(g.numpy() for g in grads)]


def by_torch(data: Given, chunk: int, dtype: Any = torch.float64) -> list[np.ndarray]:
    """Return `plain`'s arrays from `token_log_probs`; x is in `dtype`, w at least in float32."""
    wide = torch.promote_types(dtype, torch.float32)
    x_BTD = torch.tensor(data.x_BTD, dtype=dtype, requires_grad=True)
    w_VD = torch.tensor(data.w_VD, dtype=wide, requires_grad=True)
    log_probs_BT = torch_ops.token_log_probs(x_BTD, w_VD, torch.tensor(data.labels_BT), chunk)
    assert log_probs_BT.dtype == wide
    grads = torch.autograd.grad(
        log_probs_BT, (x_BTD, w_VD), torch.tensor(data.upstream_BT).to(wide)
    )
    assert [g.dtype for g in grads] == [dtype, wide]
    return [log_probs_BT.detach().double().numpy(), *(g.double().numpy() for g in grads)]


def jax_function(data: Given, chunk: int, dtype: Any = jnp.float64) -> tuple[Callable, list[Any]]:
    """Return a function of x, w and labels that gives `plain`'s arrays, and its arguments."""
    wide = jnp.promote_types(dtype, jnp.float32)

    def compute(x_BTD: jax.Array, w_DV: jax.Array, labels_BT: jax.Array) -> list[jax.Array]:
        def log_probs(x_BTD: jax.Array, w_DV: jax.Array) -> jax.Array:
            return jax_ops.token_log_probs(x_BTD, w_DV, labels_BT, chunk)

        log_probs_BT, pull_back = jax.vjp(log_probs, x_BTD, w_DV)
        return [log_probs_BT, *pull_back(jnp.asarray(data.upstream_BT, wide))]

    arguments = jnp.asarray(data.x_BTD, dtype), jnp.asarray(data.w_VD.T, wide), data.labels_BT
    return compute, [*arguments]


def by_jax(data: Given, chunk: int, dtype: Any = jnp.float64) -> list[np.ndarray]:
    """Return the same as `by_torch`."""
    compute, arguments = jax_function(data, chunk, dtype)
    found = jax.jit(compute)(*arguments)
    wide = jnp.promote_types(dtype, jnp.float32)
    assert [a.dtype for a in found] == [wide, dtype, wide]
    log_probs_BT, dx_BTD, dw_DV = (np.asarray(a, np.float64) for a in found)
    return [log_probs_BT, dx_BTD, dw_DV.T]


def distances(found: list[np.ndarray], truth: list[np.ndarray]) -> list[float]:
    """Return relative differences by the Frobenius norm."""
    pairs = zip(found, truth, strict=True)
    return [float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in pairs]


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [1, 6, 14, 1000])
def test_cross_entropy_and_gradients_equal_the_plain_loss(chunk: int) -> None:
    data = given()
    truth, *truth_grads = plain(data._replace(upstream_BT=np.full_like(data.upstream_BT, -3)))
    tx, tw = (torch.tensor(a, requires_grad=True) for a in data[:2])
    labels = torch.tensor(data.labels_BT)
    ours = torch_ops.cross_entropy(tx, tw, labels, chunk)
    grads = torch.autograd.grad(ours * 3, (tx, tw))
    assert np.isclose(ours.item(), -truth.sum(), rtol=1e-14)
    for a, b in zip(grads, truth_grads, strict=True):
        assert np.allclose(a, b, rtol=1e-12, atol=1e-14)
    with torch.no_grad():
        assert torch.equal(torch_ops.cross_entropy(tx, tw, labels, chunk), ours)

    def scaled(x: jax.Array, w: jax.Array) -> jax.Array:
        return 3 * jax_ops.cross_entropy(x, w, data.labels_BT, chunk)

    x, w = jnp.asarray(data.x_BTD), jnp.asarray(data.w_VD.T)
    theirs, (gx, gw) = jax.value_and_grad(scaled, (0, 1))(x, w)
    assert np.isclose(theirs, -3 * truth.sum(), rtol=1e-14)
    assert np.allclose(gx, truth_grads[0], rtol=1e-12, atol=1e-14)
    assert np.allclose(gw.T, truth_grads[1], rtol=1e-12, atol=1e-14)
    assert np.isclose(scaled(x, w), -3 * truth.sum(), rtol=1e-14)


def test_cross_entropy_without_grad_computes_no_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    data = given()
    tx, tw = (torch.tensor(a, requires_grad=True) for a in data[:2])
    labels = torch.tensor(data.labels_BT)
    monkeypatch.setattr(torch_ops, "_add_gradients", None)
    with torch.no_grad():
        torch_ops.cross_entropy(tx, tw, labels, 6)
    torch_ops.cross_entropy(tx.detach(), tw.detach(), labels, 6)
    with pytest.raises(TypeError):
        torch_ops.cross_entropy(tx.detach(), tw, labels, 6)


@pytest.mark.parametrize("chunk", [1, 6, 14, 1000])
def test_token_log_probs_and_gradients_equal_log_softmax(chunk: int) -> None:
    data = given()
    truth, ours, theirs = plain(data), by_torch(data, chunk), by_jax(data, chunk)
    for found in (ours, theirs):
        assert max(distances(found, truth)) < 1e-12
        assert not found[0][data.labels_BT == IGNORE_INDEX].any()
    assert max(distances(ours, theirs)) < 1e-12


def test_token_log_probs_sum_to_the_cross_entropy() -> None:
    data = given()
    x, w, labels = (torch.tensor(a) for a in data[:3])
    ours = torch_ops.cross_entropy(x, w, labels, 6)
    assert np.isclose(-torch_ops.token_log_probs(x, w, labels, 6).sum(), ours, rtol=1e-14)
    arguments = jnp.asarray(data.x_BTD), jnp.asarray(data.w_VD.T), data.labels_BT, 6
    theirs = jax_ops.cross_entropy(*arguments)
    assert np.isclose(-jax_ops.token_log_probs(*arguments).sum(), theirs, rtol=1e-14)


def test_loss_module_returns_the_sum_or_token_log_probs() -> None:
    data = given()
    head = Linear(5, 11, torch.float64)
    torch.nn.init.normal_(head.weight)
    loss = torch_ops.FusedLinearCrossEntropy(head, chunk=6)
    x, labels = torch.tensor(data.x_BTD), torch.tensor(data.labels_BT)
    log_probs_BT = loss(x, labels, per_token=True)
    assert torch.equal(log_probs_BT, torch_ops.token_log_probs(x, head.weight, labels, 6))
    assert torch.equal(loss(x, labels), torch_ops.cross_entropy(x, head.weight, labels, 6))


def test_token_log_probs_ignore_gradients_of_ignored_labels() -> None:
    """Also such as are not finite: a division by the number of labels of an empty row."""
    data = given()
    truth = plain(data)
    upstream_BT = np.where(data.labels_BT == IGNORE_INDEX, np.nan, data.upstream_BT)
    for by in (by_torch, by_jax):
        assert max(distances(by(data._replace(upstream_BT=upstream_BT), 6), truth)) < 1e-12


def test_token_log_probs_refuse_a_second_derivative() -> None:
    x, w, labels = (torch.tensor(a) for a in given()[:3])
    log_probs_BT = torch_ops.token_log_probs(x.requires_grad_(), w, labels, 6)
    (dx_BTD,) = torch.autograd.grad(log_probs_BT.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx_BTD.sum().backward()


@pytest.mark.parametrize(("dtype", "allowed"), [("float32", 16 * 2.0**-24), ("bfloat16", 2.0**-7)])
def test_token_log_probs_in_low_precision_are_near_float64(dtype: str, allowed: float) -> None:
    """Inputs are exact in both dtypes. Torch's logits are rounded to the compute dtype."""
    data = given(4, 24, 40, 96)
    rounded = (torch.tensor(a).bfloat16().double().numpy() for a in data[:2])
    data = Given(*rounded, *data[2:])
    truth = plain(data)
    ours = distances(by_torch(data, 20, getattr(torch, dtype)), truth)
    theirs = distances(by_jax(data, 20, getattr(jnp, dtype)), truth)
    assert 0 < max(*ours, *theirs) < allowed, (ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["data=8", "fsdp=8", "tensor=4", "data=2,fsdp=2,tensor=2"])
def test_token_log_probs_on_a_mesh_equal_one_device(mesh: str) -> None:
    data = given(8, 6, 16, 24)
    parallel = make_parallel(Config(parallel=ParallelConfig(mesh=mesh)))
    compute, arguments = jax_function(data, 12)

    def on_mesh(*arguments: jax.Array) -> list[jax.Array]:
        with parallel.activate():
            return compute(*arguments)

    head = parallel.sharding("embed", "vocab")
    function = jax.jit(
        on_mesh, in_shardings=(parallel.batch_sharding, head, parallel.batch_sharding)
    )
    log_probs_BT, dx_BTD, dw_DV = function(*arguments)
    assert dw_DV.sharding.is_equivalent_to(head, 2)
    found = [np.asarray(a) for a in (log_probs_BT, dx_BTD, dw_DV.T)]
    assert max(distances(found, plain(data))) < 1e-12


B, T, D, V, CHUNK = 4, 32, 16, 1024, 16
"""Sizes of the tests of memory: all logits are eight times a chunk's and as many times the head."""


def run_torch(name: str) -> None:
    """Forward and backward pass of a function."""
    x, w, labels = (torch.tensor(a) for a in given(B, T, D, V)[:3])
    value = getattr(torch_ops, name)(x.requires_grad_(), w.requires_grad_(), labels, CHUNK)
    value.sum().backward()
    assert w.grad is not None and w.grad.any()


def compile_jax(name: str) -> Any:
    """Return the compiled forward and backward pass of a function."""
    data = given(B, T, D, V)

    def total(x: jax.Array, w: jax.Array) -> jax.Array:
        return getattr(jax_ops, name)(x, w, data.labels_BT, CHUNK).sum()

    compute = jax.jit(jax.value_and_grad(total, (0, 1)))
    return compute.lower(data.x_BTD, data.w_VD.T).compile()


class LargestTensor(TorchDispatchMode):
    """Records the largest number of elements of a result."""

    size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [t.numel() for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        self.size = max(self.size, *sizes, 0)
        return result


@pytest.mark.parametrize("name", FUNCTIONS)
def test_logits_exist_for_one_chunk_at_most(name: str) -> None:
    largest = max(CHUNK * V, D * V)
    assert largest * 8 == B * T * V
    with LargestTensor() as recorded:
        run_torch(name)
    assert recorded.size == largest
    shapes = re.findall(r"\bf64\[([\d,]+)\]", compile_jax(name).as_text())
    assert max(np.prod([int(n) for n in shape.split(",")]) for shape in shapes) == largest


def peak_torch(name: str) -> int:
    """Return the peak of the bytes that a forward and backward pass allocates."""
    run_torch(name)
    with profile(profile_memory=True) as recorded:
        run_torch(name)
    events = recorded.profiler.kineto_results.events()
    changes = [event.nbytes() for event in events if event.name() == "[memory]"]
    assert len(changes) > 100
    return int(np.cumsum(changes).max())


def test_token_log_probs_take_no_more_memory_than_the_loss() -> None:
    """To 5 %: forward and backward pass."""
    loss, log_probs = map(peak_torch, FUNCTIONS)
    assert log_probs < 1.05 * loss
    loss, log_probs = (compile_jax(name).memory_analysis().temp_size_in_bytes for name in FUNCTIONS)
    assert log_probs < 1.05 * loss


@pytest.mark.slow
def test_head_sharded_over_processes_gives_the_plain_result(tmp_path: Path) -> None:
    data = given(2, 9, 6, 16)
    keys = ("x", "w", "labels", "upstream")
    np.savez(tmp_path / "given.npz", **dict(zip(keys, data, strict=True)))
    worker = Path(__file__).with_name("cross_entropy_worker.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run([*command, worker, tmp_path], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [np.load(tmp_path / f"found-{rank}.npz") for rank in range(2)]
    ones = data._replace(upstream_BT=np.full_like(data.upstream_BT, -1))
    for name, truth in (("log_probs", plain(data)), ("loss", plain(ones))):
        if name == "loss":
            truth[0] = -truth[0].sum()
        for rank in ranks:
            # Every process has the full result, a part of the gradient of x, and rows of that of w.
            dx_BTD = sum(rank[f"{name} dx"] for rank in ranks)
            dw_VD = np.concatenate([rank[f"{name} dw"] for rank in ranks])
            assert max(distances([rank[name], dx_BTD, dw_VD], truth)) < 1e-12, name
