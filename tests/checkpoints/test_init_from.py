"""`init.from`: training continues from a foreign checkpoint, also with an extended vocabulary."""

import io
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from mooshak.checkpoints import init_from, safetensors
from mooshak.config.model import ModelConfig
from mooshak.config.parse import dump_config, load_draft
from mooshak.config.sections import Config
from mooshak.errors import InputError
from mooshak.tokenizer import extend
from mooshak.tokenizer.base import Tokenizer
from mooshak.tokenizer.files import files_of_tokenizer
from mooshak.tokenizer.load import open_tokenizer
from mooshak.tokenizer.sentencepiece import SentencePieceTokenizer, parse_proto
from mooshak.tokenizer.train import load_or_train_tokenizer, train
from parity.convert import convert, open_any
from tests.drawn_checkpoints import drawn_checkpoint

FRAMEWORKS = ("torch", "jax")
TOKENIZER = "tokenizer.model"
MODEL = ModelConfig(
    architecture="llama",
    vocab_size=330,
    dim=24,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    head_dim=10,
    hidden_dim=36,
    max_seq_len=48,
)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory as from the hub: an English tokenizer of 320 pieces, a model of 330 rows."""
    directory = tmp_path_factory.mktemp("llama")
    model = io.BytesIO()
    text = "a clever mouse lived in the forest; the lion became its friend and the farmer came"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([text] * 3),
        model_writer=model,
        model_type="bpe",
        vocab_size=320,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    (directory / "tokenizer.model").write_bytes(model.getvalue())
    along = {"tokenizer.model": directory / "tokenizer.model"}
    source = drawn_checkpoint(MODEL, tokenizer_files=along)
    safetensors.write_checkpoint(directory / "ours", source)
    convert(directory / "ours", directory / "hf", "hf", dtype="bfloat16")
    return directory / "hf"


@pytest.fixture(scope="module")
def config(llama: Path, tiny_config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe that continues it on the Hindi of the corpus."""
    here = tmp_path_factory.mktemp("hindi")
    hindi = replace(
        tiny_config,
        data=replace(
            tiny_config.data, dir=str(here / "shards"), sources=tiny_config.data.sources[:1]
        ),
        train=replace(tiny_config.train, steps=3, dtype="float64", sequence_length=24),
        run=replace(tiny_config.run, dir=str(here / "run")),
    )
    text = dump_config(hindi).split("data:", 1)[
        1
    ]  # Without the sections that are the checkpoint's.
    path = here / "hindi.yaml"
    path.write_text(f"init: {{from: {llama}}}\ndata:{text}")
    return path


@pytest.fixture(scope="module")
def extended(config: Path) -> Tokenizer:
    """The tokenizer with 380 pieces."""
    from mooshak.tokenizer.__main__ import main

    path = config.parent / "extended.model"
    main(
        [
            "extend",
            "--config",
            str(config),
            "--tokenizer.path",
            str(path),
            "--tokenizer.vocab_size",
            "380",
        ]
    )
    return SentencePieceTokenizer(path)


def resolved(config: Path, options: list[str]) -> Config:
    """The configuration with what the checkpoint `init.from` supplies."""
    return init_from.resolve(load_draft(config, options))


