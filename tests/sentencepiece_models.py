"""Small SentencePiece models and Hugging Face directories around them, for tests."""

import io
import json
from pathlib import Path
from typing import Any

import sentencepiece

LINES = ["एक चालाक चूहा जंगल में रहता था of the cat of the hat the lion became"] * 50


def train_sentencepiece(path: Path, **options: Any) -> sentencepiece.SentencePieceProcessor:
    """Write a small BPE model, with Llama 2's dummy prefix; return it."""
    model = io.BytesIO()
    defaults = {"model_type": "bpe", "vocab_size": 400, "byte_fallback": True}
    defaults |= {"normalization_rule_name": "identity", "hard_vocab_limit": False}
    defaults |= {"remove_extra_whitespaces": False, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES), model_writer=model, **defaults | options
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def added_token(content: str, special: bool = True, **flags: bool) -> dict[str, Any]:
    """Return an entry of `added_tokens_decoder`."""
    off = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
    return {"content": content, "special": special, **off, **flags}


def llama_directory(
    path: Path, settings: dict[str, Any], others: dict[str, Any] | None = None, **options: Any
) -> sentencepiece.SentencePieceProcessor:
    """Write tokenizer.model, tokenizer_config.json, and `others`: file name -> content."""
    model = train_sentencepiece(path / "tokenizer.model", **options)
    files = {"tokenizer_config.json": {"tokenizer_class": "LlamaTokenizer", **settings}}
    files |= {"config.json": {"model_type": "llama"}, **(others or {})}
    for name, content in files.items():
        (path / name).write_text(json.dumps(content))
    return model
