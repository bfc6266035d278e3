"""Open a tokenizer file of any supported format, or that of a checkpoint."""

from pathlib import Path

from mooshak.config.model import ModelConfig
from mooshak.errors import InputError
from mooshak.files import read_object
from mooshak.tokenizer.base import Tokenizer
from mooshak.tokenizer.files import find_tokenizer
from mooshak.tokenizer.hf_tokenizer import HFTokenizer
from mooshak.tokenizer.metadata import is_nfc, read_metadata
from mooshak.tokenizer.sentencepiece import SentencePieceTokenizer
from mooshak.tokenizer.sentencepiece_hf import HFSentencePieceTokenizer


def open_tokenizer(path: str | Path) -> Tokenizer:
    """Open a SentencePiece model, or a `tokenizer.json` of Hugging Face.

    Raises `InputError` for a file that is missing or is neither.
    """
    path = Path(path)
    if path.suffix == ".json":
        return HFTokenizer(path)
    if path.name != "tokenizer.model":  # Settings belong to the standard name.
        return SentencePieceTokenizer(path)
    metadata = read_metadata(path.parent)
    if metadata.is_hf or metadata.added:
        return HFSentencePieceTokenizer(metadata)
    return SentencePieceTokenizer(path, metadata.nfc)


def load_tokenizer(
    checkpoint: Path, model: ModelConfig, given: str | Path | None = None
) -> Tokenizer | None:
    """Return the tokenizer `given`, or that of the checkpoint; None if there is none.

    Raises `InputError` if it does not fit the vocabulary of the model, or is not the one with which
    the checkpoint was trained.
    """
    path = find_tokenizer(checkpoint, str(given) if given else None, required=False)
    if path is None:
        return None
    tokenizer = open_tokenizer(path)
    # A model from elsewhere may have more rows than tokens; its tokenizer is in its directory.
    # It may even have more tokens (`<pad>` of Code Llama): those that occur are refused.
    own = tokenizer.path.parent == checkpoint
    if not own and tokenizer.padded_vocab_size != model.vocab_size:
        raise InputError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the vocabulary of the model "
            f"{model.vocab_size}; name the right one with --tokenizer"
        )
    _check_fingerprint(checkpoint, tokenizer)
    tokenizer.nfc = tokenizer.nfc or is_nfc(checkpoint)
    return tokenizer


def _check_fingerprint(checkpoint: Path, tokenizer: Tokenizer) -> None:
    state = read_object(checkpoint / "trainer_state.json")
    trained = (state.get("data") or {}).get("tokenizer")
    if trained is not None and trained != tokenizer.fingerprint:
        raise InputError(
            f"{checkpoint} was trained with another tokenizer than {tokenizer.path}: the "
            f"fingerprints are {trained[:12]} and {tokenizer.fingerprint[:12]}"
        )
