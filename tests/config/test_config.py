"""Configuration: accepted files and options, and the one-line error for any other."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from mooshak.config.model import model_from_json, model_to_json
from mooshak.config.parse import config_parser, dump_config, load_config, load_draft, parse_config
from mooshak.errors import InputError

CONFIGS = Path(__file__).parents[2] / "configs"


def described(**values: object) -> str:
    """The text of a small `config.json`."""
    sizes = dict.fromkeys(("vocab_size", "dim", "n_layers", "n_heads", "hidden_dim"), 4)
    return json.dumps(sizes | {"n_heads": 2} | values)


def test_full_model_has_2010185728_parameters() -> None:
    assert load_config(CONFIGS / "mooshak-2b.yaml").model.parameter_count() == 2_010_185_728


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_config_file_and_its_dump_load_the_same(path: Path, tmp_path: Path) -> None:
    loaded = load_config(path)
    (tmp_path / "again.yaml").write_text(dump_config(loaded))
    assert load_config(tmp_path / "again.yaml") == loaded


def test_overrides_take_precedence_over_the_file() -> None:
    loaded = load_config(CONFIGS / "demo.yaml", ["--train.steps", "7", "--run.dir", "elsewhere"])
    assert (loaded.train.steps, loaded.run.dir, loaded.schedule.total_steps) == (7, "elsewhere", 7)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train.stepz", "5"], "did you mean train.steps?"),
        (["--trian.steps", "5"], "did you mean train.steps?"),
        (["--train.step", "5"], "did you mean train.steps?"),  # No abbreviations.
        (["--train.steps", "many"], "train.steps"),
        (["--train.dtype", "fp8"], "bfloat16"),
        (["--model.n_heads", "7"], "model.n_heads 7"),
        (["--model.rope_scaling", "{rope_type: linear, factor: 2}"], "has no rope_scaling"),
        (["--model.qk_norm", "true"], "has no qk_norm; unset model.qk_norm"),
        (["--model.rope_scaling", "{rope_type: dynamic, factor: 2}"], "dynamic is not supported"),
        (["--model.rope_scaling", "{rope_type: linear}"], "'factor' is missing"),
        (["--model.rope_scaling", "{rope_type: linear, factor: -2}"], "factor must be a positive"),
        (["--model.sliding_window", "0"], "sliding_window must be at least 1, not 0"),
        (
            ["--train.batch_size", "7", "--train.gradient_accumulation_steps", "2"],
            "train.gradient_accumulation_steps 2",
        ),
        (["--train.batch_size", "0"], "train.batch_size must be at least 1, not 0"),
        (["--evaluate.sequences", "-1"], "evaluate.sequences must be at least 0, not -1"),
        (["--train.sequence_length", "4096"], "model.max_seq_len"),
        (["--config", "/nowhere.yaml"], "/nowhere.yaml"),
        (["--config=/nowhere.yaml"], "/nowhere.yaml"),
        (["--train.sequence_length", "0"], "train.sequence_length must be at least 1, not 0"),
        (["--train.stop_after_step", "0"], "train.stop_after_step must be at least 1, not 0"),
        (["--checkpoint.keep", "-1"], "checkpoint.keep must be at least 1, not -1"),
        (["--checkpoint.keep", "0"], "checkpoint.keep must be at least 1, not 0"),
        (["--checkpoint.every", "-1"], "checkpoint.every must be at least 0, not -1"),
        (["--schedule.warmup_steps", "-1"], "schedule.warmup_steps must be at least 0, not -1"),
        (
            ["--optimizer.max_grad_norm", "-1"],
            "optimizer.max_grad_norm must be at least 0 or .inf, not -1",
        ),
        (["--model.rope_theta", "0"], "model.rope_theta must be above 0 and finite, not 0"),
        (["--parallel.num_processes", "2"], "go together; give all three or none"),
        (
            "--parallel.coordinator_address h:1 --parallel.num_processes 2 "
            "--parallel.process_id 2".split(),
            "parallel.process_id 2 is not in 0 .. 1",
        ),
    ],
)
def test_wrong_option_is_named(arguments: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message.replace("?", r"\?")):
        parse_config(config_parser(""), arguments)[0].config()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {stepz: 5}", "unknown key train.stepz; did you mean train.steps"),
        ("trian: {steps: 5}", "did you mean train.steps"),
        ("data: {sources: [{name: a, wieght: 3}]}", "did you mean weight"),
        ("data: [", "bad.yaml is not YAML"),
        ("\0", "bad.yaml is not YAML"),
        ("data: {sources: [{name: ..}]}", "must begin with a letter or digit"),
    ],
)
def test_wrong_key_in_a_file_is_named(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    for read in (load_config, load_draft):
        with pytest.raises(InputError, match=message):
            read(tmp_path / "bad.yaml")


def test_config_json_round_trip() -> None:
    model = load_config(CONFIGS / "demo.yaml").model
    assert model_from_json(model_to_json(model), "here") == model
    laid_out = replace(model, scan_layers=True, fuse_kernels=True)
    assert model_to_json(laid_out) == model_to_json(model)
    assert "bias" not in model_to_json(model)
    llama = replace(model, architecture="llama", qkv_bias=True, sliding_window=9, head_dim=48)
    assert model_from_json(model_to_json(llama), "here") == llama


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "not a JSON object"),
        ('{"dimm": 3}', "did you mean dim"),
        ('{"dim": 3}', "is missing"),
        (described(architecture="gpt"), "architecture 'gpt' is unknown; known are mooshak and"),
        (described(architecture=["llama"]), "model.architecture .* is unknown"),
        (described(architecture="llama", rope_scaling="linear"), "'linear' is not an object"),
    ],
)
def test_wrong_config_json_is_named(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        model_from_json(text, "config.json")


def test_mesh_is_short_for_the_key() -> None:
    for words in (["--mesh", "data=2"], ["--mesh=data=2"], ["--parallel.mesh", "data=2"]):
        draft, _ = parse_config(config_parser(""), words)
        assert draft.config().parallel.mesh == "data=2"
