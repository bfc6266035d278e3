"""Turns of chats as prompt and answer: the trained ids spell the answer and its end token."""

from pathlib import Path

import pytest
from chat_templates import QWEN3, TEMPLATES, byte_level_tokenizer, spelled
from hf_tokenizers import small_tokenizer

from mooshak.data.packing import IGNORE_INDEX
from mooshak.data.samples import encode_sample, encode_samples
from mooshak.errors import InputError
from mooshak.tokenizer.base import Tokenizer
from mooshak.tokenizer.chat_template import encode_chat
from mooshak.tokenizer.chat_turns import encode_completion, encode_inside, encode_turn

ENDS = {
    "chatml": "<|im_end|>",
    "llama3": "<|eot|>",
    "qwen3": "<|im_end|>",
    "gemma3": "<|eot|>",
    "llama2": " </s>",
}


def say(*contents: str, system: str = "") -> list[dict[str, str]]:
    """Return turns of user and assistant."""
    turns = [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)]
    return ([{"role": "system", "content": system}] if system else []) + turns


def trained(labels: list[int]) -> list[list[int]]:
    """Return the runs of labels that are not ignored."""
    runs: list[list[int]] = [[]]
    for label in labels:
        if label == IGNORE_INDEX:
            runs += [[]] if runs[-1] else []
        else:
            runs[-1].append(label)
    return [run for run in runs if run]


CHATS = {
    "one turn": say("the mouse?", "said the mouse"),
    "Hindi with a system prompt": say("किताब?", "की कि", system="हिंदी में"),
    "several turns": say("a", "कि", "b", "the मूषक", "c", "की\nकि."),
    "the answer begins with a vowel sign": say("क", "\u093fताब"),
    "the answer repeats the question": say("assistant\nthe", "assistant\nthe", "the", "the"),
}


@pytest.mark.parametrize("chat", CHATS.values(), ids=CHATS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_labels_spell_answers_and_end_tokens(
    name: str, chat: list[dict[str, str]], tmp_path: Path
) -> None:
    if name == "llama2" and chat[0]["role"] == "system":
        chat = chat[1:]
    tokenizer = byte_level_tokenizer(tmp_path, TEMPLATES[name])
    samples = encode_samples(tokenizer, [], chat)
    runs = [run for sample in samples for run in trained(sample.labels.tolist())]
    space = " " if name == "llama2" else ""
    answers = [m["content"] for m in chat if m["role"] == "assistant"]
    assert [spelled(tokenizer, run) for run in runs] == [space + a + ENDS[name] for a in answers]
    # One sample, unless the template rewrites earlier turns.
    assert len(samples) == (len(answers) if name == "qwen3" else 1)
    inserted = "<think>\n\n</think>\n\n" if name == "qwen3" else ""
    ends = [i for i, message in enumerate(chat, 1) if message["role"] == "assistant"]
    for end, answer in zip(ends, runs, strict=True):
        prompt, ids = encode_turn(tokenizer, chat[:end])
        assert ids == answer
        header = spelled(tokenizer, encode_chat(tokenizer, chat[: end - 1])).split("Today:")[-1][
            13:
        ]
        assert spelled(tokenizer, prompt).split("Today:")[-1][13:] == header + inserted
        if not inserted and name != "llama3":
            assert prompt == encode_chat(tokenizer, chat[: end - 1])
        whole = prompt + ids
        assert any(s.tokens[: len(whole)].tolist() == whole for s in samples)


def test_own_template_trains_answers_and_end_markers(tiny_tokenizer: Tokenizer) -> None:
    chat = say("किसान <|end|>", "हाथी <|end|> the lion", "and", "शेर")
    sample = encode_sample(tiny_tokenizer, [], chat)
    end = tiny_tokenizer.id_of("<|end|>")
    runs = trained(sample.labels.tolist())
    assert [run[-1] for run in runs] == [end, end]
    assert [tiny_tokenizer.decode(run) for run in runs] == ["हाथी <|end|> the lion", "शेर"]
    assert [run.count(end) for run in runs] == [1, 1]  # A written marker is no marker.
    assert sample.tokens[: -len(runs[1])].tolist() == encode_chat(tiny_tokenizer, chat[:3])
    # Answers of the prompt are read, not trained.
    last = encode_sample(tiny_tokenizer, chat[:2], chat[2:])
    assert last.tokens.tolist() == sample.tokens.tolist()
    assert trained(last.labels.tolist()) == runs[1:]


def test_written_thoughts_are_part_of_the_answer(tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer(tmp_path, QWEN3)
    prompt, answer = encode_turn(tokenizer, say("a", "<think>\nthe\n</think>\n\nकि"))
    assert spelled(tokenizer, prompt) == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    assert spelled(tokenizer, answer) == "<think>\nthe\n</think>\n\nकि<|im_end|>"


def test_template_with_no_end_token_ends_in_eos(tmp_path: Path) -> None:
    template = "{% for m in messages %}### {{ m.role }}: {{ m.content }}\n\n{% endfor %}"
    tokenizer = byte_level_tokenizer(tmp_path, template)
    samples = encode_samples(tokenizer, [], say("a", "b", "c", "d"))
    texts = [spelled(tokenizer, trained(sample.labels.tolist())[0]) for sample in samples]
    assert texts == ["b</s>", "d</s>"]


@pytest.mark.parametrize("kind", ["byte level", "metaspace"])
def test_completion_follows_its_prompt_at_any_border(kind: str, tmp_path: Path) -> None:
    """Ids of prompt and answer are those that are trained, where a token would span the border."""
    tokenizer = small_tokenizer(kind, tmp_path)
    for prompt, answer in (("क", "\u093f"), ("a", " e"), ("न", "क"), ("a ", "e"), ("e", "\n\na")):
        turn = encode_completion(tokenizer, prompt, answer)
        assert turn.answer == [*encode_inside(tokenizer, answer), tokenizer.eos_id]
        assert turn.prompt == tokenizer.encode(prompt, bos=True)
        sample = encode_sample(tokenizer, prompt, answer)
        assert sample.tokens.tolist() == turn.prompt + turn.answer
        assert sample.labels[len(turn.prompt) :].tolist() == turn.answer
        assert tokenizer.decode(turn.prompt + turn.answer) == prompt + answer


@pytest.mark.parametrize(
    ("template", "chat", "message"),
    [
        ("chatml", say("a"), "no turn of the assistant"),
        ("chatml", say("a", " \n"), "the answer is empty"),
        ("gemma3", say("a", "b", "c")[1:], "template .* fails: Roles must alternate"),
        ("{{ messages[0].content + 1 }}", say("a", "b"), "chat template of .* fails"),
        ("{{ messages[0].content }}", say("a", "b"), "does not show the answer once"),
        ("{% for m in messages %}{{ m.content * 2 }}{% endfor %}", say("a", "b"), "answer once"),
    ],
)
def test_conversation_without_label_is_an_error(
    template: str, chat: list[dict[str, str]], message: str, tmp_path: Path
) -> None:
    tokenizer = byte_level_tokenizer(tmp_path, TEMPLATES.get(template, template))
    with pytest.raises(InputError, match=message):
        encode_samples(tokenizer, [], chat)
