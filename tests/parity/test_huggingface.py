"""Hugging Face models, made here, as oracle, source and target of conversion."""

import json
import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

# Before transformers is imported: no network, and the code of remote models in a place of its own.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="modules-")

import gguf
import torch
import transformers
from safetensors.numpy import load_file, save_file

from mooshak.checkpoints.base import Checkpoint
from mooshak.checkpoints.hf_config import REQUIRED, model_from_hf, model_to_hf
from mooshak.errors import InputError
from mooshak.tokenizer.base import Tokenizer
from parity import distance, tolerances
from parity.backends import JaxBackend, TorchBackend
from parity.convert import convert, main, open_any
from parity.export_gguf import frequency_factors

SIZES = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 52,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 96,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e4,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 24,
}
GRID: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, MHA": ("llama", {}),
    "llama, GQA 2, tied, llama3": (
        "llama",
        {"num_key_value_heads": 4, "tie_word_embeddings": True, "rope_parameters": LLAMA3},
    ),
    "llama, MQA, biases, head_dim, linear": (
        "llama",
        {
            "num_key_value_heads": 1,
            "attention_bias": True,
            "mlp_bias": True,
            "head_dim": 6,
            "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
        },
    ),
    "mistral, window": ("mistral", {"num_key_value_heads": 2, "sliding_window": 10}),
    "qwen2": ("qwen2", {"num_key_value_heads": 2}),
    "qwen3": ("qwen3", {"num_key_value_heads": 2, "head_dim": 12, "tie_word_embeddings": True}),
}


