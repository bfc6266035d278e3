"""Python code blocks of README and docs run on a small checkpoint."""

import re
from pathlib import Path

import pytest

from parity.convert import convert

ROOT = Path(__file__).parents[2]
BLOCKS = [
    pytest.param(match[1], id=f"{page.stem}-{number}")
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    for number, match in enumerate(re.finditer(r"```python\n(.*?)```", page.read_text(), re.S), 1)
]


@pytest.fixture(scope="module")
def paths(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pattern of a path in the pages -> the checkpoint that is loaded in its place."""
    hf = tmp_path_factory.mktemp("exported") / "hf"
    convert(tiny_checkpoint, hf, "hf")
    return {r"runs/demo/(torch|jax)/checkpoints/[0-9]+": tiny_checkpoint, "runs/demo/hf": hf}


def run(block: str, paths: dict[str, Path]) -> None:
    code = block
    for pattern, path in paths.items():
        code = re.sub(pattern, str(path), code)
    assert code != block and "runs/" not in code
    exec(compile(code, "block", "exec"), {"__name__": "block"})


@pytest.mark.slow
@pytest.mark.parametrize("block", BLOCKS)
def test_code_block_runs(
    block: str, paths: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run(block, paths)
    assert capsys.readouterr().out.strip()


@pytest.mark.slow
def test_readme_prints_the_same_text_twice(
    paths: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """The first two blocks: the same prompt in PyTorch and in JAX."""
    printed = []
    for block in BLOCKS[:2]:
        run(block.values[0], paths)
        printed.append(capsys.readouterr().out)
    assert printed[1].startswith(printed[0]) and len(printed[0]) > 10
