"""Check of an export before it gets its name: its own reader computes what the checkpoint does.

Token ids and texts of `samples` must be equal; each difference is a line of text. The logits are
compared in export_hf_check.py, tensors and settings of GGUF in export_gguf.py.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from mooshak.errors import InputError
from mooshak.generation.text import REPLACEMENT
from mooshak.tokenizer.base import Tokenizer
from mooshak.tokenizer.sentencepiece_hf import HFSentencePieceTokenizer

TEXTS = (
    "",
    "एक चालाक चूहा जंगल में रहता था।",
    "the lion became its friend; 12 apples, १२ सेब",
    "ड़ ढ़ ज़रा and \u095c \u095d \u095b\u0930\u093e",
    "ड\u093c \u095c क\u093c\u094d\u0937",
    "क्\u200dष क्\u200cष क्ष श्री र्कि \u200d",
    "two  spaces,   three\ttabs\n\n and lines \n",
    "def f(x):\n    return {x: [x ** 2, 'a']}  # <b>&amp;</b>",
    "👨‍👩‍👧‍👦 🇮🇳 ✌🏽 e\u0301 \u00e9 ﬁ ① ﷺ \u00a0\u3000",
    "https://example.org/?q=1&r=%20 user_name@x.co 3.14e-10",
)
N_JOINED = 400
"""Number of texts of three tokens."""


def samples(tokenizer: Tokenizer) -> Iterator[str]:
    """Yield the texts whose ids are compared: `TEXTS`, and tokens joined."""
    yield from TEXTS
    texts = [text for text in tokenizer.texts() if text.strip() and REPLACEMENT not in text]
    random, n = np.random.default_rng(0), len(texts)
    # Appended tokens, at the end, are where merges go wrong.
    for start in (0, max(0, n - n // 4)) if n else ():
        for a, b, c in random.integers(start, n, (N_JOINED // 2, 3)):
            yield texts[a] + texts[b].lstrip() + texts[c].lstrip()
            yield f"{texts[a].strip()} {texts[b].strip()}{texts[c].strip()}"
        yield from islice(_overlapping(texts[start:], random), N_JOINED // 2)


def _overlapping(texts: list[str], random: np.random.Generator) -> Iterator[str]:
    """Yield texts in which two tokens share letters: the order of the merges decides."""
    by_start: dict[str, list[str]] = {}
    for text in texts:
        for n in range(1, min(4, len(text))):
            by_start.setdefault(text[:n], []).append(text)
    for i in random.permutation(len(texts)):
        for n in range(1, min(4, len(texts[i]))):
            if following := by_start.get(texts[i][-n:]):
                yield texts[i] + following[random.integers(len(following))][n:]


def added_samples(tokenizer: Tokenizer) -> Iterator[str]:
    """Yield texts with each added token, for tokenizers that recognise them in a text."""
    if not isinstance(tokenizer, HFSentencePieceTokenizer):
        return
    for token in tokenizer.added.values():
        yield from (token.content, f"a{token.content}b", f"चूहा {token.content} था")


def tokenizer_differences(
    ours: Tokenizer,
    texts: Sequence[str],
    encode: Callable[[str], list[int]],
    decode: Callable[[list[int]], str] | None = None,
) -> list[str]:
    """Return how the ids and texts of an exported tokenizer differ from ours: at most one line."""
    wrong: list[str] = []
    unknown = ours.pieces().index(ours.special_texts["unk"]) if "unk" in ours.special_texts else -1
    for text in texts:
        ids = ours.encode(text, bos=True)
        found = encode(text)
        if found != ids:
            wrong.append(f"{text!r} has the ids {_shown(found)}, not {_shown(ids)}")
        elif unknown in ids:  # It has no text.
            continue
        elif decode is not None and (back := decode(ids)) != ours.decode(ids):
            wrong.append(f"the ids of {text!r} have the text {back!r}")
    if not wrong:
        return []
    return [f"{len(wrong)} of {len(texts)} texts have other tokens: {wrong[0]}"]


def _shown(ids: list[int]) -> str:
    return f"[{', '.join(map(str, ids[:8]))}{', ...' if len(ids) > 8 else ''}]"


def refuse(path: Path, differences: list[str], force: bool) -> None:
    """Raise `InputError` for an export that differs, unless it is to be written anyway."""
    if differences and not force:
        raise InputError(
            f"{path} is not written, since it would differ from the checkpoint: "
            f"{'; '.join(differences)}. --force writes it, with a note"
        )
