"""Adapters in PEFT's format: PEFT computes our logits, and we those of PEFT."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from mooshak.checkpoints import peft as ours
from mooshak.checkpoints.base import Checkpoint
from mooshak.config.lora import LoraConfig
from mooshak.errors import InputError
from mooshak_torch.model import Model
from mooshak_torch.params import load_params
from parity.convert import convert, open_any
from parity.export_hf import write_checkpoint
from tests.conftest import TINY_MODEL
from tests.drawn_checkpoints import drawn_checkpoint

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

TOKENS_BT = torch.arange(3, 27).view(2, 12)
LORAS = {
    "lora": LoraConfig(rank=3, alpha=5),
    "dora": LoraConfig(
        rank=3,
        alpha=4.0,
        targets=["wq", "w2"],
        modules_to_save=["embeddings", "lm_head", "norms"],
        rslora=True,
        dora=True,
    ),
    "rows": LoraConfig(rank=3, trainable_token_indices=[3, 9, 26]),
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("peft") / "base"
    write_checkpoint(path, drawn_checkpoint(TINY_MODEL), check=False)
    return path


def our_logits(source: Checkpoint) -> np.ndarray:
    model = Model(source.model, "float32")
    load_params(dict(model.named_parameters()), source)
    with torch.no_grad():
        result: np.ndarray = model(TOKENS_BT).numpy()
    return result


def hf_logits(model: Any) -> np.ndarray:
    with torch.no_grad():
        result: np.ndarray = model(TOKENS_BT).logits.numpy()
    return result


def base_model(path: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(path).eval()


def adapted_checkpoint(lora: LoraConfig) -> Checkpoint:
    """Drawn weights and adapters; lora_b, too, and magnitudes that are not the norms."""
    source = drawn_checkpoint(replace(TINY_MODEL, lora=lora))

    def read(name: str, rows: slice = slice(None)) -> np.ndarray:
        value = source.read(name, rows)
        return value * np.float32(1.1) if name.endswith("dora_magnitude") else value

    return replace(source, read=read)


@pytest.mark.parametrize("kind", LORAS)
def test_peft_loads_our_adapters(kind: str, exported: Path, tmp_path: Path) -> None:
    source = adapted_checkpoint(LORAS[kind])
    ours.write_adapter(tmp_path / "adapter", source)
    theirs = hf_logits(peft.PeftModel.from_pretrained(base_model(exported), tmp_path / "adapter"))
    expected = our_logits(source)
    assert np.abs(theirs - expected).max() < 2e-5 * np.abs(expected).max()
    assert np.abs(hf_logits(base_model(exported)) - expected).max() > 0.1 * np.abs(expected).max()


@pytest.mark.parametrize("kind", LORAS)
def test_we_load_adapters_of_peft(kind: str, exported: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    tokens = {"embed_tokens": [3, 9], "lm_head": [3, 9]}
    settings: dict[str, dict[str, Any]] = {
        "lora": {"target_modules": "all-linear"},
        "dora": {"target_modules": ["v_proj"]},
        "rows": {"target_modules": ["v_proj"], "trainable_token_indices": tokens},
    }
    config = peft.LoraConfig(
        r=3,
        use_dora=kind == "dora",
        use_rslora=True,
        init_lora_weights=False,
        modules_to_save=["lm_head"] if kind == "dora" else None,
        task_type="CAUSAL_LM",
        **settings[kind],
    )
    adapted = peft.get_peft_model(base_model(exported), config).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad and "lora_" not in name:
                parameter += 0.1
    adapted.save_pretrained(tmp_path / "adapter")
    source = ours.open_adapter(tmp_path / "adapter", open_any(exported))
    theirs, found = hf_logits(adapted), our_logits(source)
    assert np.abs(theirs - found).max() < 2e-5 * np.abs(theirs).max()


def test_merged_export_is_the_adapted_model(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    ours.write_adapter(tmp_path / "adapter", adapted_checkpoint(LORAS["dora"]))
    options = {"base_model": exported, "merge_lora": True}
    convert(tmp_path / "adapter", tmp_path / "merged", "hf", **options)  # type: ignore[arg-type]
    theirs = hf_logits(base_model(tmp_path / "merged"))
    expected = our_logits(adapted_checkpoint(LORAS["dora"]))
    assert np.abs(theirs - expected).max() < 2e-5 * np.abs(expected).max()
    assert "the adapters change the weights by" in capsys.readouterr().out
    with pytest.raises(InputError, match="name the directory of its model with --base"):
        convert(tmp_path / "adapter", tmp_path / "other", "jax")
    adapted = tmp_path / "adapted"
    convert(tmp_path / "adapter", adapted, "jax", base_model=exported)
    assert open_any(adapted).model.lora == LORAS["dora"]
    with pytest.raises(InputError, match="add --merge-lora"):
        convert(adapted, tmp_path / "other", "hf")


def test_adapters_of_other_models_are_refused(exported: Path, tmp_path: Path) -> None:
    adapter, base = tmp_path / "adapter", open_any(exported)
    ours.write_adapter(adapter, adapted_checkpoint(LORAS["lora"]))
    other = drawn_checkpoint(replace(TINY_MODEL, n_layers=1))
    with pytest.raises(InputError, match=r"layers.1.* is not one of drawn: another model\?"):
        ours.open_adapter(adapter, other)
    with pytest.raises(InputError, match="has shape"):
        ours.open_adapter(adapter, drawn_checkpoint(replace(TINY_MODEL, hidden_dim=40)))
    config = json.loads((adapter / "adapter_config.json").read_text())
    for change, message in (
        ({"peft_type": "IA3"}, "peft_type IA3 is not LORA"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern is not supported"),
        ({"r": 0}, "is not a configuration of LoRA"),
    ):
        (adapter / "adapter_config.json").write_text(json.dumps(config | change))
        with pytest.raises(InputError, match=message):
            ours.open_adapter(adapter, base)
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    tensors = load_file(adapter / "adapter_model.safetensors")
    del tensors["base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"]
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(InputError, match=r"layers.0.mlp.w3.lora_b.weight is missing"):
        ours.open_adapter(adapter, base)
