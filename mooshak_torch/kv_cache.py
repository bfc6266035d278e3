"""Key/value cache of one layer. Mirror: mooshak_jax/kv_cache.py.

Shapes: B rows, S slots, T time of a call, G key/value heads, K head width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


class KVCache:
    """Keys and values of one layer, [B, S, G, K] each; slot s holds those of position s.

    The positions of a call are consecutive. In each row they start at its length, or below: then
    they overwrite the slots of earlier calls. Masks are computed from positions: a query at
    position p sees slots 0 .. p (within the window), never the older contents of later slots.
    """

    k_BSGK: Tensor
    v_BSGK: Tensor
    written: int
    """Upper bound of `lengths`, on the host: reading `lengths` would wait for a GPU."""
    block: int
    """Slots are attended to in blocks of this size, also by a prefill (engine.py); 0: one by one.

    Then bits do not depend on the number of later slots. It divides the number of slots.
    """

    def __init__(
        self, k_BSGK: Tensor, v_BSGK: Tensor, lengths: Tensor, written: int = 0, block: int = 0
    ):
        self.k_BSGK, self.v_BSGK = k_BSGK, v_BSGK
        self.lengths, self.written, self.block = lengths, written, block
        self._rows_B1 = torch.arange(len(lengths), device=lengths.device).unsqueeze(1)

    @property
    def lengths(self) -> Tensor:
        """Number of tokens in each row, [B]: the last position of the latest call, plus one.

        After a call with padded rows that counts the padding, until `truncate`.
        """
        return self._last_BT[:, -1] + 1

    @lengths.setter
    def lengths(self, lengths_B: Tensor) -> None:
        self._last_BT = lengths_B.unsqueeze(1) - 1

    def update(self, k_BTGK: Tensor, v_BTGK: Tensor, positions_BT: Tensor) -> "KVCache":
        """Write keys and values at their positions, in place. Returns this cache."""
        self.k_BSGK[self._rows_B1, positions_BT] = k_BTGK.to(self.k_BSGK.dtype)
        self.v_BSGK[self._rows_B1, positions_BT] = v_BTGK.to(self.v_BSGK.dtype)
        # `lengths` is computed when it is read: decoding does not need it.
        self._last_BT = positions_BT
        self.written = self.visible_slots(positions_BT.shape[1])
        return self

    @property
    def is_read(self) -> bool:
        """False if a call attends to its own tokens only: the prefill of empty rows."""
        return self.written > 0 or self.block > 0

    def visible_slots(self, n_tokens: int) -> int:
        """Return how many slots a call with `n_tokens` tokens per row attends to: those in use."""
        in_use = min(self.written + n_tokens, self.k_BSGK.shape[1])
        return -(-in_use // self.block) * self.block if self.block else in_use

    def select(self, rows: Sequence[int] | Tensor) -> "KVCache":
        """Reorder, repeat or drop rows, in place: row i becomes the old row rows[i].

        Returns this cache.
        """
        rows_B = torch.as_tensor(rows, device=self.k_BSGK.device, dtype=torch.long)
        self.k_BSGK, self.v_BSGK = self.k_BSGK[rows_B], self.v_BSGK[rows_B]
        self.lengths = self.lengths[rows_B]
        self._rows_B1 = torch.arange(len(rows_B), device=rows_B.device).unsqueeze(1)
        return self

    def truncate(self, lengths: Sequence[int] | Tensor) -> "KVCache":
        """Drop the tokens of each row beyond its new length, [B]; shorter rows are unchanged.

        Returns this cache. Raises `ValueError` unless there is one length for each row.
        """
        lengths_B = torch.as_tensor(lengths, dtype=torch.long)
        if lengths_B.shape != self.lengths.shape:
            raise ValueError(f"{tuple(lengths_B.shape)} lengths for {len(self.lengths)} rows")
        if lengths_B.device.type == "cpu" and (lengths_B < 0).any():
            raise IndexError(f"length {int(lengths_B.min())} is negative")
        if lengths_B.device.type == "cpu":  # Otherwise `written` stays larger: masks hide the rest.
            self.written = min(self.written, int(lengths_B.max()))
        self.lengths = torch.minimum(self.lengths, lengths_B.to(self.k_BSGK.device))
        return self
