"""Exports check themselves: the target's own reader gives our ids, texts and logits, or no file."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

os.environ["HF_HUB_OFFLINE"] = "1"

import gguf
import sentencepiece
import transformers
from safetensors.torch import load_file, save_file

from mooshak.config.parse import dump_config
from mooshak.config.sections import Config
from mooshak.errors import InputError
from mooshak.tokenizer.base import Tokenizer
from mooshak.tokenizer.files import find_tokenizer
from mooshak.tokenizer.load import load_tokenizer, open_tokenizer
from mooshak.tokenizer.sentencepiece import parse_proto
from parity import export_hf_check
from parity.convert import convert, main, open_any
from parity.export_check import TEXTS
from tests.parity.test_huggingface import make
from tests.sentencepiece_models import added_token, llama_directory, train_sentencepiece

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"


def llama(path: Path, vocab_size: int = 448, **settings: Any) -> None:
    make(path, "llama", vocab_size=vocab_size, **settings)


def chatml_llama(path: Path, where: str) -> int:
    """A Llama with two added tokens, of which one ends texts; returns its number of pieces."""
    n = train_sentencepiece(path / "tokenizer.model").vocab_size()
    settings: dict[str, Any] = {"eos_token": "<|im_end|>", "bos_token": "<s>"}
    settings |= {"chat_template": TEMPLATE, "add_bos_token": False}
    files: dict[str, Any] = {}
    if where == "added_tokens.json":
        files[where] = {"<|im_start|>": n, "<|im_end|>": n + 1}
        settings["additional_special_tokens"] = ["<|im_start|>", "<|im_end|>"]
    else:
        tokens = {str(n): added_token("<|im_start|>"), str(n + 1): added_token("<|im_end|>")}
        tokens[str(n + 2)] = added_token("शेरखान", special=False)
        settings[where] = tokens
    llama(path)
    config = json.loads((path / "config.json").read_text())
    llama_directory(path, settings, files | {"config.json": config})
    return n


def fields(path: Path) -> dict[str, Any]:
    read = gguf.GGUFReader(path)
    return {name: field.contents() for name, field in read.fields.items() if field.types}


@pytest.mark.parametrize("where", ["added_tokens_decoder", "added_tokens.json"])
def test_gguf_has_the_tokens_of_the_settings(where: str, tmp_path: Path) -> None:
    n = chatml_llama(tmp_path / "hf", where)
    convert(tmp_path / "hf", tmp_path / "m.gguf", "gguf")
    found = fields(tmp_path / "m.gguf")
    tokens, types = (found[f"tokenizer.ggml.{key}"] for key in ("tokens", "token_type"))
    assert tokens[n : n + 2] == ["<|im_start|>", "<|im_end|>"]
    assert types[n : n + 2] == [gguf.TokenType.CONTROL] * 2
    if where == "added_tokens_decoder":
        assert (tokens[n + 2], types[n + 2]) == ("शेरखान", gguf.TokenType.USER_DEFINED)
    assert len(tokens) == 448 and tokens[447] == "[PAD447]"
    assert found["tokenizer.ggml.eos_token_id"] == n + 1
    assert found["tokenizer.ggml.bos_token_id"] == 1
    assert found["tokenizer.ggml.add_bos_token"] is False
    assert found["tokenizer.chat_template"] == TEMPLATE
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("where", ["added_tokens_decoder", "added_tokens.json"])
def test_llama_cpp_agrees_on_added_tokens(where: str, tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    n = chatml_llama(tmp_path / "hf", where)
    convert(tmp_path / "hf", tmp_path / "m.gguf", "gguf")
    read = llama_cpp.Llama(str(tmp_path / "m.gguf"), vocab_only=True, verbose=False)
    ours = open_tokenizer(tmp_path / "hf" / "tokenizer.model")
    assert read.token_eos() == n + 1
    for text in ("the cat", "एक चालाक", "<|im_start|>", "a  b"):
        ids = read.tokenize(text.encode(), add_bos=False, special=True)
        assert ids == ours.encode(text, bos=True)


@pytest.mark.parametrize("where", ["added_tokens_decoder", "added_tokens.json"])
def test_hf_export_has_the_tokens_of_the_settings(where: str, tmp_path: Path) -> None:
    n = chatml_llama(tmp_path / "hf", where)
    convert(tmp_path / "hf", tmp_path / "out", "hf")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ours = open_tokenizer(tmp_path / "hf" / "tokenizer.model")
    assert theirs.eos_token_id == ours.eos_id == n + 1
    texts = ["<|im_start|>the<|im_end|> cat", "  शेरखान lions", "a <s> b", *TEXTS]
    for text in texts:
        ids = theirs(text)["input_ids"]
        assert ids == ours.encode(text, bos=True), text
        assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids)
    assert theirs.chat_template == TEMPLATE


def append_pieces(path: Path, score: float | None) -> sentencepiece.SentencePieceProcessor:
    """Append pieces to a model, all with one score as OpenHathi's, or in order (None)."""
    proto = parse_proto(path.read_bytes())
    lowest = min(piece.score for piece in proto.pieces)
    new = [
        "▁चा",
        "ाला",
        "ालाक",
        "▁जं",
        "जंगल",
        "गल",
        "▁रह",
        "ता",
        "हता",
        "चूह",
        "ूहा",
        "atth",
        "लम",
        "कल",
    ]
    known = {piece.piece for piece in proto.pieces}
    for i, piece in enumerate(new):
        if piece not in known:
            proto.pieces.add(piece=piece, score=lowest - 1 - i if score is None else score)
    path.write_bytes(proto.SerializeToString())
    return sentencepiece.SentencePieceProcessor(model_file=str(path))


