"""Formats of checkpoints: how a directory is recognised."""

from pathlib import Path

import pytest

from mooshak.checkpoints.formats import detect_format
from mooshak.errors import InputError


def test_safetensors_with_an_index_are_one_format(tmp_path: Path) -> None:
    for name in ("model.safetensors", "model.safetensors.index.json"):
        (tmp_path / name).touch()
        assert detect_format(tmp_path) == "safetensors"
    (tmp_path / "dcp").mkdir()
    with pytest.raises(InputError, match="has safetensors and torch"):
        detect_format(tmp_path)
