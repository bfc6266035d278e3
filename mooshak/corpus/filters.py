"""Filters of documents: normalisation, empty and duplicate documents, validation split."""

import hashlib
import unicodedata
from collections.abc import Iterator

from mooshak.config.sections import Config


def in_validation(text: str, fraction: float) -> bool:
    """Return whether a document is held out: by a hash of its text, so duplicates are, too."""
    digest = hashlib.blake2b(text.encode(), digest_size=8, person=b"validation").digest()
    return int.from_bytes(digest) < fraction * 2**64


def is_normal(text: str) -> bool:
    """Return whether a text is in NFC.

    `is_normalized` has a fast path, which a Devanagari nukta disables. After the letters in
    `letter` it never composes, so the Gujarati nukta (same combining class, composes with nothing)
    replaces it; the result is the same.
    """
    if "\u093c" in text:
        for letter in "कखगजडढफ":
            text = text.replace(letter + "\u093c", letter + "\u0abc")
    return unicodedata.is_normalized("NFC", text)


def clean(texts: Iterator[str], config: Config) -> Iterator[str]:
    """Yield documents normalised and without empty and duplicate ones, as `config.data` says."""
    seen = set()
    for text in texts:
        # Most text is in NFC already, and the check is faster than the normalisation.
        if config.data.normalize_nfc and not is_normal(text):
            text = unicodedata.normalize("NFC", text)
        # Categories Z and C: separators, controls, and format characters such as ZWJ.
        if config.data.drop_empty and all(unicodedata.category(c)[0] in "ZC" for c in text):
            continue
        if config.data.deduplicate:
            digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
            if digest in seen:
                continue
            seen.add(digest)
        yield text