@pytest.mark.parametrize("to", ["hf", "gguf"])
def test_appended_pieces_are_equal_or_refused(to: str, tmp_path: Path) -> None:
    """Pieces of equal score are merged from the left, by llama.cpp too; in BPE, by their ranks."""
    llama(tmp_path / "hf")
    train_sentencepiece(tmp_path / "hf" / "tokenizer.model", vocab_size=310)
    append_pieces(tmp_path / "hf" / "tokenizer.model", 0.0)
    if to == "gguf":
        convert(tmp_path / "hf", tmp_path / "out", to)
        return
    with pytest.raises(InputError, match=r"texts have other tokens: .* --force writes it") as error:
        convert(tmp_path / "hf", tmp_path / "out", to)
    assert str(tmp_path / "out") in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]
    convert(tmp_path / "hf", tmp_path / "out", to, force=True)
    assert "This export differs" in (tmp_path / "out" / "README.md").read_text()


def test_ordered_pieces_keep_their_ids(tmp_path: Path) -> None:
    llama(tmp_path / "hf")
    train_sentencepiece(tmp_path / "hf" / "tokenizer.model", vocab_size=310)
    model = append_pieces(tmp_path / "hf" / "tokenizer.model", None)
    convert(tmp_path / "hf", tmp_path / "out", "hf")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    random, pieces = (
        np.random.default_rng(3),
        [model.id_to_piece(i) for i in range(260, model.vocab_size())],
    )
    for row in random.integers(0, len(pieces), (300, 3)):
        text = "".join(pieces[i] for i in row).replace("▁", " ")
        assert theirs(text)["input_ids"] == [1, *model.encode(text)], text


