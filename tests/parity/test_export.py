"""Export to transformers: the mooshak architecture loads, computes, generates and trains there."""

import itertools
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

import peft
import tokenizers
import torch
import transformers

from mooshak.checkpoints import base, safetensors
from mooshak.config.model import ModelConfig
from mooshak.config.parse import dump_config
from mooshak.config.sections import Config
from mooshak.errors import InputError
from mooshak.generation.text import TextStream, end_ids
from mooshak.tokenizer.base import Tokenizer
from mooshak.tokenizer.load import open_tokenizer
from mooshak.tokenizer.sentencepiece import CHAT_MARKERS
from parity import distance, tolerances
from parity.backends import JaxBackend, TorchBackend
from parity.convert import convert, open_any
from tests.drawn_checkpoints import drawn_checkpoint

MODEL = ModelConfig(
    vocab_size=512, dim=24, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=40, max_seq_len=96
)
TEXTS = (
    "एक चालाक चूहा जंगल में रहता था।",
    "the lion became its friend; 12 apples, १२ सेब",
    "",
    " ",
    "  two  spaces,\ttabs\n\n and lines \n",
    "क्‍या ज्ञान\u200cश्री \u200d",
    "the mark \u2581 itself\u2581\u2581 and <0xE2>, 😀, \u00a0 e\u0301",
)


@pytest.fixture(scope="module")
def exported(
    tmp_path_factory: pytest.TempPathFactory, tiny_config: Config, tiny_tokenizer: Tokenizer
) -> Path:
    """A drawn model as a training state of a run, and that as a directory for transformers."""
    run = tmp_path_factory.mktemp("run")
    start = run / "checkpoints" / "20"
    state = {"format_version": 1, "step": 20, "data": {"batch_size": 4, "sequence_length": 32}}
    safetensors.write_checkpoint(start, drawn_checkpoint(MODEL, state=state))
    (start / "tokenizer.model").write_bytes(tiny_tokenizer.path.read_bytes())
    metrics = [{"step": 20, "loss": 3.25, "bits_per_byte_hi": 1.5}, {"step": 21, "loss": 3.0}]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, metrics)))
    convert(start, run / "hf", "hf")
    return run / "hf"


@pytest.fixture(scope="module")
def theirs(exported: Path) -> Any:
    """The model as transformers loads it."""
    auto = transformers.AutoModelForCausalLM
    return auto.from_pretrained(exported, trust_remote_code=True).eval()


@pytest.fixture(scope="module")
def tokenizer(exported: Path) -> Any:
    """The tokenizer as transformers loads it."""
    return transformers.AutoTokenizer.from_pretrained(exported)


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_exported_model_is_the_same_function(attention: str, theirs: Any, exported: Path) -> None:
    source = open_any(exported)
    tokens_BT = np.random.default_rng(0).integers(0, 505, (2, 40), dtype=np.int32)
    theirs.set_attn_implementation(attention)
    truth = TorchBackend(source).operations("float64", tokens_BT)["logits"]
    ours = JaxBackend(source).operations("float32", tokens_BT)["logits"]
    with torch.no_grad():
        found = theirs(torch.from_numpy(tokens_BT).long()).logits.numpy()
    allowed = tolerances.RATIO * distance.distance(ours, truth)
    assert distance.distance(found, truth) <= allowed <= tolerances.FLOAT32_LOGITS


def test_exported_model_generates_the_same_tokens(theirs: Any, exported: Path) -> None:
    prompts = [[1, 40, 300, 7], [1, 9]]
    lm = TorchBackend(open_any(exported)).lm("float32")
    ours = [one.token_ids for one in lm.generate(prompts, max_new_tokens=64)]
    padded = torch.tensor([prompts[0], [3, 3, *prompts[1]]])  # transformers pads on the left.
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    greedy = {"max_new_tokens": 64, "do_sample": False, "eos_token_id": None, "pad_token_id": 3}
    for use_cache in (True, False):
        found = theirs.generate(padded, attention_mask=mask, use_cache=use_cache, **greedy)
        assert found[:, 4:].tolist() == ours


@pytest.mark.parametrize("text", TEXTS)
def test_exported_tokenizer_gives_the_same_ids(
    text: str, tokenizer: Any, tiny_tokenizer: Tokenizer
) -> None:
    ids = tokenizer(text)["input_ids"]
    assert ids == tiny_tokenizer.encode(text, bos=True)
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_exported_chat_template_uses_markers(tokenizer: Any, tiny_tokenizer: Tokenizer) -> None:
    messages = [{"role": "user", "content": "a mouse"}, {"role": "assistant", "content": "शेर"}]
    ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    _, user, assistant, end = map(tiny_tokenizer.id_of, CHAT_MARKERS)
    expected = [1, user, *tiny_tokenizer.encode("a mouse"), end]
    expected += [assistant, *tiny_tokenizer.encode("शेर"), end]
    assert ids == expected
    ids = tokenizer.apply_chat_template(
        messages[:1], add_generation_prompt=True, tokenize=True, return_dict=False
    )
    assert ids == [*expected[: expected.index(end) + 1], assistant]


