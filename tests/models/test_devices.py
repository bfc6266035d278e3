"""The option --device, the flags of matrix products, and steps that never mix two devices.

There is no accelerator here: tensors on torch's meta device stand for those of a GPU.
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import mooshak_jax
import mooshak_torch
from mooshak.config.model import Dtype, ModelConfig
from mooshak.config.sections import Config, DataConfig, TrainConfig
from mooshak.data.packing import make_batch
from mooshak.device import device_environment
from mooshak.errors import InputError
from mooshak_torch.device import find_device
from mooshak_torch.distributed.mesh import make_parallel
from mooshak_torch.distributed.parallelize import parallelize
from mooshak_torch.model import make_caches
from mooshak_torch.objectives import CausalLM, make_objective, model_of
from mooshak_torch.optimizer import Optimizer
from mooshak_torch.step import set_matmul_precision, train_step
from parity import checker

META = torch.device("meta")


class _OneDevice(TorchDispatchMode):
    """Raises an error for an operation on tensors of two devices, unless it copies."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        leaves = tree_leaves((args, kwargs or {}))
        devices = {t.device.type for t in leaves if isinstance(t, torch.Tensor) and t.ndim}
        if len(devices) > 1 and "copy" not in str(func):
            raise AssertionError(f"{func} has tensors on {devices}")
        return func(*args, **(kwargs or {}))


def test_mixed_devices_are_detected() -> None:
    with _OneDevice(), pytest.raises(AssertionError, match="has tensors on"):
        torch.zeros(3, device=META) + torch.zeros(3)


@pytest.mark.parametrize("document_mask", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", ["mooshak", "llama"])
def test_step_and_decoding_stay_on_one_device(
    architecture: str, dtype: Dtype, document_mask: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"vocab_size": 64, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48}
    config = Config(
        model=ModelConfig(architecture=architecture, max_seq_len=32, **sizes),  # type: ignore[arg-type]
        train=TrainConfig(
            batch_size=4, sequence_length=16, gradient_accumulation_steps=2, dtype=dtype
        ),
        data=DataConfig(document_mask=document_mask),
    )
    parallel = make_parallel(config, META)
    objective = parallelize(make_objective(config.model, config), parallel, config)
    model = model_of(objective)
    optimizer = Optimizer(objective, model, config.optimizer)
    tokens_BS = np.random.default_rng(0).integers(0, 64, (4, 17), dtype=np.int32)
    segments_BS = np.tile(np.arange(17, dtype=np.int32) // 6, (4, 1))
    batch = make_batch(tokens_BS, segments_BS if document_mask else None)
    # Its number of labels is read on the host, and meta tensors have no values.
    monkeypatch.setattr(CausalLM, "prepare", lambda *_: 60)
    with _OneDevice():
        here = parallel.shard_local_batch(batch)
        loss, norm = train_step(objective, optimizer, here, 1e-3, config, parallel)
        assert loss.device == norm.device == META
        with torch.no_grad():
            caches = make_caches(model, 2, 16)
            model.hidden_states(here.tokens[:2, :8], caches=caches)
            positions_BT = torch.full((2, 1), 8, device=META)
            assert model(here.tokens[:2, 8:9], positions_BT, caches).shape == (2, 1, 64)


def test_matmul_flags_are_strict_after_a_change() -> None:
    cuda = torch.backends.cuda.matmul
    cuda.allow_tf32 = True
    cuda.allow_bf16_reduced_precision_reduction = True
    torch.backends.cudnn.allow_tf32 = True
    set_matmul_precision()
    assert torch.get_float32_matmul_precision() == "highest"
    assert not (cuda.allow_tf32 or torch.backends.cudnn.allow_tf32)
    assert not cuda.allow_bf16_reduced_precision_reduction
    assert not cuda.allow_fp16_reduced_precision_reduction


def test_device_environment_restricts_both_frameworks() -> None:
    assert device_environment(None) == {}
    assert device_environment("cpu") == {"CUDA_VISIBLE_DEVICES": "", "JAX_PLATFORMS": "cpu"}
    assert device_environment("cuda") == {"JAX_PLATFORMS": "cuda,cpu"}
    assert device_environment("tpu") == {"CUDA_VISIBLE_DEVICES": "", "JAX_PLATFORMS": "tpu,cpu"}


@pytest.mark.parametrize("package", [mooshak_torch, mooshak_jax])
@pytest.mark.parametrize("device", ["cuda", "tpu"])
def test_absent_device_is_one_error(package: Any, device: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"device {device}"):
        package.load(tmp_path, device=device)


@pytest.mark.parametrize("name", ["mps", "banana", "cpu:x", "gpu", "cuda:7"])
def test_unknown_device_of_torch_is_one_error(name: str) -> None:
    with pytest.raises(InputError, match=f"device {name} is not available to PyTorch"):
        find_device(name)


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ("mooshak_torch.generate", "CHECKPOINT", "--prompt", "a", "--device", "cuda"),
        ("mooshak_jax.generate", "CHECKPOINT", "--prompt", "a", "--device", "tpu"),
        tuple("parity.logits CHECKPOINT --backend jax --tokens T --out OUT --device cuda".split()),
        ("parity.check", "CHECKPOINT", "--quick", "--device", "cuda"),
        ("parity.accelerator", "--out", "OUT", "--device", "tpu"),
    ],
)
def test_commands_refuse_an_absent_device(words: tuple[str, ...], tmp_path: Path) -> None:
    from mooshak.checkpoints import safetensors

    model = ModelConfig(vocab_size=32, dim=16, n_layers=1, n_heads=2, hidden_dim=24, max_seq_len=32)
    safetensors.write_checkpoint(tmp_path / "c", checker.random_checkpoint(model))
    np.save(tmp_path / "t.npy", np.zeros((1, 4), np.int64))
    places = {"CHECKPOINT": "c", "T": "t.npy", "OUT": "out"}
    line = [str(tmp_path / places[w]) if w in places else w for w in words]
    found = subprocess.run([sys.executable, "-m", *line], capture_output=True, text=True)
    assert found.returncode == 2, found.stderr
    assert found.stderr.splitlines()[-1].startswith("error: ") and "Traceback" not in found.stderr
