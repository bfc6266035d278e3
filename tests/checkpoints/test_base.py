"""Checkpoints in NumPy: chunks of rows, casts, copies in C order, literal values."""

import ml_dtypes
import numpy as np
import pytest

from mooshak.checkpoints import base
from mooshak.errors import InputError

FLOAT32, FLOAT16 = np.dtype(np.float32), np.dtype(np.float16)


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (1000, [(0, 10)]),
        (200, [(0, 10)]),
        (199, [(0, 5), (5, 10)]),
        (60, [(0, 3), (3, 6), (6, 9), (9, 10)]),
        (20, [(row, row + 1) for row in range(10)]),
        (1, [(row, row + 1) for row in range(10)]),
    ],
)
def test_chunks_are_equal_and_within_the_limit(
    limit: int, expected: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "CHUNK_BYTES", limit)
    chunks = base.row_chunks((FLOAT32, (10, 5)))  # 20 bytes a row.
    assert [(chunk.start, chunk.stop) for chunk in chunks] == expected


def test_size_of_a_tensor_is_in_bytes() -> None:
    assert base.size_of((FLOAT32, (3, 5))) == 60 and base.size_of((FLOAT16, (7,))) == 14


@pytest.mark.parametrize("shape", [(5000, 40), (1, 1), (17, 33), (0, 4)])
def test_copy_in_c_order_is_equal(shape: tuple[int, int]) -> None:
    array = np.arange(shape[0] * shape[1], dtype=np.float32).reshape(shape[::-1]).T
    copied = base.contiguous(array)
    assert copied.flags.c_contiguous and np.array_equal(copied, array)


def test_cast_rounds_and_refuses_what_overflows() -> None:
    values = np.array([1.0, -65504.0, np.inf, np.nan], np.float32)
    assert base.cast(values, FLOAT32, "x") is values
    half = base.cast(values, FLOAT16, "x")
    assert half.dtype == FLOAT16 and np.array_equal(half, values, equal_nan=True)
    for value, dtype in ((65520.0, FLOAT16), (1e39, FLOAT32)):
        with pytest.raises(InputError, match=f"tensor x has the value .*, which {dtype.name} does"):
            base.cast(np.array([0.0, value]), dtype, "x")
    wide = np.array([1e30], ml_dtypes.bfloat16)  # As many bytes as float16, more exponents.
    with pytest.raises(InputError, match="which float16 does not hold"):
        base.cast(wide, FLOAT16, "x")