def test_exported_model_runs_in_a_pipeline(exported: Path) -> None:
    pipe = transformers.pipeline(
        "text-generation", model=str(exported), tokenizer=str(exported), trust_remote_code=True
    )
    (written,) = pipe("एक चूहा", max_new_tokens=5, do_sample=False)
    assert written["generated_text"].startswith("एक चूहा")


@pytest.mark.slow
def test_exported_model_trains_and_comes_back(exported: Path, tmp_path: Path) -> None:
    auto = transformers.AutoModelForCausalLM
    model = auto.from_pretrained(exported, trust_remote_code=True)
    rows = np.random.default_rng(1).integers(0, 505, (4, 24))
    data = [{"input_ids": torch.tensor(row), "labels": torch.tensor(row)} for row in rows]
    arguments = transformers.TrainingArguments(
        str(tmp_path / "trainer"),
        max_steps=3,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        gradient_checkpointing=True,
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=data)
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert len(losses) == 3 and losses[-1] < losses[0]
    model.save_pretrained(tmp_path / "saved")
    again = auto.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True)
    )
    # Ours reads what transformers saves, too.
    assert open_any(tmp_path / "saved").model == MODEL
    ours = open_any(tmp_path / "saved").read("layers.1.mlp.w2.weight")
    assert np.array_equal(ours, model.model.layers[1].mlp.down_proj.weight.detach().numpy())


def test_exported_model_takes_a_peft_adapter(exported: Path, tmp_path: Path) -> None:
    auto = transformers.AutoModelForCausalLM
    base = auto.from_pretrained(exported, trust_remote_code=True)
    tokens = torch.arange(20)[None]
    before = base(tokens).logits
    config = peft.LoraConfig(
        r=2,
        target_modules=["q_proj", "v_proj", "down_proj"],
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    adapted = peft.get_peft_model(base, config)
    changed = adapted(tokens).logits
    assert not torch.equal(changed, before)
    adapted.save_pretrained(tmp_path / "adapter")
    fresh = auto.from_pretrained(exported, trust_remote_code=True)
    loaded = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter")
    assert torch.equal(loaded(tokens).logits, changed)
    assert torch.equal(loaded.unload()(tokens).logits, before)


@pytest.mark.slow
def test_lm_eval_computes_the_same_likelihoods(
    exported: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm_eval = pytest.importorskip("lm_eval")
    import datasets
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    documents = [("एक चालाक", "चूहा"), ("the lion became its", "friend"), ("a clever", "mouse")]
    lines = (json.dumps({"before": before, "after": after}) for before, after in documents)
    (tmp_path / "words.jsonl").write_text("\n".join(lines))
    task = {
        "task": "words",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "words.jsonl")}},
        "test_split": "test",
        "output_type": "loglikelihood",
        "doc_to_text": "{{before}}",
        "doc_to_target": " {{after}}",
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    }
    (tmp_path / "words.yaml").write_text(json.dumps(task))  # JSON is YAML.
    found = lm_eval.simple_evaluate(
        model="hf",
        model_args=f"pretrained={exported},trust_remote_code=True,dtype=float32",
        tasks=["words"],
        device="cpu",
        batch_size=2,
        bootstrap_iters=0,
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
    )["results"]["words"]
    side, sums = TorchBackend(open_any(exported)), []
    for before, after in documents:
        n, ids = len(tokenizer(before)["input_ids"]), tokenizer(f"{before} {after}")["input_ids"]
        logits = side.operations("float64", np.array([ids], np.int32))["logits"][0]
        logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        sums.append(sum(logs[t - 1, ids[t]] for t in range(n, len(ids))))
    assert found["perplexity,none"] == pytest.approx(np.exp(-np.mean(sums)), rel=1e-5)


def test_model_card_has_the_measurements_of_the_run(exported: Path) -> None:
    card = (exported / "README.md").read_text()
    assert f"{MODEL.parameter_count():,} parameters" in card
    assert "| tokens seen | 2,560 |" in card and "| loss | 3.2500 |" in card
    assert "| bits per byte hi | 1.5000 |" in card


def test_export_keeps_two_dtypes(exported: Path, tmp_path: Path) -> None:
    convert(exported, tmp_path / "half", "hf", dtype="bfloat16")
    auto = transformers.AutoModelForCausalLM
    model = auto.from_pretrained(tmp_path / "half", trust_remote_code=True)
    assert model.dtype == torch.bfloat16
    convert(tmp_path / "half", tmp_path / "ours", "safetensors")
    assert open_any(tmp_path / "ours").tensors["lm_head.weight"][0] == base.DTYPES["BF16"]


