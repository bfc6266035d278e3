"""The generate commands: options made from the settings, files, chats, and what they refuse."""

import importlib
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import mooshak_torch
from mooshak.config.generate import GenerateConfig
from mooshak.generation.command import field_docstrings, generate_parser, setting_options
from mooshak.generation.lm import LM

pytestmark = pytest.mark.usefixtures("compiled_in_haste")

HINDI = "एक चालाक चूहा"
MESSAGES = [{"role": "user", "content": HINDI}]
SETTINGS: dict[str, Any] = {"max_new_tokens": 8, "temperature": 0.9, "seed": 4}
WORDS = [f"--{key}={value}" for key, value in SETTINGS.items()]

Run = Callable[..., None]


@pytest.fixture(params=["torch", "jax"])
def run(
    request: pytest.FixtureRequest, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> Run:
    """The command of each framework, with standard input as a text."""
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    module = importlib.import_module(f"mooshak_{request.param}.generate")

    def start(*words: str, stdin: str = "") -> None:
        monkeypatch.setattr("sys.argv", ["generate", str(tiny_checkpoint), *words])
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        module.main()

    return start


@pytest.fixture(scope="module")
def lm(tiny_checkpoint: Path) -> LM:
    return mooshak_torch.load(tiny_checkpoint)


def test_every_setting_has_an_option_and_a_text() -> None:
    names = {one.name for one in fields(GenerateConfig)}
    assert names == {name for name, _ in setting_options()}
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


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("from_stdin", [True, False], ids=["stdin", "file"])
def test_prompts_are_the_lines_of_a_file(
    from_stdin: bool, run: Run, lm: LM, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = f"{HINDI}\r\n\na mouse"
    (tmp_path / "prompts.txt").write_bytes(text.encode("utf-8-sig"))
    run("--prompts", "-" if from_stdin else str(tmp_path / "prompts.txt"), *WORDS, stdin=text)
    found = lm.generate([HINDI, "a mouse"], **SETTINGS)
    expected = f"{HINDI}{found[0].text}\n\na mouse{found[1].text}\n\n"
    assert capsys.readouterr().out == expected


@pytest.mark.slow
@pytest.mark.parametrize("to_stdout", [True, False], ids=["stdout", "file"])
def test_json_lines_have_their_own_settings(
    to_stdout: bool, run: Run, lm: LM, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": HINDI},
        {"prompt": "a\u2028mouse"},
        {"prompt": [1, 5, 300], "n": 2, "logprobs": True},
        {"messages": MESSAGES, "max_new_tokens": 5},
        {"prompt": "a mouse", "logit_bias": {"5": 100.0}, "stop": ["z"]},
    ]
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    out = tmp_path / "out.jsonl"
    run("--jsonl", "-", "--jsonl-out", "-" if to_stdout else str(out), *WORDS, stdin=lines)
    written = capsys.readouterr().out if to_stdout else out.read_text()
    found = [json.loads(line) for line in written.removesuffix("\n").split("\n")]
    assert all(row.pop("seconds") > 0 for row in found)
    expected = [
        ({"prompt": HINDI}, lm.generate(HINDI, **SETTINGS)),
        ({"prompt": "a\u2028mouse"}, lm.generate("a\u2028mouse", **SETTINGS)),
        *(
            ({"prompt": [1, 5, 300]}, one)
            for one in lm.generate([1, 5, 300], n=2, logprobs=True, **SETTINGS)
        ),
        ({"messages": MESSAGES}, lm.chat(MESSAGES, **{**SETTINGS, "max_new_tokens": 5})),
        ({"prompt": "a mouse"}, lm.generate("a mouse", logit_bias={5: 100.0}, **SETTINGS)),
    ]
    assert len(found) == len(expected)
    for row, (named, completion) in zip(found, expected, strict=True):
        logprobs = row.pop("logprobs")
        assert logprobs == pytest.approx(completion.logprobs, abs=1e-5)
        assert row == named | {
            "text": completion.text,
            "token_ids": completion.token_ids,
            "finish_reason": completion.finish_reason,
            "index": completion.index,
        }


@pytest.mark.slow
def test_interactive_chat_has_a_history(
    run: Run, lm: LM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = iter(["", "a", KeyboardInterrupt(), "b", EOFError()])
    _type(monkeypatch, typed)
    run("--interactive", *WORDS)
    first = lm.chat([{"role": "user", "content": "a"}], **SETTINGS).text
    turns = [("user", "a"), ("assistant", first), ("user", "b")]
    messages = [{"role": role, "content": content} for role, content in turns]
    second = lm.chat(messages, **SETTINGS).text
    assert capsys.readouterr().out == f"{first}\n\n{second}\n\n"


def test_ctrl_c_ends_a_reply_and_not_the_chat(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = []

    def stream(self: LM, ids: list[int], settings: Any, ends: set[int]) -> Iterator[str]:
        seen.append(self.tokenizer.decode(ids) if self.tokenizer else "")
        yield "begun"
        if len(seen) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(LM, "_stream", stream)
    _type(monkeypatch, iter(["x", "y", "z" * 99, "/exit"]))
    run("--interactive", "--tokens", "8")
    out, err = capsys.readouterr()
    assert out == "begun\nbegun\nbegun\n"
    # The third turn does not fit with the earlier ones.
    assert seen == ["x", "xbeguny", "z" * 99] and not err


def test_turn_that_is_too_long_does_not_end_the_chat(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _type(monkeypatch, iter(["x", "/exit"]))
    run("--interactive", "--tokens", "63")
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: prompt and continuation are")


def _type(monkeypatch: pytest.MonkeyPatch, typed: Iterator[str | BaseException]) -> None:
    def answer(prompt: str) -> str:
        assert prompt == ">>> "
        text = next(typed)
        if isinstance(text, BaseException):
            raise text
        return text

    monkeypatch.setattr("builtins.input", answer)


GOOD = '{"prompt": "a"}'


@pytest.mark.parametrize(
    ("words", "stdin", "message"),
    [
        ([], "", "there is no prompt; give --prompt TEXT, --prompts FILE, --jsonl FILE or"),
        (["--prompts", "gone.txt"], "", "No such file or directory: gone.txt"),
        (["--jsonl", "gone.jsonl"], "", "No such file or directory: gone.jsonl"),
        (["--prompts", "-"], "\n", "there is no prompt in -"),
        (["--prompts", "-", "--jsonl", "-"], "", "cannot both read from -"),
        (["--interactive", "--prompt", "a"], "", "--interactive asks for the prompts"),
        (["--interactive", "--n", "2"], "", "--interactive has one reply"),
        (["--interactive", "--jsonl_out", "-"], "", "remove --jsonl_out"),
        (["--prompt", "a", "--jsonl_out", "gone/x"], "", "there is no directory gone"),
        (["--prompt", "a", "--jsonl_out", "/"], "", "--jsonl_out / is a directory"),
        (["--jsonl", "-"], f"{GOOD}\n\n{{", "standard input line 3: not JSON: "),
        (["--jsonl", "-"], f"{GOOD}\n[]", "standard input line 2: must be an object"),
        (["--jsonl", "-"], '{"seed": 1}', "line 1: must have either prompt or messages"),
        (["--jsonl", "-"], '{"prompt": 5}', "line 1: prompt must be a text or token ids"),
        (["--jsonl", "-"], '{"prompt": "\\ud800"}', "line 1: a text has a lone surrogate"),
        (["--jsonl", "-"], '{"prompt": "", "sed": 1}', "line 1: unknown setting sed; did you"),
        (["--jsonl", "-"], '{"prompt": "", "top_p": 7}', "line 1: generate.top_p 7 must be in"),
        (["--jsonl", "-"], '{"prompt": "", "stop": 7}', "line 1: generate.stop 7 must be a te"),
        (["--jsonl", "-"], '{"prompt": "", "logit_bias": {"a": 1}}', "line 1: {'a': 1} is not"),
        (["--jsonl", "-"], f"{GOOD}\n" + '{"prompt": [999]}', "line 2: token 999 is outside"),
        (["--jsonl", "-"], '{"prompt": []}', "line 1: a prompt is empty"),
        (["--jsonl", "-"], '{"prompt": "a", "max_new_tokens": 99}', "line 1: prompt and conti"),
        (["--jsonl", "-"], '{"messages": "a"}', "line 1: messages must be a list"),
        (["--jsonl", "-"], '{"messages": [{"role": "x"}]}', "line 1: message {'role': 'x'}"),
        (["--jsonl", "-"], '{"messages": []}\n5', "line 2: must be an object"),
    ],
)
def test_bad_requests_are_one_line(
    words: list[str], stdin: str, message: str, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(*words, "--max_new_tokens", "8", stdin=stdin)
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and out == ""
    assert err.startswith("error: ") and message in err and err.count("\n") == 1


def test_input_is_not_overwritten(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(GOOD)
    with pytest.raises(SystemExit):
        run("--jsonl", str(file), "--jsonl_out", f"{tmp_path}/../{tmp_path.name}/a.jsonl")
    assert "is read; name another file" in capsys.readouterr().err and file.read_text() == GOOD


@pytest.mark.slow
def test_error_during_generation_names_the_lines(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A setting that leaves no token after the first one."""
    lines = f'{GOOD}\n{{"prompt": "b", "allowed_tokens": [5], "no_repeat_ngram_size": 1}}'
    with pytest.raises(SystemExit) as stopped:
        run("--jsonl", "-", "--jsonl_out", str(tmp_path / "out"), "--tokens", "3", stdin=lines)
    assert stopped.value.code == 2
    assert "error: standard input line 2: no token may follow" in capsys.readouterr().err
    assert json.loads((tmp_path / "out").read_text())["prompt"] == "a"


@pytest.mark.slow
def test_json_lines_have_the_fields_that_settings_ask_for(
    lm: LM, run: Run, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    rows: list[dict[str, Any]] = [
        {"prompt": [1, 5], "prompt_logprobs": True, "logprobs": True, "top_logprobs": 2},
        {"prompt": [1, 5], "num_beams": 2, "temperature": 0.0},
        {"prompt": [1, 5], "draft": str(tiny_checkpoint)},
    ]
    lines = "\n".join(map(json.dumps, rows))
    run("--jsonl", "-", "--jsonl-out", str(out), "--tokens", "4", stdin=lines)
    scored, beam, drafted = map(json.loads, out.read_text().splitlines())
    assert len(scored["prompt_logprobs"]) == len(scored["prompt_top_logprobs"]) == 2
    assert len(scored["top_logprobs"]) == 4 and "score" not in scored
    expected = lm.generate([1, 5], max_new_tokens=4, num_beams=2)
    assert (
        beam["score"] == pytest.approx(expected.score) and beam["token_ids"] == expected.token_ids
    )
    assert drafted["n_accepted"] == drafted["n_drafted"] == 2
