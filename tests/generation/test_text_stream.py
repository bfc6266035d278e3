"""Streamed text: joined it is the text, and no part ends inside a character or a cluster."""

from collections.abc import Iterator

import pytest
import regex
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from mooshak.generation.text import TextStream
from mooshak.tokenizer.base import Tokenizer
from mooshak.tokenizer.load import open_tokenizer
from tests.hf_tokenizers import KINDS, PARTS, small_tokenizer

texts = st.lists(st.sampled_from(PARTS), max_size=12).map("".join) | st.text(max_size=8)


def clusters(text: str) -> set[int]:
    """Borders of grapheme clusters."""
    return {0, *(match.end() for match in regex.finditer(r"\X", text))}


def stream(tokenizer: Tokenizer, prompt: list[int], ids: list[int], stop: tuple[str, ...]) -> list:
    """Chunks, the last one from `finish`."""
    streamed = TextStream(tokenizer, prompt, stop)
    chunks = []
    for token in ids:
        chunks.append(streamed.push(token))
        if streamed.stopped:
            break
    last = streamed.finish()
    assert "".join(chunks) + last == streamed.text
    assert streamed.finish() == ""
    return [*chunks, last]


def check(tokenizer: Tokenizer, prompt: list[int], ids: list[int], stop: tuple[str, ...]) -> str:
    """Compare the joined chunks with the difference of two decodings; return them."""
    chunks = stream(tokenizer, prompt, ids, stop)
    ids = ids[: len(chunks) - 1]  # The first stop text to be complete ends the generation.
    whole, start = tokenizer.decode([*prompt, *ids]), tokenizer.decode(prompt)
    n = next((i for i, (a, b) in enumerate(zip(whole, start, strict=False)) if a != b), len(start))
    ends = [at for one in stop if (at := whole.find(one, min(n, len(start)))) >= 0]
    joined = "".join(chunks)
    assert joined == whole[min(n, len(start)) : min(ends, default=len(whole))]
    # All chunks but the last two: the one before `finish` may be cut by a stop text.
    borders, at = clusters(joined), 0
    for chunk in chunks[: -2 if stop else -1]:
        at += len(chunk)
        assert at in borders, (chunks, at)
    return joined