def test_export_with_only_a_tokenizer_json(exported: Path, tiny_tokenizer: Tokenizer) -> None:
    ours = open_tokenizer(exported / "tokenizer.json")
    for text in TEXTS:
        ids = ours.encode(text, bos=True)
        assert ids == tiny_tokenizer.encode(text, bos=True)
        assert ours.decode(ids) == text
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (1, 2, 3)
    assert ours.vocab_size == tiny_tokenizer.vocab_size
    assert np.array_equal(ours.token_bytes(), tiny_tokenizer.token_bytes())
    assert ours.encode_batch(list(TEXTS)) == tiny_tokenizer.encode_batch(list(TEXTS))
    assert ours.id_of("<|end|>") == tiny_tokenizer.id_of("<|end|>")


def test_export_of_a_byte_level_tokenizer(tmp_path: Path) -> None:
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|begin|>", "<|stop|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    made.train_from_iterator([text for text in TEXTS * 9 if text], trainer)
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", 0)]
    )
    made.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(InputError, match="names its eos_token"):
        open_tokenizer(tmp_path / "tokenizer.json")
    config = {"bos_token": {"content": "<|begin|>"}, "eos_token": "<|stop|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours = open_tokenizer(tmp_path / "tokenizer.json")
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (0, 1, 1)
    for text in TEXTS:
        ids = ours.encode(text, bos=True, eos=True)
        assert ids[0] == 0 and ids[-1] == 1 and ours.decode(ids) == text
        assert ours.token_bytes()[ids].sum() == len(text.encode())


def text_of(tokenizer: Any, prompt: list[int], ids: list[int]) -> str:
    """The prompt and its continuation up to an end token, as generation decodes them."""
    ends, stream = end_ids(tokenizer), TextStream(tokenizer, prompt)
    for id in itertools.takewhile(lambda id: id not in ends, ids):
        stream.push(id)
    return tokenizer.decode(prompt) + stream.text


def test_generation_ends_at_the_configured_tokens(
    exported: Path, tiny_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Also by an added token, which the SentencePiece model has no piece for."""
    shutil.copyfile(tiny_tokenizer.path, tmp_path / "tokenizer.model")
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 506, 510]}')
    ours = open_tokenizer(tmp_path / "tokenizer.model")
    lion, mouse = ours.encode("a lion"), ours.encode(" a mouse")
    assert text_of(ours, [1, *lion], [507, *mouse, 506, *lion]) == "a lion a mouse"
    assert text_of(ours, [1, *lion, 2], [*mouse, 2, *lion]) == "a lion a mouse"
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(InputError, match=r"generation_config\.json is not JSON"):
        text_of(ours, lion, mouse)
    # Where a tokenizer.json has such a token, a prompt may hold it.
    fast = json.loads((exported / "tokenizer.json").read_text())
    fast["added_tokens"].append({**fast["added_tokens"][-1], "id": 505, "content": "<|far|>"})
    for name in ("tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(exported / name, tmp_path / name)
    (tmp_path / "tokenizer.json").write_text(json.dumps(fast))
    theirs = open_tokenizer(tmp_path / "tokenizer.json")
    assert theirs.encode("<|far|>") == [505] and theirs.vocab_size == 506
    assert text_of(theirs, [1, *lion, 505], [511, *mouse, 2]) == "a lion a mouse"


def test_files_next_to_the_tokenizer_are_copied(
    exported: Path, tiny_config: Config, tmp_path: Path
) -> None:
    start = exported.parent / "checkpoints" / "20"
    (tmp_path / "checkpoints").mkdir()
    weights = tmp_path / "checkpoints" / "20"
    weights.mkdir()
    for name in ("config.json", "model.safetensors", "trainer_state.json"):
        (weights / name).symlink_to(start / name)
    tokenizer = replace(tiny_config.tokenizer, path=str(exported / "tokenizer.json"))
    (tmp_path / "config.yaml").write_text(dump_config(replace(tiny_config, tokenizer=tokenizer)))
    convert(weights, tmp_path / "hf", "hf")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "hf" / name).read_bytes() == (exported / name).read_bytes()
    # What somebody wrote about a SentencePiece model stays, too.
    (tmp_path / "hf" / "tokenizer.json").unlink()
    (tmp_path / "hf" / "tokenizer_config.json").write_text('{"theirs": 1}')
    convert(tmp_path / "hf", tmp_path / "again", "hf")
    assert (tmp_path / "again" / "tokenizer_config.json").read_text() == '{"theirs": 1}'
