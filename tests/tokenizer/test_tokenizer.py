"""Tokenizer: lossless for every string, safe from injected specials, clear errors."""

import io
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from mooshak.config.parse import dump_config
from mooshak.config.sections import Config, SourceConfig
from mooshak.errors import InputError
from mooshak.tokenizer import sentencepiece as sentencepiece_tokenizer
from mooshak.tokenizer import train
from mooshak.tokenizer.__main__ import main
from mooshak.tokenizer.base import Tokenizer
from mooshak.tokenizer.sentencepiece import CHAT_MARKERS, SentencePieceTokenizer

HARD = [
    "",
    " ",
    "  two spaces  before and after  ",
    "line\nline\r\n\n\ttab\t",
    "\0nul\0",
    "क्‍ष क्‌ष श्री ज़रा ज़रा १२३",
    "👨‍👩‍👧‍👦 🇮🇳 ✌🏽",
    "\u2581",
    "a\u2581\u2581 b \u2581",
    "\u0378 \U000e0001 \U0010ffff \ufffe \ufeff",
    "\u00a0\u3000\u2028\u0085",
    "\ufffd",
    "<s>text</s><unk><pad><0x41>" + "".join(CHAT_MARKERS),
]


@pytest.mark.parametrize("text", HARD)
def test_hard_strings_round_trip(tiny_tokenizer: Tokenizer, text: str):
    ids = tiny_tokenizer.encode(text)
    assert tiny_tokenizer.decode(ids) == text
    assert tiny_tokenizer.token_bytes()[ids].sum() == len(text.encode())


def test_every_string_round_trips(tiny_tokenizer: Tokenizer):
    sizes = tiny_tokenizer.token_bytes()
    characters = st.characters(exclude_categories=["Cs"]) | st.sampled_from(" \u2581\n\0क्‍षिab<|>")

    @given(st.text(characters))
    def check(text: str) -> None:
        ids = tiny_tokenizer.encode(text)
        assert tiny_tokenizer.decode(ids) == text
        assert sizes[ids].sum() == len(text.encode())

    check()


def test_batch_is_encoded_as_its_texts(tiny_tokenizer: Tokenizer):
    one_by_one = [tiny_tokenizer.encode(text) for text in HARD]
    assert tiny_tokenizer.encode_batch(HARD, threads=2) == one_by_one
    assert tiny_tokenizer.encode_batch([]) == []


@pytest.mark.parametrize(
    ("changes", "of_words"),
    [({}, True), ({"split_by_whitespace": False}, False), ({"add_dummy_prefix": True}, False)],
)
def test_word_cache_is_used_only_where_it_is_exact(
    tmp_path: Path, monkeypatch, changes, of_words: bool
):
    """Ids of a batch are those of its whole texts, also for models that merge across spaces."""
    model = io.BytesIO()
    options = {"normalization_rule_name": "identity", "add_dummy_prefix": False, **changes}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["of the cat of the hat शेर और चूहा of the"] * 50),
        model_writer=model,
        model_type="bpe",
        vocab_size=320,
        byte_fallback=True,
        hard_vocab_limit=False,
        remove_extra_whitespaces=False,
        minloglevel=2,
        **options,
    )
    (tmp_path / "m.model").write_bytes(model.getvalue())
    tokenizer = SentencePieceTokenizer(tmp_path / "m.model")
    texts = [*HARD, "of the  cat", " of the", "of the ", "the\nof the", "और चूहा", "of"]
    expected = [tokenizer.encode(text) for text in texts]
    for _ in range(2):  # With words that are new, and known.
        assert tokenizer.encode_batch(texts) == expected
    assert bool(tokenizer._words) == of_words
    monkeypatch.setattr(sentencepiece_tokenizer, "_FEW_WORDS", 20)
    for batch in (["of the"] * 2, texts, texts):  # Too many words, from the second on.
        assert tokenizer.encode_batch(batch) == [tokenizer.encode(text) for text in batch]
    assert not tokenizer._words