Command = Callable[..., str]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run the `main` of a module in this process; returns what it prints."""

    def call(module: str, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [module, *map(str, arguments)])
        capsys.readouterr()
        import_module(module).main()
        return capsys.readouterr().out

    return call


def test_extended_tokenizer_keeps_ids_and_shortens_hindi(llama: Path, extended: Tokenizer) -> None:
    old = SentencePieceTokenizer(llama / "tokenizer.model")
    assert extended.vocab_size == 380
    assert extended.texts()[:320] == old.texts()
    english, hindi = "the lion came", "एक चालाक चूहा जंगल में रहता था 😀"
    assert extended.encode(english) == old.encode(english)
    assert len(extended.encode(hindi)) < len(old.encode(hindi)) / 2
    assert extended.decode(extended.encode(hindi)) == hindi


@pytest.mark.slow
def test_new_rows_are_means_with_equal_bits_in_both(
    llama: Path, config: Path, extended: Tokenizer
) -> None:
    import mooshak_jax.checkpoint
    import mooshak_jax.distributed.mesh
    import mooshak_torch.checkpoint
    import mooshak_torch.model
    from parity.backends import canonical

    options = ["--tokenizer.path", str(extended.path), "--model.vocab_size", "384"]
    recipe = resolved(config, [*options, "--train.dtype", "float32"])
    assert recipe.model == replace(MODEL, vocab_size=384)
    source = open_any(llama)
    for name in init_from.TABLES:
        rows = source.read(name).astype(np.float64)
        new = init_from.init_checkpoint(recipe, source, extended).read(name).astype(np.float64)
        assert np.array_equal(new[:320], rows[:320])
        mean = rows.mean(0)
        assert np.allclose(new[380:], mean, rtol=2**-7, atol=1e-3)
        # Of a Devanagari piece, the mean of its bytes' rows.
        row = next(i for i, text in enumerate(extended.texts()) if i >= 320 and "च" in text)
        text = extended.texts()[row]
        byte_rows = [3 + byte for byte in text.encode() if byte != 32]
        space = [extended.id_of("\u2581")] * text.startswith(" ")
        assert np.allclose(new[row], rows[space + byte_rows].mean(0), rtol=2**-7, atol=1e-3)
    model = mooshak_torch.model.Model(recipe.model)
    mooshak_torch.checkpoint.load_init_weights(model, recipe, extended)
    parallel = mooshak_jax.distributed.mesh.make_parallel(recipe)
    theirs = canonical(mooshak_jax.checkpoint.load_init_weights(recipe, extended, parallel))
    for name, parameter in model.named_parameters():
        assert np.array_equal(parameter.detach().numpy(), theirs[name]), name


def test_byte_level_tokenizer_is_extended(llama: Path, config: Path, tmp_path: Path) -> None:
    """As Llama 3, Qwen and SmolLM have one: a `tokenizer.json`, and settings beside it."""
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, models, pre_tokenizers, trainers

    from mooshak.tokenizer.__main__ import main

    made = Fast(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(["the lion came to the forest, the mouse came to the lion"], trainer)
    there = shutil.copytree(llama, tmp_path / "there")
    (there / "tokenizer.model").unlink()
    made.save(str(there / "tokenizer.json"))
    (there / "tokenizer_config.json").write_text('{"eos_token": "<|end|>"}')
    old = open_tokenizer(there / "tokenizer.json")
    path = tmp_path / "grown" / "tokenizer.json"
    words = ["extend", "--config", str(config), "--init.from", str(there)]
    main([*words, "--tokenizer.path", str(path), "--tokenizer.vocab_size", "380"])
    grown = open_tokenizer(path)
    assert grown.vocab_size == 380 and grown.pieces()[: old.vocab_size] == old.pieces()
    assert grown.eos_id == old.eos_id == 0
    # The settings are copied also where the file has another name.
    named = path.rename(path.with_name("mine.json"))
    assert files_of_tokenizer(named).keys() >= {"tokenizer.json", "tokenizer_config.json"}
    named.rename(path)
    english, hindi = "the lion came", "एक चालाक चूहा जंगल में रहता था 😀"
    assert grown.encode(english) == old.encode(english)
    assert len(grown.encode(hindi)) < len(old.encode(hindi)) / 2
    assert grown.decode(grown.encode(hindi)) == hindi
    options = ["--init.from", str(there), "--tokenizer.path", str(path)]
    recipe = resolved(config, [*options, "--model.vocab_size", "384"])
    source = open_any(there)
    for name in init_from.TABLES:
        rows = source.read(name).astype(np.float64)
        new = init_from.init_checkpoint(recipe, source, grown).read(name).astype(np.float64)
        assert np.array_equal(new[: old.vocab_size], rows[: old.vocab_size])
        # A new piece is written with those that its bytes had before.
        row = max(grown.encode("चूहा"))
        assert row >= old.vocab_size
        parts = old.encode(grown.decode([row]))
        assert np.allclose(new[row], rows[parts].mean(0), rtol=2**-7, atol=1e-3)
    for path_, size, message in (
        (tmp_path / "new.model", "380", "is extended to a DIRECTORY/tokenizer.json"),
        (tmp_path / "tokenizer.json", "9000", "lower tokenizer.vocab_size to"),
    ):
        sizes = ["--tokenizer.path", str(path_), "--tokenizer.vocab_size", size]
        with pytest.raises(InputError, match=message):
            extend.extend(resolved(config, ["--init.from", str(there), *sizes]))
        assert not path_.exists()


@pytest.mark.slow
def test_continued_pretraining_is_equal_in_both(
    config: Path, extended: Tokenizer, tmp_path: Path, command: Command
) -> None:
    options = ("--config", config, "--tokenizer.path", extended.path, "--model.vocab_size", 384)
    curves = []
    for framework in FRAMEWORKS:
        run = tmp_path / framework
        command(f"mooshak_{framework}.train", *options, "--run.dir", run)
        lines = (run / "metrics.jsonl").read_text().splitlines()
        curves.append([json.loads(line)["loss"] for line in lines])
    assert len(curves[0]) == 3
    assert curves[0] == pytest.approx(curves[1], rel=1e-12, abs=0)
    # The run's checkpoint goes back to the hub with the larger tokenizer.
    convert(tmp_path / "jax/checkpoints/3", tmp_path / "hf", "hf")
    assert open_any(tmp_path / "hf").model == replace(MODEL, vocab_size=384)
    assert (tmp_path / "hf/tokenizer.model").read_bytes() == extended.path.read_bytes()


@pytest.mark.slow
def test_hub_directory_generates_in_both_frameworks(llama: Path, command: Command) -> None:
    options = (llama, "--prompt", "the lion", "--tokens", 12)
    ours, theirs = (command(f"mooshak_{framework}.generate", *options) for framework in FRAMEWORKS)
    assert ours == theirs and ours.startswith("the lion")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.n_layers", "3"], "its n_layers is 2"),
        (
            ["--tokenizer.path", "EXTENDED", "--model.vocab_size", "384", "--model.n_layers", "3"],
            "its n_layers is 2",
        ),
        (["--model.vocab_size", "320"], "its vocab_size is 330"),
        (["--tokenizer.path", "EXTENDED"], "set model.vocab_size to 384"),
        (["--init.from", "/nowhere"], "no checkpoint directory /nowhere"),
    ],
)
def test_mismatch_with_init_checkpoint_is_named(
    options: list[str], message: str, config: Path, extended: Tokenizer, tmp_path: Path
) -> None:
    from mooshak_torch.train import train

    options = [str(extended.path) if option == "EXTENDED" else option for option in options]
    options += ["--run.dir", str(tmp_path), "--data.dir", str(tmp_path / "tokens")]
    with pytest.raises(InputError, match=message):
        train(resolved(config, options))


def test_other_tokens_are_refused(llama: Path, config: Path, tmp_path: Path) -> None:
    """Also where the rows are as many, and no token is new."""
    source = open_any(llama)
    init_from.init_checkpoint(resolved(config, []), source, open_tokenizer(llama / TOKENIZER))
    proto = parse_proto((llama / TOKENIZER).read_bytes())
    proto.pieces[300].piece = "other"
    (tmp_path / TOKENIZER).write_bytes(proto.SerializeToString())
    recipe = resolved(config, ["--tokenizer.path", str(tmp_path / TOKENIZER)])
    assert recipe.model.vocab_size == source.model.vocab_size
    with pytest.raises(InputError, match="does not start with the tokens of"):
        init_from.init_checkpoint(recipe, source, open_tokenizer(tmp_path / TOKENIZER))


@pytest.mark.parametrize("options", [[], ["--init.from", "", "--model.vocab_size", "384"]])
def test_missing_tokenizer_is_not_trained(options: list[str], config: Path, tmp_path: Path) -> None:
    path = tmp_path / "typo" / ("mine.json" if options else "mine.model")
    recipe = resolved(config, [*options, "--tokenizer.path", str(path)])
    for make in (load_or_train_tokenizer, train):
        with pytest.raises(InputError, match=f"{path}: only a SentencePiece model"):
            make(recipe)
    assert not path.parent.exists()


def test_extension_needs_a_larger_vocabulary_and_text(config: Path, tmp_path: Path) -> None:

    path = ["--tokenizer.path", str(tmp_path / "new.model")]
    for size, message in (("300", "more than the 320 tokens"), ("5000", "too large for the text")):
        with pytest.raises(InputError, match=message):
            extend.extend(resolved(config, [*path, "--tokenizer.vocab_size", size]))
    with pytest.raises(InputError, match="name its directory with --init"):
        extend.extend(resolved(config, ["--init.from", ""]))
    (tmp_path / "new.model").touch()
    with pytest.raises(InputError, match="exists already"):
        extend.extend(resolved(config, [*path, "--tokenizer.vocab_size", "380"]))
