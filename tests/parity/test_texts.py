"""parity.texts: texts of every strategy in every way to compute them; ties and differences."""

import dataclasses
import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from parity.faults import inject_fault
from parity.texts import Result, Texts, compare, markdown, tale_prompts

pytestmark = pytest.mark.usefixtures("compiled_in_haste")

PROMPTS = [[1, 5, 300, 7], [1, 9], [1, *range(20, 31)]]


@pytest.fixture(scope="module")
def texts(tiny_checkpoint: Path) -> Texts:
    return Texts(tiny_checkpoint, tiny_checkpoint, PROMPTS, 6)


@pytest.mark.slow
def test_every_way_gives_the_same_texts(texts: Texts) -> None:
    strategies = {"sampled": {"temperature": 1.0, "repetition_penalty": 1.3}}
    found = list(compare(texts, strategies | {"beams": {"num_beams": 3}}))
    assert all(one.passed and one.divergent == 0 and one.texts == 3 for one in found)
    ways = [one.comparison for one in found if (one.strategy, one.dtype) == ("sampled", "float64")]
    assert ways == [
        "JAX, torch",
        "JAX tensor=2, JAX",
        "torch, no cache",
        "torch engine, torch",
        "torch with draft, torch",
        "JAX, no cache",
        "JAX engine, JAX",
        "JAX with draft, JAX",
    ]
    assert markdown(found).count("| sampled | 0 | 0 | 0 |") == 2


def test_end_tokens_are_banned_without_a_cache_too(texts: Texts) -> None:
    """Without the minimum nearly every token would be the end of text, 2."""
    values = {"temperature": 1.0, "min_new_tokens": 4, "logit_bias": {2: 12.0}}
    settings = texts.settings(values)
    found = texts.generate("torch", "float64", settings)
    assert all(2 not in ids[:4] and ids[4:] == [2, 2] for ids in found)
    assert texts.without_cache("torch", "float64", settings, found) == found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "different"),
    [
        ("noise of the next sample", {"torch, no cache", "torch engine, torch", "JAX, torch"}),
        ("top_p ignored", {"torch, no cache", "torch engine, torch", "JAX, torch"}),
    ],
)
def test_faults_are_found(fault: str, different: set[str], texts: Texts) -> None:
    with inject_fault(fault, "torch"):
        found = list(compare(texts, {"sampled": {"temperature": 1.0, "top_p": 0.3}}))
    for dtype in ("float64", "float32"):
        failed = {one.comparison for one in found if one.dtype == dtype and not one.passed}
        assert different <= failed
        assert not failed & {"JAX, no cache", "JAX engine, JAX", "JAX tensor=2, JAX"}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_only_tokens_at_a_border_are_ties(
    temperature: float, texts: Texts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The noise floor is set between the change that a second token needs, and less."""
    settings = texts.settings({"temperature": temperature})
    prompt, drawn = PROMPTS[0], texts.generate("torch", "float64", settings)[0][0]
    (logits_TV,) = texts.logits("torch", "float64", [prompt])
    if temperature == 0:
        order = np.argsort(-logits_TV[-1])
        other, needed = int(order[1]), (logits_TV[-1, drawn] - logits_TV[-1, order[1]]) / 2
    else:
        from mooshak.numerics.sampling_noise import noise

        other, u = drawn + 1, noise(0, 0, 6)[0]
        p = np.exp(logits_TV[-1] - logits_TV[-1].max())
        share = p[: drawn + 1].sum() / p.sum()
        # Earlier tokens fall by a factor, later ones rise: their odds have to become those of u.
        needed = np.log(share / (1 - share) * (1 - u) / u) / 2
    # With a hundred times as much the draw passes over the second token.
    for factor, expected in ((1.01, True), (0.99, False), (100, True)):
        monkeypatch.setattr(Texts, "noise_floor", lambda self, settings: needed * factor)  # noqa: B023
        assert texts.is_tie(prompt, [], (drawn, other), settings) is expected


def test_results_pass_only_with_few_ties() -> None:
    result = Result("greedy", "JAX, torch", "float32", texts=100, divergent=2, ties=2)
    assert result.passed
    change: Callable[..., Result] = dataclasses.replace
    assert not change(result, ties=1).passed
    assert not change(result, divergent=3, ties=3).passed
    assert not change(result, dtype="float64").passed
    assert change(result, dtype="float64", divergent=0, ties=0).passed


def test_prompts_begin_tales_of_both_languages(tiny_checkpoint: Path) -> None:
    import mooshak_torch

    lm = mooshak_torch.load(tiny_checkpoint)
    prompts = tale_prompts(lm, 20, 10)
    assert len({*map(tuple, prompts)}) > 10 and len({*map(len, prompts)}) > 3
    assert lm.tokenizer is not None
    assert any(lm.tokenizer.decode(one).isascii() for one in prompts)
    assert not all(lm.tokenizer.decode(one).isascii() for one in prompts)
    lm.tokenizer = None
    assert all(0 <= id < lm.config.vocab_size for one in tale_prompts(lm, 9, 5) for id in one)


@pytest.mark.slow
def test_command_writes_its_tables(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import jax

    from parity import texts

    original = jax.config.update

    def update(name: str, value: Any) -> None:
        if name != "jax_num_cpu_devices":  # The devices of this process are there already.
            original(name, value)

    monkeypatch.setattr(jax.config, "update", update)
    # The package has a function of the module's name.
    decoding = import_module("parity.comparisons.decoding")
    monkeypatch.setattr(decoding, "STRATEGIES", {"greedy": {}})
    words = ["--prompts", "2", "--tokens", "3", "--out", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", ["texts", str(tiny_checkpoint), *words])
    texts.main()
    rows = json.loads((tmp_path / "out/texts.json").read_text())
    assert len(rows) == 12 and all(row["passed"] and row["texts"] == 2 for row in rows)
    assert "| greedy | 0 | 0 |" in (tmp_path / "out/texts.md").read_text()