def test_text_cannot_inject_specials(tiny_tokenizer: Tokenizer):
    ids = tiny_tokenizer.encode("<s>a</s><unk><pad>" + "".join(CHAT_MARKERS))
    specials = [tiny_tokenizer.id_of(p) for p in ("<unk>", "<s>", "</s>", "<pad>", *CHAT_MARKERS)]
    assert specials == list(range(8))
    assert not set(ids) & set(specials)


def test_bos_eos_and_padding(tiny_tokenizer: Tokenizer):
    ids = tiny_tokenizer.encode("शेर", bos=True, eos=True)
    assert ids[0] == tiny_tokenizer.bos_id == 1
    assert ids[-1] == tiny_tokenizer.eos_id == 2
    assert tiny_tokenizer.decode(ids) == "शेर"
    assert (tiny_tokenizer.vocab_size, tiny_tokenizer.padded_vocab_size) == (505, 512)
    assert tiny_tokenizer.decode(np.array([*ids, 511])) == "शेर"
    sizes = tiny_tokenizer.token_bytes()
    assert sizes.shape == (512,) and sizes.dtype == np.int32
    assert not sizes[:8].any() and not sizes[505:].any() and sizes[8:505].all()


def test_incomplete_bytes_are_replaced(tiny_tokenizer: Tokenizer):
    first_byte = tiny_tokenizer.encode("👨")[:1]
    assert tiny_tokenizer.decode(first_byte) == "\ufffd"


def test_ids_out_of_range(tiny_tokenizer: Tokenizer):
    for ids in ([512], [-1]):
        with pytest.raises(InputError, match=r"must be in 0 \.\. 511"):
            tiny_tokenizer.decode(ids)


def test_lone_surrogate(tiny_tokenizer: Tokenizer):
    for text in ("ab\ud800", "\u2581ab\udfff"):
        with pytest.raises(InputError, match="lone surrogate"):
            tiny_tokenizer.encode(text)


def test_unknown_piece(tiny_tokenizer: Tokenizer):
    with pytest.raises(InputError, match="has no token"):
        tiny_tokenizer.id_of("<|tool|>")


def test_training_is_deterministic(tiny_config: Config, tiny_tokenizer: Tokenizer, tmp_path: Path):
    again = with_tokenizer(tiny_config, path=str(tmp_path / "new" / "again.model"))
    assert train.load_or_train_tokenizer(again).fingerprint == tiny_tokenizer.fingerprint
    assert [p.name for p in (tmp_path / "new").iterdir() if p.suffix != ".lock"] == ["again.model"]


def test_numbers_are_digits(tiny_config: Config, tmp_path: Path):
    path = tmp_path / "numbers.txt"
    path.write_text("सन् १९४७ में 1947 शेर\n" * 200)
    sources = [*tiny_config.data.sources, SourceConfig("n", kind="text", path=str(path))]
    data = replace(tiny_config.data, sources=sources, validation_fraction=0.0)
    config = with_tokenizer(replace(tiny_config, data=data), path=str(tmp_path / "t.model"))
    tokenizer = train.load_or_train_tokenizer(config)
    for number in ("१९४७", "1947"):
        ids = tokenizer.encode(number)
        assert [tokenizer.decode([id]) for id in ids] == list(number)


def test_validation_text_is_not_trained_on(tiny_config: Config, tmp_path: Path, monkeypatch):
    from mooshak.corpus.filters import in_validation
    from mooshak.corpus.readers import documents

    lines = set(train.training_lines(tiny_config))
    source = tiny_config.data.sources[0]
    held_out = [text for text in documents(source, tiny_config) if in_validation(text, 0.2)]
    assert held_out and not {line for text in held_out for line in text.split("\n")} & lines


def test_training_bytes_are_shared_by_weight(tiny_config: Config, tmp_path: Path):
    path = tmp_path / "long.txt"
    path.write_text("x" * 30_000 + "\n" + "y" * 30_000)
    sources = [
        SourceConfig("a", kind="text", path=str(path), weight=3.0),
        SourceConfig("b", kind="text", path=str(path), weight=1.0),
    ]
    data = replace(tiny_config.data, sources=sources, validation_fraction=0.0)
    config = with_tokenizer(replace(tiny_config, data=data), training_bytes=40_000)
    lines = list(train.training_lines(config))
    assert sum(map(len, lines)) == 29_999 + 10_000 + 1  # A newline is a byte too; b has none.
    assert max(map(len, lines)) == 4096


