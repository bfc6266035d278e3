"""parity.check finds injected faults and reports where they are.

Each fault is injected into one framework, torch and JAX in turns.
"""

import re
from dataclasses import replace

import numpy as np
import pytest

from mooshak.config.model import ModelConfig
from parity import checker
from parity.comparisons.case import Line
from parity.faults import FAULTS, inject_fault

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("compiled_in_haste")]

MODEL = ModelConfig(vocab_size=96, dim=24, n_layers=3, n_heads=3, hidden_dim=40, max_seq_len=40)
LLAMA = replace(
    MODEL,
    architecture="llama",
    n_heads=4,
    n_kv_heads=2,
    head_dim=8,
    rope_scaling={"rope_type": "linear", "factor": 2.0},
    tie_embeddings=True,
    qkv_bias=True,
    qk_norm=True,
    sliding_window=6,
)


CASES = [(name, ("torch", "JAX")[i % 2]) for i, name in enumerate(FAULTS)]


def lines_of(name: str, framework: str) -> list[Line]:
    """Return the lines of the part that has to find the fault."""
    fault = FAULTS[name]
    source = checker.random_checkpoint(LLAMA if fault.architecture == "llama" else MODEL)
    sizes = {"batch": 4, "time": 20, "decode": 10}
    options = {
        "parts": (fault.part,),
        "controls": False,
        "floors": False,
        "low": ("float32",),
        **sizes,
    }
    if fault.read is not None:
        ours, theirs = (
            (fault.read(source), source) if framework == "torch" else (source, fault.read(source))
        )
        return list(checker.check(ours, theirs, **options))
    with inject_fault(name, framework):
        return list(checker.check(source, **options))


@pytest.mark.parametrize(("name", "framework"), CASES, ids=[f"{n} ({f})" for n, f in CASES])
def test_fault_is_found_and_placed(name: str, framework: str) -> None:
    failed = [line for line in lines_of(name, framework) if not line.passed]
    assert failed
    places = [line.where for line in failed if line.where]
    assert re.search(FAULTS[name].place, places[0]), places


def test_there_are_at_least_44_faults() -> None:
    assert len(FAULTS) >= 44


def test_lines_pass_and_their_controls_fail_without_fault() -> None:
    lines = list(
        checker.check(
            checker.random_checkpoint(replace(MODEL, n_layers=1)),
            batch=4,
            time=20,
            decode=10,
            parts=checker.IN_THIS_PROCESS,
        )
    )
    assert [line for line in lines if not line.passed] == []
    blind = [
        line
        for line in lines
        if line.negative_control is None or line.negative_control <= line.allowed
    ]
    assert blind == []
    # Differences in float64 are close to the noise floor: no more than rounding.
    floors = [line for line in lines if line.dtype == "float64" and line.noise_floor is not None]
    assert len(floors) > 25
    assert [line for line in floors if line.noise_floor >= 1e-12] == []
    # A framework may compute packed documents and each document alone alike, to the last bit.
    assert [x for x in floors if x.noise_floor <= 1e-19 and "document alone" not in x.name] == []


def test_one_differing_element_is_found() -> None:
    source = checker.random_checkpoint(MODEL)

    def read(name: str) -> np.ndarray:
        value = np.array(source.read(name))
        if name == "layers.1.mlp.w2.weight":
            value.flat[5] += 1e-9
        return value

    other = replace(source, read=read)
    (line,) = checker.check(source, other, parts=("weights",))
    assert not line.passed and line.where == "layers.1.mlp.w2.weight"
    (line,) = checker.check(source, source, parts=("weights",))
    assert line.passed