@pytest.mark.parametrize("to", ["hf", "gguf"])
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"model_type": "unigram", "vocab_size": 330}, "it is not a BPE model"),
        ({"normalization_rule_name": "nmt_nfkc"}, r"it normalises text \(nmt_nfkc\)"),
        ({"remove_extra_whitespaces": True}, "it removes spaces"),
        ({"treat_whitespace_as_suffix": True}, "its spaces follow the words"),
    ],
)
def test_models_without_an_equal_are_refused(
    to: str, options: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    llama(tmp_path / "hf")
    train_sentencepiece(tmp_path / "hf" / "tokenizer.model", **options)
    with pytest.raises(InputError, match=f"tokenizer.model: {reason}"):
        convert(tmp_path / "hf", tmp_path / "out", to)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


@pytest.mark.slow
@pytest.mark.parametrize("to", ["hf", "gguf"])
@pytest.mark.parametrize(
    "options",
    [
        {"user_defined_symbols": ["<|u|>", "lionb"], "add_dummy_prefix": False},
        {"bos_id": -1},
        {"add_dummy_prefix": False},
        {"pad_id": 3, "control_symbols": ["<x>"]},
    ],
)
def test_models_of_every_setting_are_exported(
    to: str, options: dict[str, Any], tmp_path: Path
) -> None:
    llama(tmp_path / "hf")
    model = train_sentencepiece(tmp_path / "hf" / "tokenizer.model", **options)
    convert(tmp_path / "hf", tmp_path / "out", to)
    bos = [] if options.get("bos_id") == -1 else [1]
    if to == "gguf":
        found = fields(tmp_path / "out")
        assert found["tokenizer.ggml.add_bos_token"] is bool(bos)
        assert found.get("tokenizer.ggml.bos_token_id", -1) == options.get("bos_id", 1)
        return
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in ("the cat", "  a lionbecame", "चूहा <|u|> था", "ट😀"):
        assert theirs(text)["input_ids"] == bos + model.encode(text), text


@pytest.mark.slow
def test_settings_that_a_target_cannot_have(tmp_path: Path) -> None:
    """transformers has no prefix before a symbol of the user; llama.cpp no unknown characters."""
    llama(tmp_path / "hf")
    for to, options in (
        ("hf", {"user_defined_symbols": ["<|u|>"]}),
        ("gguf", {"byte_fallback": False}),
    ):
        train_sentencepiece(tmp_path / "hf" / "tokenizer.model", **options)
        with pytest.raises(InputError, match="texts have other tokens"):
            convert(tmp_path / "hf", tmp_path / "out", to)
    convert(tmp_path / "hf", tmp_path / "out", "hf")


@pytest.mark.parametrize("to", ["hf", "gguf"])
def test_wrong_logits_leave_nothing(
    to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights that are not finite; a wrong setting in the exported configuration."""
    llama(tmp_path / "hf")
    train_sentencepiece(tmp_path / "hf" / "tokenizer.model")
    if to == "hf":
        from parity import export_hf

        original = export_hf.model_to_hf
        monkeypatch.setattr(
            export_hf, "model_to_hf", lambda *a: original(*a) | {"rms_norm_eps": 0.1}
        )
        with pytest.raises(InputError, match=r"logits of transformers are .* away from ours"):
            convert(tmp_path / "hf", tmp_path / "out", to)
        monkeypatch.undo()
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(tensors, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="not finite; the weights are damaged"):
        convert(tmp_path / "hf", tmp_path / "out", to)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen3"])
def test_large_models_are_checked_in_part(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_hf_check, "FULL_BYTES", 0)
    monkeypatch.setattr(export_hf_check, "N_ROWS", 50)
    make(tmp_path / "hf", kind, vocab_size=448, num_key_value_heads=2)
    part = export_hf_check.first_part(open_any(tmp_path / "hf"))
    assert (part.model.n_layers, part.model.vocab_size) == (1, 50)
    convert(tmp_path / "hf", tmp_path / "out", "hf", shard_size=40_000)


def nfc_run(directory: Path, config: Config, tokenizer: Tokenizer, key: bool | None) -> Path:
    """A checkpoint of a run whose text was brought to NFC."""
    from mooshak.checkpoints import safetensors
    from tests.conftest import TINY_MODEL
    from tests.drawn_checkpoints import drawn_checkpoint

    state = {"format_version": 1, "step": 5} | ({} if key is None else {"normalize_nfc": key})
    path = directory / "checkpoints" / "5"
    files = {"tokenizer.model": tokenizer.path}
    source = drawn_checkpoint(TINY_MODEL, state=state, tokenizer_files=files)
    safetensors.write_checkpoint(path, source)
    if key is None:
        (directory / "config.yaml").write_text(dump_config(config))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("key", [True, None])
def test_prompts_are_normalised_as_the_text_of_the_run(
    key: bool | None, tiny_config: Config, tiny_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """U+095C, as many keyboards type it; the text of the run has two code points."""
    path = nfc_run(tmp_path / "run", tiny_config, tiny_tokenizer, key)
    model, typed, expected = open_any(path).model, "प\u095cा", tiny_tokenizer.encode("पड\u093cा")
    ours = load_tokenizer(path, model)
    assert ours is not None and ours.encode(typed) == expected
    assert ours.encode_batch([typed]) == [expected]
    convert(path, tmp_path / "weights", "safetensors", weights_only=True)
    for to in ("torch", "jax"):
        convert(tmp_path / "weights", tmp_path / to, to)
        found = load_tokenizer(tmp_path / to, model)
        assert found is not None and found.encode(typed) == expected
    convert(path, tmp_path / "hf", "hf")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert theirs(typed)["input_ids"] == [1, *expected]
    assert "Unicode NFC" in (tmp_path / "hf" / "README.md").read_text()
    convert(path, tmp_path / "m.gguf", "gguf")
    assert "Unicode NFC" in fields(tmp_path / "m.gguf")["general.description"]


def test_prompts_of_other_runs_are_left_alone(
    tiny_config: Config, tiny_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    path = nfc_run(tmp_path / "run", tiny_config, tiny_tokenizer, False)
    found = load_tokenizer(path, open_any(path).model)
    assert found is not None and found.encode("\u095c") == tiny_tokenizer.encode("\u095c")


@pytest.mark.slow
@pytest.mark.parametrize("to", ["torch", "jax", "safetensors", "hf"])
def test_checkpoint_of_an_older_run_takes_its_tokenizer_along(
    to: str,
    tiny_config: Config,
    tiny_tokenizer: Tokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its RUN/config.yaml has paths relative to where it was started; the command runs in /."""
    path = nfc_run(tmp_path / "runs" / "a", tiny_config, tiny_tokenizer, True)
    (path / "tokenizer.model").unlink()
    (tmp_path / "data").mkdir()
    shutil.copy(tiny_tokenizer.path, tmp_path / "data" / "t.model")
    config = replace(
        tiny_config,
        tokenizer=replace(tiny_config.tokenizer, path="data/t.model"),
        run=replace(tiny_config.run, dir="runs/a"),
    )
    (path.parent.parent / "config.yaml").write_text(dump_config(config))
    monkeypatch.chdir("/")
    assert find_tokenizer(path, None) == tmp_path / "data" / "t.model"
    convert(path, tmp_path / "alone", to)
    shutil.move(tmp_path / "alone", tmp_path / "elsewhere")
    shutil.rmtree(tmp_path / "runs")
    shutil.rmtree(tmp_path / "data")
    found = load_tokenizer(tmp_path / "elsewhere", open_any(tmp_path / "elsewhere").model)
    assert found is not None
    assert found.encode("एक चूहा") == tiny_tokenizer.encode("एक चूहा")


def test_another_tokenizer_of_equal_size_is_refused(
    tiny_config: Config, tiny_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    path = nfc_run(tmp_path / "run", tiny_config, tiny_tokenizer, True)
    state = json.loads((path / "trainer_state.json").read_text())
    state["data"] = {"tokenizer": tiny_tokenizer.fingerprint}
    (path / "trainer_state.json").write_text(json.dumps(state))
    model = open_any(path).model
    assert load_tokenizer(path, model) is not None
    proto = parse_proto(tiny_tokenizer.path.read_bytes())
    a, b = proto.pieces[-1], proto.pieces[-2]
    a.piece, b.piece = b.piece, a.piece
    (tmp_path / "other.model").write_bytes(proto.SerializeToString())
    with pytest.raises(InputError, match=r"with another tokenizer than .*other\.model"):
        load_tokenizer(path, model, tmp_path / "other.model")


@pytest.mark.parametrize("to", ["torch", "jax", "safetensors", "hf", "gguf"])
def test_target_that_cannot_be_written_is_one_line(
    to: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    llama(tmp_path / "hf")
    train_sentencepiece(tmp_path / "hf" / "tokenizer.model")
    (tmp_path / "file").write_text("")
    for target in (tmp_path / "file" / "x", Path("/proc/x/y"), tmp_path / ("n" * 300)):
        monkeypatch.setattr("sys.argv", ["convert", str(tmp_path / "hf"), str(target), "--to", to])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error")]
        assert ended.value.code == 2 and str(target.parent)[:20] in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "hf"]
