"""Open a tokenizer file of any supported format."""

from pathlib import Path

from mooshak.tokenizer.base import Tokenizer
from mooshak.tokenizer.hf_tokenizer import HFTokenizer
from mooshak.tokenizer.sentencepiece import SentencePieceTokenizer


def open_tokenizer(path: str | Path) -> Tokenizer:
    """Open a SentencePiece model, or a `tokenizer.json` of Hugging Face.

    Raises `InputError` for a file that is missing or is neither.
    """
    if Path(path).suffix == ".json":
        return HFTokenizer(path)
    return SentencePieceTokenizer(path)
