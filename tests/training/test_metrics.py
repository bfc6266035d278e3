"""The run directory: its records."""

import pytest

from mooshak.training.metrics import environment


def test_environment_without_git_has_no_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert environment()["git_commit"] is None