def make(directory: Path, kind: str, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    """A model that transformers makes, drawn so that faults show, and saves to `directory`."""
    config = transformers.AutoConfig.for_model(kind, **SIZES | settings)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            around, std = (1.0, 0.2) if "norm" in name else (0.0, 0.15)
            parameter.normal_(around, std)
    model.to(dtype).save_pretrained(directory)
    # Loaded again: `to` rounds the frequencies of RoPE too, which a file does not hold.
    return transformers.AutoModelForCausalLM.from_pretrained(directory).eval()


@pytest.mark.slow
@pytest.mark.parametrize("case", GRID)
def test_family_is_the_same_function_in_both_frameworks(case: str, tmp_path: Path) -> None:
    kind, settings = GRID[case]
    theirs = make(tmp_path / "hf", kind, **settings)
    source = open_any(tmp_path / "hf")
    assert source.format == "hf"
    tokens_BT = np.random.default_rng(0).integers(0, 128, (2, 40), dtype=np.int32)
    truth = TorchBackend(source).operations("float64", tokens_BT)["logits"]
    with torch.no_grad():
        found = theirs(torch.from_numpy(tokens_BT).long()).logits.numpy()
    floor = distance.distance(found, truth)
    assert floor < 5e-6, floor  # It is the same function.
    prompts = tokens_BT[:, :8]
    greedy = theirs.generate(
        torch.from_numpy(prompts).long(), max_new_tokens=64, do_sample=False, eos_token_id=None
    )[:, 8:]
    for side in (TorchBackend(source), JaxBackend(source)):
        ours = side.operations("float32", tokens_BT)["logits"]
        allowed = tolerances.RATIO * max(floor, tolerances.TINY)
        assert distance.distance(ours, truth) <= allowed, side.name
        texts = side.lm("float32").generate(prompts.tolist(), max_new_tokens=64)
        assert [text.token_ids for text in texts] == greedy.tolist(), side.name


def bits(checkpoint: Checkpoint) -> dict[str, tuple[str, bytes]]:
    return {
        key: (a.dtype.str, a.tobytes())
        for key in checkpoint.tensors
        for a in [checkpoint.read(key)]
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "dtype"),
    list(zip(GRID, (torch.float32, torch.bfloat16, torch.float16) * 2, strict=True)),
)
def test_round_trip_keeps_every_bit(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    kind, settings = GRID[case]
    make(tmp_path / "start", kind, dtype, bos_token_id=3, eos_token_id=[5, 7], **settings)
    (tmp_path / "start" / "chat_template.jinja").write_text("{{ messages }}")
    at = tmp_path / "start"
    for i, to in enumerate(("torch", "jax", "torch", "safetensors", "hf")):
        convert(at, tmp_path / str(i), to)
        at = tmp_path / str(i)
    assert bits(open_any(tmp_path / "start")) == bits(open_any(at))
    configs = [
        transformers.AutoConfig.from_pretrained(path).to_dict() | {"_name_or_path": ""}
        for path in (tmp_path / "start", at)
    ]
    assert configs[0] == configs[1]
    for name in ("generation_config.json", "chat_template.jinja"):
        assert (at / name).read_bytes() == (tmp_path / "start" / name).read_bytes()
    written = json.loads((at / "config.json").read_text())
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"]
    # The form of transformers 4 alone says the same.
    del written["rope_parameters"]
    assert model_from_hf(written, "here") == open_any(at).model


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case, (kind, _) in GRID.items() if kind != "mistral"])
def test_gguf_file_holds_the_model(case: str, tmp_path: Path, tiny_tokenizer: Tokenizer) -> None:
    kind, settings = GRID[case]
    settings = settings | {"vocab_size": 512}
    original = make(tmp_path / "hf", kind, **settings)
    shutil.copyfile(tiny_tokenizer.path, tmp_path / "hf" / "tokenizer.model")
    convert(tmp_path / "hf", tmp_path / "model.gguf", "gguf")
    read = gguf.GGUFReader(tmp_path / "model.gguf")
    source = open_any(tmp_path / "hf")
    model, found = source.model, {tensor.name: tensor.data for tensor in read.tensors}
    factors = frequency_factors(model)
    assert len(found) == len(source.tensors) + (factors is not None)
    # llama.cpp's Llama turns neighbours: element j of a half follows on element j of the other.
    order = [s * model.K // 2 + j for j in range(model.K // 2) for s in range(2)]
    for theirs, ours, heads in (("q", "wq", model.n_heads), ("k", "wk", model.G)):
        rows = [h * model.K + k for h in range(heads) for k in order]
        for last in ("weight", "bias") if model.qkv_bias else ("weight",):
            expected = source.read(f"layers.1.attention.{ours}.{last}")
            expected = expected[rows] if kind == "llama" else expected
            assert np.array_equal(found[f"blk.1.attn_{theirs}.{last}"], expected)
    assert np.array_equal(found["blk.0.ffn_down.weight"], source.read("layers.0.mlp.w2.weight"))
    assert np.array_equal(found["output_norm.weight"], source.read("norm.weight"))
    pieces = read.get_field("tokenizer.ggml.tokens").contents()
    assert len(pieces) == 512 and pieces[tiny_tokenizer.id_of("<|user|>")] == "<|user|>"
    if case in ("llama, MHA", "qwen2"):
        # transformers reads plain ones by code of its own; not head_dim and rope_freqs.
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf")
        tokens = torch.arange(30)[None]
        with torch.no_grad():
            logits = [m(tokens).logits.numpy() for m in (again, original)]
        assert distance.distance(*logits) < 1e-6


def test_gguf_refuses_models_llama_cpp_cannot_run(tmp_path: Path) -> None:
    make(tmp_path / "hf", *GRID["mistral, window"][:1], **GRID["mistral, window"][1])
    with pytest.raises(
        InputError, match=r"no architecture for this model \(mistral, sliding window"
    ):
        convert(tmp_path / "hf", tmp_path / "model.gguf", "gguf")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gemma"}, "model_type 'gemma' is not supported; known: llama"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures .* not supported"),
        ({"logits_soft_cap": 30.0}, "key 'logits_soft_cap' .30.0. is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"rope_interleaved": True}, "rope_interleaved True is not supported"),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2}},
            "dynamic is not supported; supported are linear",
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 2}},
            "yarn is not supported; supported are linear",
        ),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}, "rope_theta": 6.0},
            "rope_parameters say",
        ),
        (
            {
                "model_type": "qwen2",
                "use_sliding_window": True,
                "sliding_window": 8,
                "max_window_layers": 1,
            },
            "layers with and without a sliding window",
        ),
        ({"hidden_size": None}, "key 'hidden_size' is missing"),
        ({"hidden_size": "32"}, "hidden_size '32' is not an integer"),
        ({"num_hidden_layers": True}, "num_hidden_layers True is not an integer"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps '1e-5' is not a number"),
        ({"hidden_size": 33}, "here: model.dim 33 is not divisible by model.n_heads 8"),
        ({"quantization_config": {"bits": 4}}, "key 'quantization_config' .* is not supported"),
        ({"rope_scaling": "linear"}, "rope_scaling 'linear' is not an object"),
        ({"rope_parameters": {"rope_theta": "x"}}, "rope_theta 'x' is not a number"),
        (
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "rope_type default does not use 'partial_rotary_factor'",
        ),
        ({"model_type": "qwen2", "use_mrope": True}, "use_mrope True is not supported"),
    ],
)
def test_unsupported_model_is_named(change: dict[str, Any], message: str) -> None:
    values = SIZES | {"model_type": "llama"} | change
    if values["model_type"] == "qwen2":
        values.pop("architectures", None)
    values = {key: value for key, value in values.items() if value is not None}
    with pytest.raises(InputError, match=message):
        model_from_hf(values, "here")


