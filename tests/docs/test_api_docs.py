"""docs/api.md is generated from the docstrings, and up to date."""

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_api_page_is_up_to_date() -> None:
    api_docs = runpy.run_path(str(ROOT / "scripts" / "api_docs.py"))
    page = (ROOT / "docs" / "api.md").read_text()
    assert page == api_docs["api_page"]()
    for method in ("generate", "stream", "score", "chat", "save"):
        assert f"\n### {method}\n" in page
    for name in ("mooshak_torch.load", "mooshak_jax.load", "max_new_tokens", "finish_reason"):
        assert name in page


def test_public_functions_without_a_docstring_are_none() -> None:
    api_docs = runpy.run_path(str(ROOT / "scripts" / "api_docs.py"))
    empty = []
    for framework in ("torch", "jax"):
        for module in api_docs["MODULES"]:
            path = f"mooshak_{framework}/{module}.py"
            nodes = api_docs["parse"](path)
            empty += [f"{path}: {name}" for name in nodes if not api_docs["summary"](nodes[name])]
    assert not empty


def test_api_docs_check_fails_on_a_stale_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    api_docs = runpy.run_path(str(ROOT / "scripts" / "api_docs.py"))
    main = api_docs["main"]
    monkeypatch.setattr("sys.argv", ["api_docs.py", "--check"])
    main()
    stale = tmp_path / "api.md"
    stale.write_text(api_docs["api_page"]().replace("Continue a prompt", "Begin a prompt"))
    monkeypatch.setitem(main.__globals__, "TARGET", stale)
    with pytest.raises(SystemExit, match="not up to date"):
        main()
