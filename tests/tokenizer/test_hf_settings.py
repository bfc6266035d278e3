"""Settings of Hugging Face tokenizers: token ids and texts are those of transformers."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"

import tokenizers
import transformers

from mooshak.config.sections import Config, SourceConfig, TokenizerConfig
from mooshak.errors import InputError
from mooshak.generation.text import end_ids
from mooshak.tokenizer import train
from mooshak.tokenizer.chat_template import encode_chat
from mooshak.tokenizer.files import find_tokenizer
from mooshak.tokenizer.load import open_tokenizer
from mooshak.tokenizer.sentencepiece import SentencePieceTokenizer
from tests.hf_tokenizers import small_tokenizer
from tests.sentencepiece_models import added_token, llama_directory, train_sentencepiece

TEXTS = (
    "",
    "the cat",
    "  the  lion",
    "the <s> cat</s>",
    "चूहा<|im_end|> था",
    "<|im_start|>the<|im_end|>था lion ",
    "a▁▁b",
    "चालाक lions of lion",
    "ट😀 \n\tx",
    "ड़ड\u093c \u095c क्\u200dष क्\u200cष",
)


@pytest.fixture(scope="module")
def n_pieces(tmp_path_factory: pytest.TempPathFactory) -> int:
    """Number of tokens of the small model."""
    path = tmp_path_factory.mktemp("size") / "m.model"
    return int(train_sentencepiece(path).vocab_size())


def chatml(n: int, special: bool = True) -> dict[str, Any]:
    """Settings of a ChatML model, whose two tokens follow `n` others."""
    tokens = {str(n): added_token("<|im_start|>", special)}
    tokens |= {str(n + 1): added_token("<|im_end|>", special)}
    return {"added_tokens_decoder": tokens, "eos_token": "<|im_end|>", "bos_token": "<s>"}


CASES = (
    "plain",
    "legacy",
    "added",
    "added, legacy",
    "added_tokens.json",
    "special_tokens_map.json",
    "unplaced",
    "stripping",
    "words",
    "single word",
    "no prefix",
    "add_bos_token",
    "add_eos_token",
)


def make_case(case: str, path: Path, n: int) -> None:
    files: dict[str, Any] = {}
    settings: dict[str, Any] = {"add_bos_token": False, "bos_token": "<s>"}
    if "legacy" in case:
        settings["legacy"] = True
    if case.startswith("added"):
        settings |= chatml(n)
    if case == "added_tokens.json":
        del settings["added_tokens_decoder"]
        files["added_tokens.json"] = {"<|im_start|>": n, "<|im_end|>": n + 1}
    if case == "special_tokens_map.json":
        files[case] = {"bos_token": "<s>", "eos_token": added_token("<|im_end|>")}
    if case == "unplaced":
        settings["eos_token"] = "<|im_end|>"
    if case == "stripping":
        token = added_token("<|im_end|>", lstrip=True, rstrip=True)
        settings["added_tokens_decoder"] = {str(n): token}
    if case == "words":
        files["added_tokens.json"] = {"चालाक": n, "lion": n + 1}
    if case == "single word":
        token = added_token("lion", special=False, single_word=True)
        settings["added_tokens_decoder"] = {str(n): token}
    if case == "no prefix":
        settings["add_prefix_space"] = False
    if case.startswith("add_"):
        settings |= {"add_bos_token": True, case: True}
    llama_directory(path, settings, files)


@pytest.mark.parametrize("case", CASES)
def test_ids_and_text_are_those_of_transformers(case: str, tmp_path: Path, n_pieces: int) -> None:
    make_case(case, tmp_path, n_pieces)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = open_tokenizer(tmp_path / "tokenizer.model")
    assert (ours.vocab_size, ours.eos_id) == (len(theirs), theirs.eos_token_id)
    for text in TEXTS:
        ids = theirs(text)["input_ids"]
        if case != "special_tokens_map.json" or "<|im_end|>" not in text:
            assert ours.encode(text, bos=True) == ids, text
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True), text


@pytest.mark.parametrize("settings", [{}, {"add_bos_token": True}, {"add_bos_token": False}])
def test_bos_is_added_unless_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    llama_directory(tmp_path, settings)
    ids = open_tokenizer(tmp_path / "tokenizer.model").encode("the cat", bos=True)
    assert (ids[0] == 1) == settings.get("add_bos_token", True)
    assert ids.count(1) <= 1


@pytest.mark.parametrize("settings", [{"add_bos_token": False}, {"add_bos_token": True}])
@pytest.mark.parametrize("has_processor", [True, False])
def test_post_processor_decides_with_a_tokenizer_json(
    settings: dict[str, Any], has_processor: bool, tmp_path: Path
) -> None:
    small_tokenizer("metaspace", tmp_path)
    file = tmp_path / "tokenizer.json"
    if has_processor:
        made = tokenizers.Tokenizer.from_file(str(file))
        made.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
        made.save(str(file))
    names = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names | settings))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ids = theirs("एक a")["input_ids"]
    assert open_tokenizer(file).encode("एक a", bos=True) == ids
    assert (ids[0] == 1) == has_processor


@pytest.mark.parametrize("kind", ["tokenizer.json", "tokenizer.model"])
def test_words_saved_by_transformers_keep_ids_and_text(kind: str, tmp_path: Path) -> None:
    llama_directory(tmp_path / "base", {"add_bos_token": True})
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "base")
    theirs.add_tokens(["चालाक", "lion"])
    theirs.save_pretrained(tmp_path / "saved")
    if kind == "tokenizer.model":  # As transformers 4 saves it.
        saved = tmp_path / "saved" / "tokenizer.json"
        saved.unlink()
        (tmp_path / "base" / "tokenizer.model").rename(saved.with_suffix(".model"))
        added = json.dumps(theirs.get_added_vocab())
        (tmp_path / "saved" / "added_tokens.json").write_text(added)
    ours = open_tokenizer(find_tokenizer(tmp_path / "saved", None))
    assert ours.path.name == kind
    for text in ("चालाक lions", "a lion", "lion", "एकचालाक चूहा"):
        ids = theirs(text)["input_ids"]
        assert ours.encode(text, bos=True) == ids
        assert ours.decode(ids) == text == theirs.decode(ids, skip_special_tokens=True)
    word = theirs.convert_tokens_to_ids("चालाक")
    assert ours.decode([word]) == "चालाक" and ours.texts()[word] == "चालाक"
    assert ours.token_bytes()[word] == len("चालाक".encode())


def test_tokenizer_json_wins_over_the_model(tmp_path: Path) -> None:
    """As in transformers: a program may have changed one of them only."""
    llama_directory(tmp_path, {})
    transformers.AutoTokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path)
    assert find_tokenizer(tmp_path, None).name == "tokenizer.json"


def test_added_token_with_a_gap_is_refused(tmp_path: Path, n_pieces: int) -> None:
    settings = {"added_tokens_decoder": {str(n_pieces + 3): added_token("<x>")}}
    llama_directory(tmp_path, settings)
    with pytest.raises(InputError, match=rf"'<x>' has id {n_pieces + 3}, but {n_pieces} follows"):
        open_tokenizer(tmp_path / "tokenizer.model")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("added_tokens.json", {"<x>": "7"}, "the id of '<x>' is '7'; it must be a number"),
        ("tokenizer_config.json", {"add_bos_token": "no"}, "add_bos_token 'no' is not true or"),
        ("tokenizer_config.json", {"added_tokens_decoder": []}, None),
        ("tokenizer_config.json", {"added_tokens_decoder": [1]}, "is not an object"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": "y"}}, "is not a token"),
        ("special_tokens_map.json", [], "is not a JSON object"),
    ],
)
def test_wrong_settings_are_named(
    name: str, content: Any, message: str | None, tmp_path: Path
) -> None:
    llama_directory(tmp_path, {}, {name: content})
    if message is None:
        open_tokenizer(tmp_path / "tokenizer.model")
        return
    with pytest.raises(InputError, match=message) as error:
        open_tokenizer(tmp_path / "tokenizer.model")
    assert name in str(error.value)


@pytest.mark.parametrize("place", ["tokenizer_config.json", "special_tokens_map.json"])
def test_tokens_that_tokenizer_json_lacks_are_added(place: str, tmp_path: Path) -> None:
    small_tokenizer("byte level", tmp_path)
    names = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))
    changed = json.loads((tmp_path / place).read_text()) if (tmp_path / place).is_file() else {}
    (tmp_path / place).write_text(json.dumps(changed | {"eos_token": "<|im_end|>"}))
    if place == "special_tokens_map.json":
        del names["eos_token"]
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))
    ours = open_tokenizer(tmp_path / "tokenizer.json")
    if place == "tokenizer_config.json":  # transformers 5 ignores the other file beside it.
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
        ids = theirs("the <|im_end|> mouse")["input_ids"]
        assert ours.encode("the <|im_end|> mouse") == ids
        assert ours.eos_id == theirs.eos_token_id
    assert ours.eos_id == ours.vocab_size - 1 == ours.id_of("<|im_end|>")


def test_saved_truncation_and_padding_change_no_prompt(tmp_path: Path) -> None:
    tokenizer = small_tokenizer("byte level", tmp_path)
    text = "the mouse " * 9
    expected = tokenizer.encode(text), tokenizer.encode("the")
    made = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    made.enable_truncation(4)
    made.enable_padding(length=6)
    made.save(str(tmp_path / "tokenizer.json"))
    ours = open_tokenizer(tmp_path / "tokenizer.json")
    assert (ours.encode(text), ours.encode("the")) == expected
    assert ours.encode_batch([text, "the"]) == list(expected)


@pytest.mark.parametrize("normalizer", ["NFC", "NFKC", "Lowercase", "StripAccents"])
def test_normalizer_of_a_tokenizer_json_is_applied(normalizer: str, tmp_path: Path) -> None:
    small_tokenizer("byte level", tmp_path)
    made = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    made.normalizer = getattr(tokenizers.normalizers, normalizer)()
    made.save(str(tmp_path / "tokenizer.json"))
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    ours = open_tokenizer(tmp_path / "tokenizer.json")
    for text in ("The \u095c ﬁ É", "ड\u093c CAT"):
        ids = theirs(text)["input_ids"]
        assert ours.encode(text, bos=True) == ids
        assert ours.encode_batch([text]) == [ids]
        assert ours.decode(ids) == theirs.decode(ids)


def test_model_without_bos_adds_none(tmp_path: Path) -> None:
    model = train_sentencepiece(tmp_path / "tokenizer.model", bos_id=-1, eos_id=1)
    ours = open_tokenizer(tmp_path / "tokenizer.model")
    assert ours.encode("the cat", bos=True) == model.encode("the cat")
    assert ours.bos_id == ours.eos_id == 1  # Documents are separated by EOS.
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0]['content'] }}")
    assert encode_chat(ours, [{"role": "user", "content": "the"}]) == ours.encode("the")


def test_model_without_bytes_or_end_can_be_read(tmp_path: Path) -> None:
    model = train_sentencepiece(tmp_path / "a.model", byte_fallback=False, eos_id=-1)
    ours = open_tokenizer(tmp_path / "a.model")
    assert ours.encode("the cat") == model.encode("the cat")
    assert ours.decode(ours.encode("the cat")) == "the cat"
    assert ours.eos_id == -1


def test_training_needs_an_end_token(tiny_config: Config, tmp_path: Path) -> None:
    train_sentencepiece(tmp_path / "a.model", eos_id=-1)
    tokenizer = TokenizerConfig(path=str(tmp_path / "a.model"))
    with pytest.raises(InputError, match="has no end token, which separates documents"):
        train.load_or_train_tokenizer(replace(tiny_config, tokenizer=tokenizer))


def test_word_list_leaves_a_token_for_spaces(tiny_config: Config, tmp_path: Path) -> None:
    words = ["चालाक", "चूहा", "lion", "became", "जंगल"] * 40
    (tmp_path / "words.txt").write_text("\n".join(words))
    source = SourceConfig("w", kind="text", language="hi", path=str(tmp_path / "words.txt"))
    data = replace(tiny_config.data, sources=[source], validation_fraction=0.0)
    path = tmp_path / "words.model"
    tokenizer = TokenizerConfig(path=str(path), vocab_size=310)
    train.train(replace(tiny_config, data=data, tokenizer=tokenizer))
    ours = SentencePieceTokenizer(path)
    sizes = ours.token_bytes()
    for text in ("lion became", " ", "a ▁ b", "चूहा  जंगल ", "▁"):
        ids = ours.encode(text)
        assert ours.decode(ids) == text
        assert sizes[ids].sum() == len(text.encode())


def test_end_tokens_are_found_in_every_file(tmp_path: Path) -> None:
    llama_directory(tmp_path, {}, {"config.json": {"model_type": "llama", "eos_token_id": [7, 9]}})
    path = tmp_path / "tokenizer.model"
    assert end_ids(open_tokenizer(path)) == {2, 7, 9}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 8}')
    assert end_ids(open_tokenizer(path)) == {2, 8}  # As in transformers, it wins.
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.5}')
    assert end_ids(open_tokenizer(path)) == {2, 7, 9}
    (tmp_path / "config.json").rename(tmp_path / "hf_config.json")
    assert end_ids(open_tokenizer(path)) == {2, 7, 9}


def test_chat_template_is_rendered_as_by_transformers(tmp_path: Path) -> None:
    small_tokenizer("byte level", tmp_path)
    template = (
        "{{ bos_token }}{{ pad_token }}{% for m in messages %}{% if loop.index > 2 %}{% break %}"
        "{% endif %}{{ m | tojson }}{{ m['content'] | upper }}\n{% endfor %}"
        "{{ strftime_now('%Y') }}{% if add_generation_prompt %}{{ eos_token }}{% endif %}"
    )
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"}
    names |= {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    messages = [{"role": "user", "content": f"एक <b> 'x' & {i}"} for i in range(3)]
    ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert encode_chat(open_tokenizer(tmp_path / "tokenizer.json"), messages) == ids


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb"])
def test_lone_surrogate_is_named_by_every_kind(text: str, tmp_path: Path) -> None:
    (tmp_path / "json").mkdir()
    llama_directory(tmp_path / "spm", {})
    for tokenizer in (
        small_tokenizer("byte level", tmp_path / "json"),
        open_tokenizer(tmp_path / "spm" / "tokenizer.model"),
    ):
        with pytest.raises(InputError, match="lone surrogate"):
            tokenizer.encode(text)