@pytest.mark.slow
@settings(deadline=None, max_examples=300)
@given(prompt=texts, text=texts)
def test_chunks_join_to_the_text(tiny_tokenizer: Tokenizer, prompt: str, text: str) -> None:
    ids = tiny_tokenizer.encode(prompt + text)
    for split in {0, 1, len(ids) // 2, len(ids)}:
        check(tiny_tokenizer, ids[:split], ids[split:], ())


@settings(deadline=None, max_examples=300)
@given(text=texts, at=st.integers(0, 30), length=st.integers(1, 5), other=texts)
def test_stop_texts_end_the_text_and_are_not_shown(
    tiny_tokenizer: Tokenizer, text: str, at: int, length: int, other: str
) -> None:
    stop = tuple(filter(None, (text[at : at + length], other)))
    check(tiny_tokenizer, [], tiny_tokenizer.encode(text), stop)


@settings(deadline=None, max_examples=300)
@given(ids=st.lists(st.integers(0, 511), max_size=24), split=st.integers(0, 5))
def test_any_tokens_join_to_the_text(tiny_tokenizer: Tokenizer, ids: list[int], split: int) -> None:
    """Bytes that are no character, control tokens, ids beyond the tokenizer."""
    assert tiny_tokenizer.vocab_size < 511
    check(tiny_tokenizer, ids[:split], ids[split:], ())


@pytest.fixture(scope="module", params=KINDS)
def hf_tokenizer(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Tokenizer:
    """A small tokenizer.json, whose characters are bytes, or pieces with bytes as a fallback."""
    return small_tokenizer(request.param, tmp_path_factory.mktemp("hf"))


@settings(deadline=None, max_examples=200)
@given(text=texts, ids=st.lists(st.integers(0, 399), max_size=20), split=st.integers(0, 8))
def test_chunks_of_hf_tokenizers_join_to_the_text(
    hf_tokenizer: Tokenizer, text: str, ids: list[int], split: int
) -> None:
    encoded = hf_tokenizer.encode(text)
    check(hf_tokenizer, encoded[:split], encoded[split:], ())
    check(hf_tokenizer, ids[:split], ids[split:], ())


@settings(deadline=None, max_examples=200)
@given(text=texts, at=st.integers(0, 30), length=st.integers(1, 5))
def test_stop_texts_end_the_text_of_hf_tokenizers(
    hf_tokenizer: Tokenizer, text: str, at: int, length: int
) -> None:
    ids = hf_tokenizer.encode(text)
    stop = tuple(filter(None, [hf_tokenizer.decode(ids)[at : at + length]]))
    check(hf_tokenizer, [], ids, stop)


def test_bytes_that_a_later_byte_makes_invalid(hf_tokenizer: Tokenizer) -> None:
    """ByteFallback replaces all bytes of a run; a stop text in a run ends the generation."""
    if "<0x41>" not in hf_tokenizer.pieces():
        pytest.skip("a byte-level tokenizer has no such tokens")
    valid, invalid, space = map(hf_tokenizer.id_of, ("<0x41>", "<0xFF>", "▁"))
    assert check(hf_tokenizer, [], [valid, valid, invalid, space, space], ()) == "���  "
    streamed = TextStream(hf_tokenizer, [], ["A"])
    assert streamed.push(valid) == "" and streamed.stopped and streamed.text == ""


@pytest.fixture(scope="module", params=["prefix", "strip"])
def space_tokenizer(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Tokenizer:
    """A SentencePiece model that adds a space at the start, or strips all there."""
    path = tmp_path_factory.mktemp("spaces") / "tokenizer.model"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a mouse and the lion  क्ष कि"] * 99),
        model_prefix=str(path.with_suffix("")),
        model_type="bpe",
        vocab_size=300,
        hard_vocab_limit=False,
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=True,
        remove_extra_whitespaces=request.param == "strip",
        minloglevel=2,
    )
    return open_tokenizer(path)


@pytest.mark.slow
@settings(deadline=None, max_examples=300)
@given(data=st.data(), text=texts, split=st.integers(0, 4))
def test_spaces_are_those_of_the_text(
    space_tokenizer: Tokenizer, data: st.DataObject, text: str, split: int
) -> None:
    space = space_tokenizer.id_of("▁")
    a_token = st.just(space) | st.integers(0, space_tokenizer.padded_vocab_size - 1)
    ids = space_tokenizer.encode(text) + data.draw(st.lists(a_token, max_size=12))
    check(space_tokenizer, ids[:split], ids[split:], ())


def test_conjunct_comes_as_a_whole(tiny_tokenizer: Tokenizer) -> None:
    """Each of its bytes is a token."""
    ids = list(_bytes(tiny_tokenizer, "स्त्रीकि"))
    chunks = [chunk for chunk in stream(tiny_tokenizer, [], ids, ()) if chunk]
    assert chunks == ["स्त्री", "कि"]


@pytest.mark.parametrize("between", ["", "special tokens", "spaces"])
def test_only_the_latest_tokens_are_decoded(
    between: str, tiny_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = tiny_tokenizer.encode("a mouse and the lion " * 40)
    if between:
        token = tiny_tokenizer.eos_id if between == "special tokens" else tiny_tokenizer.id_of("▁")
        ids = [one for id in ids for one in (id, *[token] * 6)]
    counts = []
    original = type(tiny_tokenizer).decode

    def decode(self: Tokenizer, ids: list[int]) -> str:
        counts.append(len(ids))
        return original(self, ids)

    monkeypatch.setattr(type(tiny_tokenizer), "decode", decode)
    streamed = TextStream(tiny_tokenizer, ids[:50])
    for token in ids[50:]:
        streamed.push(token)
    assert len(ids) > 200 and max(counts[2:]) < 32
    assert len(counts) < 3 * len(ids)


def _bytes(tokenizer: Tokenizer, text: str) -> Iterator[int]:
    pieces = tokenizer.pieces()
    for byte in text.encode():
        yield pieces.index(f"<0x{byte:02X}>")
