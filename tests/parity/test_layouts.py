"""The same training on eight CPU devices in every mesh, and on processes of torchrun."""

from dataclasses import replace
from pathlib import Path

import pytest

from mooshak.config.model import ModelConfig
from mooshak.config.sections import Config, TrainConfig
from parity import checker
from parity.layouts import fitting

MODEL = ModelConfig(vocab_size=96, dim=16, n_layers=2, n_heads=4, hidden_dim=24, max_seq_len=24)


@pytest.mark.slow
@pytest.mark.usefixtures("compiled_in_haste")
def test_layouts_change_nothing_and_controls_fail(tmp_path: Path) -> None:
    lines = list(
        checker.check(checker.random_checkpoint(MODEL), batch=4, time=20, parts=("layouts",))
    )
    names = {line.layout for line in lines}
    assert len(names) == 10 and len(lines) == 50
    for line in lines:
        assert line.noise_floor is not None and line.negative_control is not None
        assert line.noise_floor < line.allowed < line.negative_control
        assert line.passed, line
    checker.write_report(lines, tmp_path, "drawn")
    page = (tmp_path / "report.html").read_text()
    assert all(name in page for name in names)


def test_meshes_that_do_not_fit_are_left_out() -> None:
    one_head = replace(MODEL, n_heads=1, n_kv_heads=1, head_dim=16)
    config = Config(model=one_head, train=TrainConfig(batch_size=8))
    assert fitting(config) == ["data=8", "fsdp=8"]
