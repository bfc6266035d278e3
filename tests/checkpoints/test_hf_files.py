"""Files of Hugging Face models as others leave them: which are read, and which are refused."""

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from safetensors.torch import load_file, save_file

from mooshak.checkpoints.base import check_range
from mooshak.checkpoints.formats import ensure_readable_format
from mooshak.checkpoints.hf_config import model_from_hf
from mooshak.errors import InputError
from parity import distance
from parity.backends import JaxBackend, TorchBackend
from parity.convert import convert, open_any
from tests.parity.test_huggingface import SIZES, make
from tests.sentencepiece_models import added_token, llama_directory

TOKENS_BT = np.random.default_rng(0).integers(0, 128, (2, 20), dtype=np.int32)
BACKENDS = (TorchBackend, JaxBackend)


def logits_of(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(TOKENS_BT).long()).logits.float().numpy()


def assert_same_function(path: Path, model: Any) -> None:
    """Both frameworks compute from a directory what transformers' model computes."""
    source = open_any(path)
    for backend in BACKENDS:
        ours = backend(source).operations("float32", TOKENS_BT)["logits"]
        assert distance.distance(ours, logits_of(model)) < 5e-6, backend.__name__


def loaded(path: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(path).eval()


@pytest.mark.slow
def test_single_file_wins_over_an_older_index(tmp_path: Path) -> None:
    old, both = make(tmp_path / "old", "llama"), tmp_path / "both"
    old.save_pretrained(both, max_shard_size="20KB")
    with torch.no_grad():
        for parameter in old.parameters():
            parameter.mul_(1.5)
    old.save_pretrained(tmp_path / "new")
    shutil.copy(tmp_path / "new" / "model.safetensors", both)
    assert_same_function(both, loaded(both))
    assert distance.distance(logits_of(loaded(both)), logits_of(old)) == 0


def test_single_pickle_wins_over_an_older_index(tmp_path: Path) -> None:
    model = make(tmp_path / "one", "llama")
    (tmp_path / "one" / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "one" / "pytorch_model.bin")
    index = {"weight_map": {"model.norm.weight": "pytorch_model-00001-of-00002.bin"}}
    (tmp_path / "one" / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert np.array_equal(open_any(tmp_path / "one").read("norm.weight"), np_of(model.model.norm))


def np_of(module: Any) -> np.ndarray:
    return module.weight.detach().numpy()


def test_index_decides_which_shards_are_read(tmp_path: Path) -> None:
    """Names that do not begin with model, a shard in a folder, a stale copy of a tensor."""
    model = make(tmp_path, "llama")
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "parts").mkdir()
    names, middle = sorted(tensors), len(tensors) // 2
    files = {"weights_a.safetensors": names[:middle], "parts/b.safetensors": names[middle:]}
    for file, keys in files.items():
        stale = {names[0]: tensors[names[0]] + 1} if file.startswith("parts") else {}
        save_file({key: tensors[key] for key in keys} | stale, tmp_path / file)
    weight_map = {key: file for file, keys in files.items() for key in keys}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert_same_function(tmp_path, model)
    (tmp_path / "weights_a.safetensors").unlink()
    with pytest.raises(InputError, match=r"weights_a\.safetensors is missing, with tensor"):
        open_any(tmp_path)


def test_variant_next_to_a_pickle_is_not_read(tmp_path: Path) -> None:
    model = make(tmp_path / "hf", "llama")
    (tmp_path / "hf" / "model.safetensors").rename(tmp_path / "hf" / "model.fp16.safetensors")
    torch.save(model.state_dict(), tmp_path / "hf" / "pytorch_model.bin")
    convert(tmp_path / "hf", tmp_path / "ours", "safetensors")
    assert_same_function(tmp_path / "ours", model)


@pytest.mark.slow
def test_tied_weights_may_stand_under_the_head_only(tmp_path: Path) -> None:
    model = make(tmp_path / "hf", "llama", tie_word_embeddings=True)
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight").clone()
    save_file(tensors, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    assert_same_function(tmp_path / "hf", model)
    convert(tmp_path / "hf", tmp_path / "again", "hf")
    assert distance.distance(logits_of(loaded(tmp_path / "again")), logits_of(model)) == 0


def test_index_may_list_a_tied_head_that_no_shard_has(tmp_path: Path) -> None:
    model = make(tmp_path / "hf", "llama", tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    index = tmp_path / "many" / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    values["weight_map"]["lm_head.weight"] = next(iter(values["weight_map"].values()))
    index.write_text(json.dumps(values))
    assert_same_function(tmp_path / "many", model)
    values["weight_map"]["model.layers.9.norm"] = values["weight_map"]["lm_head.weight"]
    index.write_text(json.dumps(values))
    with pytest.raises(InputError, match=r"lacks tensor model\.layers\.9\.norm"):
        open_any(tmp_path / "many")


@pytest.mark.parametrize(
    "change",
    [
        {"_my_note": "x", "_commit_hash": "ab"},
        {"sliding_window": None, "final_logit_softcapping": None, "quantization_config": None},
        {"partial_rotary_factor": 1.0, "logits_scaling": 1.0, "pruned_heads": {}},
        {"attn_logit_softcapping": 0.0, "final_logit_softcapping": 0.0, "logit_scale": 1.0},
        {"embedding_multiplier": 1.0, "residual_multiplier": 1.0, "use_qk_norm": False},
        {"num_experts": 0, "num_local_experts": 0, "num_nextn_predict_layers": 0},
        {"is_encoder_decoder": False, "tie_encoder_decoder": False},
        {"max_length": 20, "do_sample": False, "temperature": 0.7, "num_beams": 1, "top_k": 50},
        {"is_decoder": False, "add_cross_attention": False, "chunk_size_feed_forward": 0},
        {"use_sliding_window": False, "id2label": {"0": "a"}, "output_attentions": False},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "factor": None}},
        {"rope_scaling": {"type": "linear", "factor": 2.0, "partial_rotary_factor": 1.0}},
    ],
)
def test_keys_without_effect_are_accepted(change: dict[str, Any]) -> None:
    values = SIZES | {"model_type": "llama", "rope_theta": 1e4}
    linear = {"rope_scaling": {"type": "linear", "factor": 2.0}} if "rope_scaling" in change else {}
    assert model_from_hf(values | change, "here") == model_from_hf(values | linear, "here")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("partial_rotary_factor", 0.5),
        ("logits_scaling", 8.0),
        ("final_logit_softcapping", 30.0),
        ("attn_logit_softcapping", 1.0),
        ("logit_scale", 0.0625),
        ("embedding_multiplier", 12.0),
        ("residual_multiplier", 0.22),
        ("num_experts", 1),
        ("use_qk_norm", True),
        ("is_decoder", True),
        ("num_local_experts", 8),
    ],
)
def test_keys_with_an_effect_are_named(key: str, value: Any) -> None:
    with pytest.raises(InputError, match=f"here: key '{key}' .* is not supported"):
        model_from_hf(SIZES | {"model_type": "llama", key: value}, "here")


