"""Notation of meshes: `data=2,fsdp=2,tensor=2`."""

import pytest

from mooshak.errors import InputError
from mooshak.mesh import mesh_sizes, mesh_text, parse_mesh


@pytest.mark.parametrize(
    ("text", "n_devices", "sizes"),
    [
        ("", 4, (4, 1, 1)),
        ("fsdp=-1", 4, (1, 4, 1)),
        ("data=2,fsdp=-1", 8, (2, 4, 1)),
        (" tensor=2 , data=4", 8, (4, 1, 2)),
        ("data=-1,fsdp=2,tensor=2", 8, (2, 2, 2)),
        ("tensor=-1,data=8", 8, (8, 1, 1)),
    ],
)
def test_mesh_sizes(text: str, n_devices: int, sizes: tuple[int, int, int]) -> None:
    assert tuple(mesh_sizes(text, n_devices).values()) == sizes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("date=2", "axes data, fsdp, tensor"),
        ("data", "expected axis=size"),
        ("data=0", "expected axis=size"),
        ("data=-2", "expected axis=size"),
        ("data=2;fsdp=2", "expected axis=size"),
        ("data=2,data=2", "expected axis=size"),
        ("data=-1,fsdp=-1", "only one axis may be -1"),
    ],
)
def test_parse_mesh_names_a_wrong_text(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_mesh(text)


@pytest.mark.parametrize("text", ["data=3", "fsdp=2,tensor=3", "data=-1,tensor=3", "fsdp=16"])
def test_mesh_that_does_not_divide_is_named(text: str) -> None:
    with pytest.raises(InputError, match=f"{text} does not divide the 8 devices"):
        mesh_sizes(text, 8)


def test_mesh_text_is_read_back() -> None:
    for text in ("data=1", "fsdp=4", "data=2,fsdp=2,tensor=2"):
        assert mesh_text(mesh_sizes(text, 8 if "," in text else int(text[-1]))) == text