def test_changed_model_keeps_its_family_and_other_keys() -> None:
    original = SIZES | {"model_type": "mistral", "sliding_window": None, "rope_scaling": LLAMA3}
    original |= {"num_key_value_heads": 2, "bos_token_id": 7}
    model = model_from_hf(original, "here")
    for change in ({"vocab_size": 192}, {"rope_scaling": None}, {"sliding_window": 9}):
        changed = replace(model, **change)
        written = model_to_hf(changed, original)
        assert (written["model_type"], written["bos_token_id"]) == ("mistral", 7)
        assert model_from_hf(written, "here") == changed
    assert model_to_hf(replace(model, qkv_bias=True), original)["model_type"] == "qwen2"
    with pytest.raises(InputError, match="no architecture of transformers has this combination"):
        model_to_hf(replace(model, wo_bias=True, tie_embeddings=True), original)


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_missing_key_has_the_default_of_transformers(kind: str) -> None:
    values = {key: SIZES[key] for key in REQUIRED} | {"num_attention_heads": 32}
    values["hidden_size"] = 64
    theirs = json.loads(transformers.AutoConfig.for_model(kind, **values).to_json_string())
    assert model_from_hf(values | {"model_type": kind}, "here") == model_from_hf(theirs, "there")


@pytest.mark.parametrize(
    ("rotary", "expected"),
    [
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, (1e4, "linear")),
        ({"rope_scaling": None, "rope_theta": 5e4}, (5e4, None)),
        ({"rope_parameters": {"rope_type": "default"}, "rope_theta": 5e4}, (5e4, None)),
        ({"rope_parameters": LLAMA3}, (5e4, "llama3")),
    ],
)
def test_rotary_settings_keep_their_form(
    rotary: dict[str, Any], expected: tuple[float, str | None]
) -> None:
    original = SIZES | {"model_type": "llama"} | rotary
    model = model_from_hf(original, "here")
    assert (model.rope_theta, (model.rope_scaling or {}).get("rope_type")) == expected
    written = model_to_hf(model, original)
    assert {key: written[key] for key in rotary if rotary[key]} == {
        k: v for k, v in rotary.items() if v
    }
    assert model_from_hf(written, "there") == model
    theirs = transformers.LlamaConfig(**written).rope_parameters
    assert (theirs["rope_theta"], theirs["rope_type"]) == (expected[0], expected[1] or "default")


def test_leftover_key_is_an_error_in_both_directions(tmp_path: Path) -> None:
    make(tmp_path, "llama", tie_word_embeddings=True)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    computed = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32)}
    head = tensors["model.embed_tokens.weight"].copy()
    save_file(tensors | computed | {"lm_head.weight": head}, file)
    assert open_any(tmp_path).model.tie_embeddings
    head[100, 3] += 1
    save_file(tensors | {"lm_head.weight": head}, file)
    with pytest.raises(InputError, match="to which tie_word_embeddings ties it"):
        open_any(tmp_path)
    save_file(tensors | {"model.layers.0.self_attn.q_scale": np.ones(2, np.float32)}, file)
    with pytest.raises(InputError, match="q_scale belongs to no parameter"):
        open_any(tmp_path)
    del tensors["model.norm.weight"]
    save_file(tensors, file)
    with pytest.raises(InputError, match=r"tensor model\.norm\.weight \(norm\.weight\) is missing"):
        open_any(tmp_path)