@pytest.mark.parametrize("to", ["torch", "jax", "safetensors", "hf", "gguf"])
def test_overflowing_cast_names_tensor_and_value(to: str, tmp_path: Path) -> None:
    model = make(tmp_path / "hf", "llama", torch.bfloat16)
    llama_directory(tmp_path / "spm", {})
    shutil.copy(tmp_path / "spm" / "tokenizer.model", tmp_path / "hf")
    with torch.no_grad():
        model.to(torch.bfloat16).model.layers[1].self_attn.k_proj.weight[3, 5] = 1e5
    model.save_pretrained(tmp_path / "hf")
    before = sorted(tmp_path.iterdir())
    message = (
        r"tensor model\.layers\.1\.self_attn\.k_proj\.weight \(layers\.1\.attention\.wk\.weight\) "
        r"has the value 99840, which float16 does not hold \(at most 65504\)"
    )
    with pytest.raises(InputError, match=message):
        convert(tmp_path / "hf", tmp_path / "target", to, dtype="float16")
    assert sorted(tmp_path.iterdir()) == before
    with pytest.raises(InputError, match=message):
        check_range(open_any(tmp_path / "hf"), "float16").read("layers.1.attention.wk.weight")
    assert check_range(open_any(tmp_path / "hf"), "float32").read("norm.weight").any()