def test_vocabulary_too_large(tiny_config: Config, tmp_path: Path):
    config = with_tokenizer(tiny_config, path=str(tmp_path / "t.model"), vocab_size=60_000)
    with pytest.raises(InputError, match=r"60000 is too large .* at most \d+ tokens"):
        train.train(config)
    assert not (tmp_path / "t.model").exists()


def test_vocabulary_too_small(tiny_config: Config, tmp_path: Path):
    config = with_tokenizer(tiny_config, path=str(tmp_path / "t.model"), vocab_size=100)
    with pytest.raises(InputError, match="100 is too small"):
        train.train(config)


def test_vocabulary_does_not_fit_the_model(tiny_config: Config, tiny_tokenizer: Tokenizer):
    config = replace(tiny_config, model=replace(tiny_config.model, vocab_size=576))
    with pytest.raises(InputError, match=r"has 505 tokens, model\.vocab_size is 576"):
        train.load_or_train_tokenizer(config)


def test_bad_source_while_training(tiny_config: Config, tmp_path: Path):
    (tmp_path / "binary.txt").write_bytes(b"ab\0cd")
    source = SourceConfig("bad", kind="text", path=str(tmp_path / "binary.txt"))
    for sources in ([source], [*tiny_config.data.sources, source]):
        config = replace(tiny_config, data=replace(tiny_config.data, sources=sources))
        with pytest.raises(InputError, match=r"binary\.txt is not UTF-8 text"):
            train.train(with_tokenizer(config, path=str(tmp_path / "t.model")))


@pytest.mark.parametrize("content", [b"", b"not a model\n" * 50, "half", "almost"])
def test_broken_file(tiny_tokenizer: Tokenizer, tmp_path: Path, content):
    whole = tiny_tokenizer.path.read_bytes()
    cuts = {"half": whole[: len(whole) // 2], "almost": whole[:-3]}
    path = tmp_path / "t.model"
    path.write_bytes(cuts.get(content, content))
    with pytest.raises(InputError, match="is not a SentencePiece model, or is truncated"):
        SentencePieceTokenizer(path)


def test_missing_file(tmp_path: Path):
    with pytest.raises(InputError, match="is missing; train it"):
        SentencePieceTokenizer(tmp_path / "nowhere.model")
    with pytest.raises(InputError, match="is a directory"):
        SentencePieceTokenizer(tmp_path)


def test_command_line(
    tiny_config: Config, tiny_tokenizer: Tokenizer, tmp_path, capsys, monkeypatch
):
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(tiny_config))
    config = ["--config", str(path)]
    text = "  शेर और चूहा\n\u2581"

    class Stdin:
        buffer = io.BytesIO(text.encode())

    monkeypatch.setattr(sys, "stdin", Stdin)
    main(["encode", *config])
    ids = capsys.readouterr().out
    assert [int(id) for id in ids.split()] == tiny_tokenizer.encode(text)
    Stdin.buffer = io.BytesIO(ids.encode())
    main(["decode", "--tokenizer.path", str(tiny_tokenizer.path)])
    assert capsys.readouterr().out == text
    main(["encode", "शेर", "lion", *config])
    assert len(capsys.readouterr().out.splitlines()) == 2
    main(["report", *config])
    assert "tokens per word" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        main(["decode", "seven", *config])
    assert stopped.value.code == 2
    assert "'seven' is not a token id" in capsys.readouterr().err


@pytest.mark.slow
def test_needs_no_framework():
    code = (
        "import sys, mooshak.tokenizer, mooshak.data.shards, mooshak.corpus.readers;"
        "assert not {'torch', 'jax', 'grain', 'datasets'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def with_tokenizer(config: Config, **changes) -> Config:
    """The configuration with other settings of the tokenizer."""
    return replace(config, tokenizer=replace(config.tokenizer, **changes))
