"""Texts and bytes of single tokens, as the OpenAI API writes them."""

import re

from mooshak.tokenizer.base import Tokenizer


class TokenTexts:
    """The texts of single tokens."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self._pieces, self._texts = tokenizer.pieces(), tokenizer.texts()
        self._is_byte_level = any(piece.startswith(_SPACE_OF_BYTE_LEVEL) for piece in self._pieces)

    def bytes_of(self, id: int) -> bytes | None:
        """Return the UTF-8 bytes of a token, maybe a part of a character; None if it is special."""
        if id >= len(self._pieces):
            return None
        piece = self._pieces[id]
        if re.fullmatch("<0x[0-9A-F]{2}>", piece):
            return bytes([int(piece[3:5], 16)])
        if not self._texts[id]:
            return None
        if self._is_byte_level and all(letter in _BYTE_OF_LETTER for letter in piece):
            return bytes(_BYTE_OF_LETTER[letter] for letter in piece)
        return piece.replace("\u2581", " ").encode()

    def text_of(self, id: int) -> str:
        """Return how the API writes a token: `bytes:\\xe0` for a part of a character."""
        data = self.bytes_of(id)
        if data is None:
            return self._pieces[id] if id < len(self._pieces) else ""
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _byte_level_letters() -> dict[str, int]:
    """Return the byte of each letter with which a byte-level BPE spells its tokens."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + i): byte for i, byte in enumerate(others)
    }


_BYTE_OF_LETTER = _byte_level_letters()
_SPACE_OF_BYTE_LEVEL = "\u0120"