def test_float64_beyond_float32_is_refused(tmp_path: Path) -> None:
    model = make(tmp_path / "hf", "llama", torch.float64).double()
    with torch.no_grad():
        model.model.norm.weight[0] = 1e300
    model.save_pretrained(tmp_path / "hf")
    with pytest.raises(
        InputError, match=r"model\.norm\.weight \(norm\.weight\) has the .* 1e\+300"
    ):
        convert(tmp_path / "hf", tmp_path / "target", "torch", dtype="float32")


@pytest.mark.slow
@pytest.mark.parametrize("framework", ["torch", "jax"])
@pytest.mark.parametrize("place", ["config.json", "generation_config.json"])
def test_generation_ends_at_each_named_token(place: str, framework: str, tmp_path: Path) -> None:
    import mooshak_jax
    import mooshak_torch

    load = {"torch": mooshak_torch.load, "jax": mooshak_jax.load}[framework]
    make(tmp_path, "llama")
    (tmp_path / "generation_config.json").unlink(missing_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config["eos_token_id"] = None
    (tmp_path / "config.json").write_text(json.dumps(config))
    free = load(tmp_path).generate([3, 5], max_new_tokens=20)
    end = free.token_ids[4]
    n = free.token_ids.index(end)
    values = config if place == "config.json" else {}
    (tmp_path / place).write_text(json.dumps(values | {"eos_token_id": [127, end]}))
    lm = load(tmp_path)
    found = lm.generate([3, 5], max_new_tokens=20)
    assert (found.token_ids, found.finish_reason) == (free.token_ids[:n], "stop")
    lm.save(tmp_path / "saved")
    assert load(tmp_path / "saved").generate([3, 5], max_new_tokens=20).token_ids == found.token_ids


@pytest.mark.slow
def test_conversion_works_next_to_nothing_writable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pickle in a read-only cache, for JAX, which reads a copy of it."""
    model = make(tmp_path / "hf", "llama")
    (tmp_path / "hf" / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "hf" / "pytorch_model.bin")
    original = tempfile.mkdtemp

    def mkdtemp(suffix: Any = None, prefix: Any = None, dir: Any = None) -> str:
        if dir == tmp_path:
            raise PermissionError(13, "Permission denied", str(dir))
        return original(suffix, prefix, dir)

    monkeypatch.setattr(tempfile, "mkdtemp", mkdtemp)
    monkeypatch.chdir(tmp_path)
    with ensure_readable_format(Path("hf"), "jax") as path:
        assert np.array_equal(open_any(path).read("norm.weight"), np_of(model.model.norm))
    assert not path.exists()


@pytest.mark.slow
@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_tokens_without_a_row_are_refused_where_they_occur(framework: str, tmp_path: Path) -> None:
    """A `<pad>` after the rows of the embedding, as in Code Llama."""
    import mooshak_jax
    import mooshak_torch

    load = {"torch": mooshak_torch.load, "jax": mooshak_jax.load}[framework]
    n = llama_directory(tmp_path / "spm", {}).vocab_size()
    make(tmp_path / "hf", "llama", vocab_size=n)
    llama_directory(tmp_path / "s", {"added_tokens_decoder": {str(n): added_token("<pad>")}})
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(tmp_path / "s" / name, tmp_path / "hf")
    lm = load(tmp_path / "hf")
    assert len(lm.generate("the cat", max_new_tokens=4, stop_token_ids=[]).token_ids) <= 4
    with pytest.raises(InputError, match=f"token {n} is outside of the vocabulary"):
        lm.generate("the <pad>", max_new_tokens=4)