def test_directories_of_the_hub_are_read(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A cache of the hub, shards with one gone or cut short, and the command's own last word."""
    make(tmp_path / "one", "llama", torch.float16)
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "4f2a"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for i, file in enumerate(sorted((tmp_path / "one").iterdir())):
        shutil.copyfile(file, blobs / str(i))
        (snapshot / file.name).symlink_to(f"../../blobs/{i}")
    convert(Path(f"{snapshot}/"), tmp_path / "back", "hf", shard_size=20_000)
    assert bits(open_any(tmp_path / "back")) == bits(open_any(tmp_path / "one"))
    config, index = (tmp_path / "back" / n for n in ("config.json", "model.safetensors.index.json"))
    text = config.read_text()
    for change, message in (
        ({"architectures": None}, None),
        ({"vocab_size": 130}, "model.embed_tokens.weight (embeddings.weight) has shape [128, 32]"),
        ({"architectures": ["LlamaModel"]}, "['LlamaModel'] is not supported"),
    ):
        config.write_text(json.dumps(json.loads(text) | change))
        capsys.readouterr()
        words = ["convert", str(tmp_path / "back"), str(tmp_path / f"new {message}"), "--to", "hf"]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.argv", words)
            if message is None:
                main()
                continue
            with pytest.raises(SystemExit) as ended:
                main()
        assert ended.value.code == 2 and not Path(words[2]).exists()
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and message in line
    config.write_text(text)
    first, *_, last = sorted((tmp_path / "back").glob("model-*.safetensors"))
    last.write_bytes(last.read_bytes()[:-10])
    with pytest.raises(InputError, match=f"{last.name} is truncated"):
        open_any(tmp_path / "back")
    first.unlink()
    with pytest.raises(InputError, match=f"{first.name} is missing, with tensor"):
        open_any(tmp_path / "back")
    index.unlink()
    with pytest.raises(InputError, match=r"model\.safetensors is missing"):
        open_any(tmp_path / "back")


def test_pickle_is_read_as_tensors_only(tmp_path: Path) -> None:
    model = make(tmp_path / "hf", "qwen2", torch.bfloat16)
    convert(tmp_path / "hf", tmp_path / "truth", "safetensors")
    (tmp_path / "hf" / "model.safetensors").unlink()
    for to, of_today in (("safetensors", True), ("jax", False)):
        torch.save(
            model.state_dict(),
            tmp_path / "hf" / "pytorch_model.bin",
            _use_new_zipfile_serialization=of_today,
        )
        convert(tmp_path / "hf", tmp_path / to, to)
        assert bits(open_any(tmp_path / to)) == bits(open_any(tmp_path / "truth"))

    class Bomb:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "harm"),)

    for content, message in (
        ({"model.norm.weight": Bomb()}, "has other objects than tensors"),
        ({"state_dict": model.state_dict()}, "state_dict is not a floating-point tensor"),
        (
            {"model.norm.weight": torch.ones(32, dtype=torch.int8)},
            "model.norm.weight is not a floating-point tensor",
        ),
        ([torch.ones(3)], "is not a dictionary of tensors"),
    ):
        torch.save(content, tmp_path / "hf" / "pytorch_model.bin")
        with pytest.raises(InputError, match=message):
            open_any(tmp_path / "hf")
    assert not (tmp_path / "harm").exists()


def test_shards_are_read_and_written(tmp_path: Path) -> None:
    model = make(tmp_path / "one", "llama")
    model.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert (tmp_path / "many" / "model.safetensors.index.json").is_file()
    convert(tmp_path / "many", tmp_path / "ours", "hf", shard_size=20_000)
    assert len(list((tmp_path / "ours").glob("model-*.safetensors"))) > 2
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    for ours, theirs in zip(again.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert bits(open_any(tmp_path / "one")) == bits(open_any(tmp_path / "ours"))
