"""The generate commands: options made from the settings, and what they refuse."""

import importlib
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import mooshak_torch
from mooshak.config.generate import GenerateConfig
from mooshak.generation.command import field_docstrings, generate_parser, setting_options

HINDI = "एक चालाक चूहा"


def test_every_setting_has_an_option_and_a_text() -> None:
    names = {one.name for one in fields(GenerateConfig)}
    assert names - {name for name, _ in setting_options()} == {"n", "logprobs"}
    assert names == field_docstrings().keys() and all(field_docstrings().values())


def test_options_become_settings_and_absent_ones_stay_absent() -> None:
    parser = generate_parser("mooshak_torch.generate", "Generate.")
    words = "X --prompt a --top-k 5 --min_p 0.1 --tokens 7 --stop x --stop y --ignore-eos".split()
    words += ["--allowed_tokens", "3", "4", "--logit_bias", '{"3": -1.5}']
    found = vars(parser.parse_args(words))
    given = {name: found[name] for name, _ in setting_options() if name in found}
    assert given == {
        "top_k": 5,
        "min_p": 0.1,
        "max_new_tokens": 7,
        "stop": ["x", "y"],
        "ignore_eos": True,
        "allowed_tokens": [3, 4],
        "logit_bias": {3: -1.5},
    }


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_command_prints_what_the_api_returns(
    framework: str,
    tiny_checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings: dict[str, Any] = {
        "max_new_tokens": 12,
        "temperature": 0.9,
        "top_k": 20,
        "repetition_penalty": 1.3,
        "seed": 4,
    }
    words = [f"--{key}={value}" for key, value in settings.items()]
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    line = ["generate", str(tiny_checkpoint), "--prompt", HINDI, *words]
    monkeypatch.setattr("sys.argv", line)
    importlib.import_module(f"mooshak_{framework}.generate").main()
    expected = mooshak_torch.load(tiny_checkpoint).generate(HINDI, **settings)
    assert capsys.readouterr().out == f"{HINDI}{expected.text}\n\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--top_k", "-3"], "generate.top_k -3 must not be negative"),
        (["--temperature", "-1"], "generate.temperature -1.0 must be 0 (greedy) or at least 1e-06"),
        (["--top_p", "2"], "generate.top_p 2.0 must be in (0, 1]"),
        (["--tokens", "0"], "generate.max_new_tokens 0 must be at least 1"),
        (["--allowed_tokens", "99999"], "generate.allowed_tokens: token 99999 is outside"),
        (["--logit_bias", "{3}"], "{3}"),
        (["--bad_words", ""], "generate.bad_words contains an empty text"),
    ],
)
@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_setting_out_of_range_is_one_line(
    framework: str,
    words: list[str],
    message: str,
    tiny_checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    line = ["generate", str(tiny_checkpoint), "--prompt", HINDI, *words]
    monkeypatch.setattr("sys.argv", line)
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(f"mooshak_{framework}.generate").main()
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
