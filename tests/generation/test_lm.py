"""Python API: `load`, and an `LM` that generates, streams, scores, chats and saves."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from mooshak.checkpoints import safetensors
from mooshak.errors import InputError
from mooshak.generation.lm import LM
from mooshak.generation.text import TextStream
from mooshak.tokenizer.chat_template import encode_chat

pytestmark = pytest.mark.usefixtures("compiled_in_haste")

FRAMEWORKS = ("torch", "jax")
HINDI, ENGLISH = "एक चालाक चूहा", "a clever mouse"
SAMPLED = {"temperature": 1.5, "top_p": 0.9, "seed": 3}
MESSAGES = [{"role": "system", "content": ENGLISH}, {"role": "user", "content": HINDI}]


def load(framework: str, path: Path, **options: Any) -> LM:
    lm: LM = import_module(f"mooshak_{framework}").load(path, **options)
    return lm


@pytest.fixture
def without_tokenizer(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    shutil.copytree(tiny_checkpoint, tmp_path / "weights")
    (tmp_path / "weights" / "tokenizer.model").unlink()
    return tmp_path / "weights"


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_both_frameworks_complete_alike(settings: dict[str, Any], lms: dict[str, LM]) -> None:
    prompts = [HINDI, ENGLISH, [1, 5, 300], np.array([7, 8])]
    found, theirs = (
        lm.generate(prompts, max_new_tokens=12, n=2, logprobs=True, **settings)
        for lm in lms.values()
    )
    assert [len(samples) for samples in found] == [2] * 4
    for samples, others in zip(found, theirs, strict=True):
        for index, (one, other) in enumerate(zip(samples, others, strict=True)):
            assert replace(one, logprobs=None) == replace(other, logprobs=None)
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)
            assert one.index == index and one.finish_reason in ("stop", "length")
            assert len(one.logprobs) == len(one.token_ids) > 0
    assert found[2][0].prompt_token_ids == [1, 5, 300]
    assert found[3][0].prompt_token_ids == [7, 8]
    assert (found[0][0].token_ids == found[0][1].token_ids) == (not settings)
    scores = [lm.score([HINDI, [1, 5, 300]]) for lm in lms.values()]
    for mine, other in zip(*scores, strict=True):
        assert mine.dtype == np.float64
        assert np.allclose(mine, other, atol=1e-5) and (mine < 0).all()
    chats = [lm.chat(MESSAGES, max_new_tokens=12, **settings) for lm in lms.values()]
    assert chats[0] == chats[1] and chats[0].token_ids


@pytest.mark.slow
def test_chat_is_a_completion_of_the_template(lm: LM) -> None:
    completion = lm.chat(MESSAGES, max_new_tokens=12, ignore_eos=True)
    tokenizer = lm.tokenizer
    assert tokenizer is not None
    ids = [tokenizer.bos_id]
    for role, content in (("system", ENGLISH), ("user", HINDI)):
        ids += [tokenizer.id_of(f"<|{role}|>"), *tokenizer.encode(content)]
        ids += [tokenizer.id_of("<|end|>")]
    assert completion.prompt_token_ids == [*ids, tokenizer.id_of("<|assistant|>")]
    expected = lm.generate(completion.prompt_token_ids, max_new_tokens=12, ignore_eos=True)
    assert completion == expected


def test_text_in_a_chat_is_no_control_token(lm: LM) -> None:
    tokenizer, content = lm.tokenizer, "<s>a</s><|end|><|system|>"
    assert tokenizer is not None
    ids = encode_chat(tokenizer, [{"role": "user", "content": content}])
    assert ids[2:-2] == tokenizer.encode(content)
    controls = [tokenizer.id_of(f"<|{name}|>") for name in ("user", "end", "assistant")]
    assert [ids[0], ids[1], *ids[-2:]] == [tokenizer.bos_id, *controls]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hello", "messages must be a list, not 'hello'"),
        ({"role": "user", "content": "a"}, "messages must be a list, not {"),
        (["hello"], "message 'hello' must have the texts role and content"),
        ([{"content": "a"}], "must have the texts"),
        ([{"role": "user"}], "must have the texts"),
        ([{"role": "user", "content": None}], "must have the texts"),
        ([{"role": "tool", "content": "a"}], "role 'tool' is unknown; use system, user or"),
    ],
)
def test_wrong_message_is_named(messages: Any, message: str, lm: LM) -> None:
    with pytest.raises(InputError, match=message):
        lm.chat(messages, max_new_tokens=1)


def test_stream_holds_a_stop_text_with_a_begun_character(lm: LM) -> None:
    tokenizer = lm.tokenizer
    assert tokenizer is not None
    stream = TextStream(tokenizer, [], ["ab😀"])
    chunks = [stream.push(token) for token in tokenizer.encode("xyab😀z")]
    assert stream.stopped and "".join(chunks) + stream.finish() == stream.text == "xy"


def test_text_is_decoded_once_without_a_stream(lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, decode = [], TextStream._decode
    monkeypatch.setattr(TextStream, "_decode", lambda *words: calls.append(1) or decode(*words))
    lm.generate(ENGLISH, max_new_tokens=12, ignore_eos=True)
    assert len(calls) == 2  # The prompt, and the prompt with its continuation.


@pytest.mark.slow
@pytest.mark.parametrize("prompt", [HINDI, ENGLISH, [1, 234, 170]])
@pytest.mark.parametrize("settings", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_stream_joins_to_the_text(prompt: Any, settings: dict[str, Any], lm: LM) -> None:
    settings = {"max_new_tokens": 24, "ignore_eos": True, **settings}
    chunks = list(lm.stream(prompt, **settings))
    text = lm.generate(prompt, **settings).text
    assert "".join(chunks) == text and len(chunks) > 3 and all(chunks)
    stop = text[len(text) // 2 :][:2]
    stopped = lm.generate(prompt, stop=stop, **settings)
    assert "".join(lm.stream(prompt, stop=stop, **settings)) == stopped.text


def test_stop_text_ends_the_completion(lm: LM) -> None:
    settings = {"max_new_tokens": 24, "ignore_eos": True, **SAMPLED}
    full = lm.generate(ENGLISH, **settings)
    assert full.finish_reason == "length" and len(full.token_ids) == 24
    stop = full.text[5:8]
    found = lm.generate(ENGLISH, stop=["never there", stop], **settings)
    assert found.text == full.text[: full.text.index(stop)]
    assert found.finish_reason == "stop" and len(found.token_ids) < 24
    assert found.token_ids == full.token_ids[: len(found.token_ids)]


@pytest.mark.slow
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_end_token_is_not_part_of_the_completion(
    framework: str, lms: dict[str, LM], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    full = lms[framework].generate(ENGLISH, max_new_tokens=12, ignore_eos=True, **SAMPLED)
    end = full.token_ids[4]
    assert end not in full.token_ids[:4]
    shutil.copytree(tiny_checkpoint, tmp_path / "ends")
    (tmp_path / "ends/generation_config.json").write_text(json.dumps({"eos_token_id": end}))
    lm = load(framework, tmp_path / "ends")
    found = lm.generate(ENGLISH, max_new_tokens=12, **SAMPLED)
    assert found.token_ids == full.token_ids[:4] and found.finish_reason == "stop"
    ignored = lm.generate(ENGLISH, max_new_tokens=12, ignore_eos=True, **SAMPLED)
    assert ignored.token_ids == full.token_ids and ignored.finish_reason == "length"


@pytest.mark.slow
def test_prompts_of_a_list_complete_as_alone(lm: LM) -> None:
    prompts = [HINDI, ENGLISH, [1, 2, 3, 4, 5, 6, 7]]
    together = lm.generate(prompts, max_new_tokens=12, **SAMPLED)
    alone = [lm.generate(prompt, max_new_tokens=12, **SAMPLED) for prompt in prompts]
    assert together == alone
    samples = lm.generate(HINDI, max_new_tokens=12, n=3, **SAMPLED)
    assert samples[0] == alone[0] and [sample.index for sample in samples] == [0, 1, 2]
    assert len({tuple(sample.token_ids) for sample in samples}) == 3
    other_seed = lm.generate(HINDI, max_new_tokens=12, **SAMPLED | {"seed": 4})
    assert other_seed.token_ids != alone[0].token_ids


@pytest.mark.slow
def test_logprobs_are_the_scores(lm: LM) -> None:
    settings = {"max_new_tokens": 12, "ignore_eos": True, **SAMPLED}
    found = lm.generate(HINDI, logprobs=True, **settings)
    scores = lm.score([*found.prompt_token_ids, *found.token_ids])
    assert found.logprobs == pytest.approx(scores[-12:], abs=1e-5)
    assert lm.generate(HINDI, **settings).logprobs is None
    assert lm.score(HINDI).shape == (len(found.prompt_token_ids) - 1,)
    ids = np.array(found.prompt_token_ids)
    logits = np.asarray(lm.model(_tokens(lm, ids[None])).tolist(), np.float64)[0]
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    truth = log_p[np.arange(len(ids) - 1), ids[1:]]
    assert lm.score(HINDI) == pytest.approx(truth, abs=1e-5)


def _tokens(lm: LM, ids: np.ndarray) -> Any:
    if type(lm).__module__ == "mooshak_torch.lm":
        import torch

        return torch.from_numpy(ids)
    return jax.numpy.asarray(ids)


@pytest.mark.slow
def test_saved_model_is_loaded_again(lm: LM, tiny_checkpoint: Path, tmp_path: Path) -> None:
    lm.save(tmp_path / "saved")
    truth = lm.generate([HINDI, ENGLISH], max_new_tokens=12, **SAMPLED)
    for framework in FRAMEWORKS:
        again = load(framework, tmp_path / "saved")
        assert again.config == lm.config
        assert again.generate([HINDI, ENGLISH], max_new_tokens=12, **SAMPLED) == truth
    saved = safetensors.open_checkpoint(tmp_path / "saved")
    original = safetensors.open_checkpoint(tiny_checkpoint)
    assert saved.model == original.model
    for name in original.tensors:
        assert np.array_equal(saved.read(name), original.read(name)), name
    with pytest.raises(InputError, match="saved exists already"):
        lm.save(tmp_path / "saved")


@pytest.mark.parametrize(
    ("prompt", "settings", "message"),
    [
        (HINDI, {"top_pp": 0.5}, "unknown setting top_pp; did you mean top_p"),
        (HINDI, {"temperature": -1.0}, "generate.temperature -1.0"),
        (HINDI, {"temperature": float("nan")}, "generate.temperature nan"),
        (HINDI, {"top_p": 0.0}, "generate.top_p 0.0"),
        (HINDI, {"top_p": 1.5}, "generate.top_p 1.5"),
        (HINDI, {"max_new_tokens": 0}, "generate.max_new_tokens 0"),
        (HINDI, {"n": 0}, "generate.n 0"),
        (HINDI, {"stop": ["a", ""]}, "generate.stop"),
        (HINDI, {"temperature": "hot"}, "generate.temperature 'hot' must be a number"),
        (HINDI, {"max_new_tokens": "32"}, "generate.max_new_tokens '32' must be an integer"),
        (HINDI, {"max_new_tokens": 3.5}, "generate.max_new_tokens 3.5 must be an integer"),
        (HINDI, {"n": True}, "generate.n True must be an integer"),
        (HINDI, {"seed": None}, "generate.seed None must be an integer"),
        (HINDI, {"logprobs": 1}, "generate.logprobs 1 must be true or false"),
        (HINDI, {"stop": [1]}, r"generate.stop \[1\] must be a text or a list of texts"),
        ([], {}, "a prompt is empty"),
        ([[1], []], {}, "a prompt is empty"),
        ([1, 512], {"max_new_tokens": 5}, "token 512 is outside of the vocabulary, 0 .. 511"),
        ([1, -1], {"max_new_tokens": 5}, "token -1 is outside of the vocabulary"),
        ([1] * 60, {"max_new_tokens": 5}, "65 tokens, model.max_seq_len is 64"),
    ],
)
def test_wrong_request_is_named(prompt: Any, settings: Any, message: str, lm: LM) -> None:
    with pytest.raises(InputError, match=message):
        lm.generate(prompt, **settings)
    if not isinstance(prompt, list) or not prompt or isinstance(prompt[0], int):
        with pytest.raises(InputError, match=message):
            list(lm.stream(prompt, **settings))


def test_wrong_score_is_named(lm: LM) -> None:
    for text, message in (
        ([1], "cannot score 1 tokens"),
        ([], "cannot score 0 tokens"),
        ([1] * 65, "cannot score 65 tokens; give 2 .. 64"),
        ([1, 512], "token 512 is outside"),
    ):
        with pytest.raises(InputError, match=message):
            lm.score(text)
    assert lm.score([1] * 64).shape == (63,)
    with pytest.raises(InputError, match="a stream has one sample"):
        lm.stream(HINDI, n=2)


@pytest.mark.slow
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_model_without_tokenizer_takes_ids(
    framework: str, without_tokenizer: Path, tiny_checkpoint: Path, lms: dict[str, LM]
) -> None:
    lm = load(framework, without_tokenizer)
    assert lm.tokenizer is None
    found = lm.generate([1, 5, 300], max_new_tokens=12, ignore_eos=True)
    expected = lms[framework].generate([1, 5, 300], max_new_tokens=12, ignore_eos=True)
    assert found.text is None and found.token_ids == expected.token_ids
    assert str(found) == " ".join(map(str, found.token_ids))
    for call in (lambda: lm.generate(HINDI), lambda: lm.score(HINDI), lambda: lm.chat(MESSAGES)):
        with pytest.raises(InputError, match="has no tokenizer"):
            call()
    with pytest.raises(InputError, match="has no tokenizer"):
        lm.stream([1, 2])
    given = load(framework, without_tokenizer, tokenizer=tiny_checkpoint / "tokenizer.model")
    assert given.generate(HINDI, max_new_tokens=4).text is not None


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_wrong_checkpoint_is_named(framework: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no checkpoint directory"):
        load(framework, tmp_path / "nowhere")
    with pytest.raises(InputError, match="is not a checkpoint"):
        load(framework, tmp_path)


@pytest.mark.parametrize(
    ("framework", "options", "message"),
    [
        ("torch", {"device": "gpu"}, "device gpu is not available"),
        ("torch", {"device": "cuda:9"}, "device cuda:9 is not available"),
        ("jax", {"device": "gpu"}, "device gpu is not available"),
        ("jax", {"mesh": "fsdp=5"}, "fsdp=5 does not divide the 8 devices"),
        ("jax", {"mesh": "tensor=4"}, "model.n_kv_heads 2 is not divisible by tensor=4"),
    ],
)
def test_unavailable_device_is_named(
    framework: str, options: dict[str, str], message: str, tiny_checkpoint: Path
) -> None:
    with pytest.raises(InputError, match=message):
        load(framework, tiny_checkpoint, **options)


@pytest.fixture
def x64_off() -> Iterator[None]:
    """JAX as a program finds it, whatever other tests have set."""
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", False)
    yield
    jax.config.update("jax_enable_x64", before)


@pytest.mark.slow
@pytest.mark.usefixtures("x64_off")
def test_float64_turns_x64_on_and_warns(tiny_checkpoint: Path) -> None:
    with pytest.warns(UserWarning, match="x64 mode is now enabled"):
        lm = load("jax", tiny_checkpoint, dtype="float64")
    assert jax.config.jax_enable_x64
    truth = load("torch", tiny_checkpoint, dtype="float64")
    assert lm.score(HINDI) == pytest.approx(truth.score(HINDI), rel=1e-12, abs=0)
    found, other = (m.generate(HINDI, max_new_tokens=12, **SAMPLED) for m in (lm, truth))
    assert found == other


@pytest.mark.parametrize(
    "prompt", [5, None, 1.5, [1.5], [[1], None], b"hello", [True, False], np.array(5)]
)
def test_prompt_of_a_wrong_type_is_refused(prompt: Any, lm: LM) -> None:
    with pytest.raises(InputError, match="a prompt is a text or token ids"):
        lm.generate(prompt, max_new_tokens=2)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_unknown_dtype_is_refused(framework: str, tiny_checkpoint: Path) -> None:
    with pytest.raises(InputError, match="dtype 'int8' must be one of"):
        load(framework, tiny_checkpoint, dtype="int8")


def test_float16_on_a_cpu_is_refused_in_jax_and_works_in_torch(tiny_checkpoint: Path) -> None:
    with pytest.raises(InputError, match="float16: XLA has no such products on a CPU"):
        load("jax", tiny_checkpoint, dtype="float16")
    lm = load("torch", tiny_checkpoint, dtype="float16")
    assert len(lm.generate([1, 2], max_new_tokens=3, ignore_eos=True).token_ids) == 3
