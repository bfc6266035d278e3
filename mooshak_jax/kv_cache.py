"""Key/value cache of one layer. Mirror: mooshak_torch/kv_cache.py.

Shapes: B rows, S slots, T time of a call, G key/value heads, K head width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


def check_index(index: Array, size: int, what: str) -> None:
    """Raise `IndexError` unless all numbers are in 0 .. size - 1; JAX would take others silently.

    In a compiled function they have no values, and nothing is checked.
    """
    if isinstance(index, jax.core.Tracer) or not index.size:
        return
    low, high = int(index.min()), int(index.max())
    if low < 0 or high >= size:
        raise IndexError(f"{what} {low if low < 0 else high} is not in 0 .. {size - 1}")


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["k_BSGK", "v_BSGK", "lengths", "n_blocks"],
    meta_fields=["written", "block"],
)
@dataclass
class KVCache:
    """Keys and values of one layer, [B, S, G, K] each; slot s holds those of position s.

    The positions of a call are consecutive. In each row they start at its length, or below: then
    they overwrite the slots of earlier calls. Masks are computed from positions: a query at
    position p sees slots 0 .. p (within the window), never the older contents of later slots.
    """

    k_BSGK: Array
    v_BSGK: Array
    lengths: Array
    """Number of tokens in each row, [B]: the last position of the latest call, plus one.

    After a call with padded rows that counts the padding, until `truncate`.
    """
    written: bool = False
    """False while all rows are empty. Static: a count would compile one step for each value."""
    block: int = 0
    """Slots are attended to in blocks of this size, also by a prefill (engine.py); 0: all at once.

    Then bits do not depend on the number of later slots. It divides the number of slots.
    """
    n_blocks: Array | None = None
    """Number of blocks that calls attend to, a scalar, if there are blocks."""

    def update(self, k_BTGK: Array, v_BTGK: Array, positions_BT: Array) -> "KVCache":
        """Write keys and values at their positions. Returns the new cache.

        Raises `IndexError` for a position without a slot; in a compiled function, where positions
        have no values, only for more tokens than slots.
        """
        check_index(positions_BT, self.k_BSGK.shape[1], "position")
        if positions_BT.shape[1] > self.k_BSGK.shape[1]:
            raise IndexError(f"{positions_BT.shape[1]} tokens for {self.k_BSGK.shape[1]} slots")
        rows_B1 = jnp.arange(len(positions_BT))[:, None]
        k_BSGK = self.k_BSGK.at[rows_B1, positions_BT].set(k_BTGK.astype(self.k_BSGK.dtype))
        v_BSGK = self.v_BSGK.at[rows_B1, positions_BT].set(v_BTGK.astype(self.v_BSGK.dtype))
        lengths = (positions_BT[:, -1] + 1).astype(self.lengths.dtype)
        return replace(self, k_BSGK=k_BSGK, v_BSGK=v_BSGK, lengths=lengths, written=True)

    @property
    def is_read(self) -> bool:
        """False if a call attends to its own tokens only: the prefill of empty rows."""
        return self.written or self.block > 0

    def visible_slots(self, n_tokens: int) -> int:
        """Return how many slots a call with `n_tokens` tokens per row attends to: all of them.

        A number that depends on the tokens so far would compile one step for each value.
        """
        return self.k_BSGK.shape[1]

    def select(self, rows: Sequence[int] | Array) -> "KVCache":
        """Reorder, repeat or drop rows: row i becomes the old row rows[i].

        Returns the new cache.
        """
        rows_B = jnp.asarray(rows, jnp.int32)
        check_index(rows_B, len(self.lengths), "row")
        k_BSGK, v_BSGK = self.k_BSGK[rows_B], self.v_BSGK[rows_B]
        return replace(self, k_BSGK=k_BSGK, v_BSGK=v_BSGK, lengths=self.lengths[rows_B])

    def truncate(self, lengths: Sequence[int] | Array) -> "KVCache":
        """Drop the tokens of each row beyond its new length, [B]; shorter rows are unchanged.

        Returns the new cache. Raises `ValueError` unless there is one length for each row.
        """
        lengths_B = jnp.asarray(lengths, self.lengths.dtype)
        if lengths_B.shape != self.lengths.shape:
            raise ValueError(f"{lengths_B.shape} lengths for {self.lengths.shape} rows")
        check_index(lengths_B, self.k_BSGK.shape[1] + 1, "length")
        # Lengths on a device are not read: `written` may then stay true for an empty cache, whose
        # slots the masks hide.
        on_host = not isinstance(lengths, Array)
        written = self.written and not (on_host and not np.any(lengths))
        return replace(self, lengths=jnp.minimum(self.lengths, lengths_B), written=written)
