"""The page in headless Chromium: both frameworks side by side, with log-probabilities."""

import itertools
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest

from tests.serving.servers import serve

CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed"),
]
FIELDS = {"prompt": "एक चूहा", "max_tokens": 20, "temperature": 0.8, "seed": 5, "run": 1}
Evaluate = Callable[[str], Any]


@contextmanager
def page(url: str, profile: Path) -> Iterator[Evaluate]:
    """Open a page; yield a function that returns the value of an expression in it.

    Chromium's DevTools protocol by its pipes, files 3 and 4 of its process: JSON ended by a zero.
    `--dump-dom` does not wait for streams.
    """
    assert CHROMIUM is not None
    (its_input, to), (back, its_output) = os.pipe(), os.pipe()
    words = f"exec {CHROMIUM} --headless --no-sandbox --disable-gpu --remote-debugging-pipe"
    words += f" --user-data-dir={profile} 3<&{its_input} 4>&{its_output}"
    process = subprocess.Popen(
        ["bash", "-c", words], pass_fds=(its_input, its_output), stderr=subprocess.DEVNULL
    )
    os.close(its_input)
    os.close(its_output)
    numbers = itertools.count(1)
    with open(to, "wb", buffering=0) as writer, open(back, "rb") as reader:

        def call(method: str, session: str | None = None, **params: Any) -> Any:
            message = {"id": next(numbers), "method": method, "params": params}
            message |= {"sessionId": session} if session else {}
            writer.write(json.dumps(message).encode() + b"\0")
            while True:
                data = b""
                while not data.endswith(b"\0"):
                    data += (letter := reader.read(1))
                    assert letter, "Chromium has ended"
                if (found := json.loads(data[:-1])).get("id") == message["id"]:
                    return found["result"]

        try:
            target = call("Target.createTarget", url=url)["targetId"]
            session = call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

            def evaluate(expression: str) -> Any:
                options = {"expression": expression, "returnByValue": True}
                return call("Runtime.evaluate", session, **options)["result"].get("value")

            end = time.monotonic() + 30
            while evaluate("document.body?.dataset.done") != "true":
                assert time.monotonic() < end
                time.sleep(0.05)
            yield evaluate
        finally:
            process.kill()
            process.wait()


@pytest.mark.parametrize("mode", ["completions", "chat"])
def test_the_page_shows_both_frameworks(
    mode: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    with (
        serve("jax", checkpoints["llama"]) as other,
        serve("torch", checkpoints["llama"], "--peer", other.url) as server,
        page(f"{server.url}/?{urlencode(FIELDS | {'mode': mode})}", tmp_path) as evaluate,
    ):
        heads = evaluate("[...document.querySelectorAll('.answer h2')].map(e => e.textContent)")
        texts = evaluate("[...document.querySelectorAll('.text')].map(e => e.textContent)")
        assert heads == ["PyTorch", "JAX"]
        assert texts[0] == texts[1] != ""
        assert evaluate("document.getElementById('verdict').textContent") == "Both texts are equal."
        tokens = evaluate("[...document.querySelectorAll('.text span')].map(e => e.textContent)")
        assert "".join(tokens) == "".join(texts) and len(tokens) > 6
        scored = evaluate("document.querySelectorAll('.text span[data-logprob]').length")
        assert scored > 6
        show = "document.querySelector('.text span').dispatchEvent(new Event('mouseenter'));"
        card = evaluate(f"{show} document.getElementById('card').textContent")
        assert "log p = -" in card and card.count("%") >= 6


def test_the_page_shows_an_error(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    url = f"/?{urlencode(FIELDS | {'max_tokens': 900})}"
    with (
        serve("torch", checkpoints["llama"], "--peer", "http://127.0.0.1:9") as server,
        page(server.url + url, tmp_path) as evaluate,
    ):
        errors = evaluate("[...document.querySelectorAll('.error')].map(e => e.textContent)")
        assert "max_tokens is 900" in errors[0] and errors[1] == "Failed to fetch"
