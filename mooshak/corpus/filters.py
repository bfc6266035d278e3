"""Filters of documents: normalisation, empty and duplicate documents, the held-out split."""

import hashlib
import unicodedata
from collections.abc import Iterator

from mooshak.config.sections import Config


def in_validation(text: str, fraction: float) -> bool:
    """Whether a document is held out: by a hash of its text, so copies of it are held out too."""
    digest = hashlib.blake2b(text.encode(), digest_size=8, person=b"validation").digest()
    return int.from_bytes(digest) < fraction * 2**64


def is_normal(text: str) -> bool:
    """Whether a text is in NFC.

    Devanagari's nukta composes with three letters only, but wherever it stands `is_normalized`
    composes the whole text to see. Behind the others another nukta tells the same at a glance:
    Gujarati's, of the same combining class, composes with none.
    """
    if "\u093c" in text:
        for letter in "कखगजडढफ":
            text = text.replace(letter + "\u093c", letter + "\u0abc")
    return unicodedata.is_normalized("NFC", text)


def clean(texts: Iterator[str], config: Config) -> Iterator[str]:
    seen = set()
    for text in texts:
        # Most text is normal already, which is quicker to see than to make.
        if config.data.normalize_nfc and not is_normal(text):
            text = unicodedata.normalize("NFC", text)
        # Categories Z and C are separators, controls, and format characters such as ZWJ.
        if config.data.drop_empty and all(unicodedata.category(c)[0] in "ZC" for c in text):
            continue
        if config.data.deduplicate:
            digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
            if digest in seen:
                continue
            seen.add(digest)
        yield text
