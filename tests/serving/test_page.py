"""The page in headless Chromium: both frameworks side by side, with log-probabilities."""

from pathlib import Path
from urllib.parse import urlencode

import pytest

from scripts.page_picture import CHROMIUM, Page, open_page
from tests.serving.servers import serve

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed"),
]
FIELDS = {"prompt": "एक चूहा", "max_tokens": 20, "temperature": 0.8, "seed": 5, "run": 1}


def texts_of(page: Page, selector: str) -> list[str]:
    found: list[str] = page.evaluate(
        f"[...document.querySelectorAll('{selector}')].map(e => e.textContent)"
    )
    return found


@pytest.mark.parametrize("mode", ["completions", "chat"])
def test_the_page_shows_both_frameworks(
    mode: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    with (
        serve("jax", checkpoints["llama"]) as other,
        serve("torch", checkpoints["llama"], "--peer", other.url) as server,
        open_page(f"{server.url}/?{urlencode(FIELDS | {'mode': mode})}", tmp_path) as page,
    ):
        heads, texts = texts_of(page, ".answer h2"), texts_of(page, ".text")
        assert heads == ["PyTorch", "JAX"]
        assert texts[0] == texts[1] != ""
        verdict = page.evaluate("document.getElementById('verdict').textContent")
        assert verdict == "Both texts are equal."
        tokens = texts_of(page, ".text span")
        assert "".join(tokens) == "".join(texts) and len(tokens) > 6
        scored = page.evaluate("document.querySelectorAll('.text span[data-logprob]').length")
        assert scored > 6
        show = "document.querySelector('.text span').dispatchEvent(new Event('mouseenter'));"
        card = page.evaluate(f"{show} document.getElementById('card').textContent")
        assert "log p = -" in card and card.count("%") >= 6


def test_the_page_shows_an_error(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    url = f"/?{urlencode(FIELDS | {'max_tokens': 900})}"
    with (
        serve("torch", checkpoints["llama"], "--peer", "http://127.0.0.1:9") as server,
        open_page(server.url + url, tmp_path) as page,
    ):
        errors = texts_of(page, ".error")
        assert "max_tokens is 900" in errors[0] and errors[1] == "Failed to fetch"
