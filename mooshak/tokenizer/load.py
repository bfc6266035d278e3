"""Open a tokenizer file of any supported format, or that of a checkpoint."""

from pathlib import Path

from mooshak.config.model import ModelConfig
from mooshak.errors import InputError
from mooshak.tokenizer.base import Tokenizer
from mooshak.tokenizer.files import find_tokenizer
from mooshak.tokenizer.hf_tokenizer import HFTokenizer
from mooshak.tokenizer.sentencepiece import SentencePieceTokenizer


def open_tokenizer(path: str | Path) -> Tokenizer:
    """Open a SentencePiece model, or a `tokenizer.json` of Hugging Face.

    Raises `InputError` for a file that is missing or is neither.
    """
    if Path(path).suffix == ".json":
        return HFTokenizer(path)
    return SentencePieceTokenizer(path)


def load_tokenizer(
    checkpoint: Path, model: ModelConfig, given: str | Path | None = None
) -> Tokenizer | None:
    """Return the tokenizer `given`, or that of the checkpoint; None if there is none.

    Raises `InputError` if it does not fit the vocabulary of the model.
    """
    path = find_tokenizer(checkpoint, str(given) if given else None, required=False)
    if path is None:
        return None
    tokenizer = open_tokenizer(path)
    # A model from elsewhere may have more rows than tokens; its tokenizer is in its directory.
    own = tokenizer.path.parent == checkpoint
    needed = tokenizer.vocab_size if own else tokenizer.padded_vocab_size
    if needed > model.vocab_size or (needed < model.vocab_size and not own):
        raise InputError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the vocabulary of the model "
            f"{model.vocab_size}; name the right one with --tokenizer"
        )
    return tokenizer
