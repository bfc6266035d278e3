"""Small tokenizers in a tokenizer.json, for tests: byte-level, and with bytes as a fallback."""

import json
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from mooshak.tokenizer.base import Tokenizer
from mooshak.tokenizer.load import open_tokenizer

PARTS = (
    "क्ष",
    "स्त्री",
    "ड़",
    "ड\u093c",
    "क्\u200dष",
    "क्\u200cष",
    "कि",
    "र्कि",
    "👨‍👩‍👧",
    "🇮🇳",
    "e\u0301",
    "the ",
    "a mouse",
    " ",
    "\n",
    "।",
    "",
    "\u093f",  # A vowel sign alone.
)
KINDS = ("byte level", "metaspace")


def small_tokenizer(kind: str, directory: Path) -> Tokenizer:
    """Write and open a tokenizer of one of `KINDS`."""
    specials = ["<unk>", "<s>", "</s>"]
    if kind == "byte level":
        lines = ["".join(PARTS[(i * i + j * 7) % len(PARTS)] for j in range(30)) for i in range(99)]
        made = tokenizers.Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=400, initial_alphabet=alphabet, special_tokens=specials, show_progress=False
        )
        made.train_from_iterator(lines, trainer)
    else:
        # As in Llama 2: <0x41> is a byte, no special token.
        tokens = [*specials, *(f"<0x{i:02X}>" for i in range(256)), "▁", "▁▁", *"aeनकषि्"]
        vocabulary = {token: id for id, token in enumerate(tokens)}
        model = models.BPE(vocabulary, [("▁", "▁")], unk_token="<unk>", byte_fallback=True)
        made = tokenizers.Tokenizer(model)
        made.pre_tokenizer = pre_tokenizers.Metaspace()
        made.add_special_tokens(specials)
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        made.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    path = directory / "tokenizer.json"
    made.save(str(path))
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    path.with_name("tokenizer_config.json").write_text(json.dumps(names))
    return open_tokenizer(path)
