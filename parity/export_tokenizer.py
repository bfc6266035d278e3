"""Write a SentencePiece model as a `tokenizer.json` that gives the same ids, with settings."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from mooshak.checkpoints.base import Checkpoint
from mooshak.config.model import ModelConfig
from mooshak.errors import InputError
from mooshak.files import read_object
from mooshak.tokenizer.base import Tokenizer
from mooshak.tokenizer.chat_template import CHAT_MARKERS, CHAT_TEMPLATE
from mooshak.tokenizer.files import VOCABULARY_FILES
from mooshak.tokenizer.load import open_tokenizer
from mooshak.tokenizer.metadata import is_nfc
from mooshak.tokenizer.sentencepiece import SPACE_MARK, SentencePieceTokenizer, parse_proto
from mooshak.tokenizer.sentencepiece_hf import HFSentencePieceTokenizer

BPE = 2
"""`model_type` of SentencePiece."""
TOKEN_IDS = {"bos": "bos_token_id", "eos": "eos_token_id", "pad": "pad_token_id"}


def source_tokenizer(source: Checkpoint) -> Tokenizer | None:
    """Return the tokenizer of a checkpoint, as generation uses it; None if it has none."""
    files = [source.tokenizer_files.get(name) for name in reversed(VOCABULARY_FILES)]
    file = next(filter(None, files), None)
    if file is None:
        return None
    tokenizer = open_tokenizer(file)
    tokenizer.nfc = tokenizer.nfc or is_nfc(source.path)
    return tokenizer


def write_tokenizer(
    directory: Path, source: Checkpoint, tokenizer: Tokenizer | None
) -> dict[str, int]:
    """Copy the files of the tokenizer; write a `tokenizer.json` for a SentencePiece model.

    Returns bos_token_id and others, for a model whose configuration does not have them.
    """
    for name, file in source.tokenizer_files.items():
        shutil.copyfile(file, directory / name)
    if not isinstance(tokenizer, SentencePieceTokenizer):
        return {}
    fast_tokenizer(tokenizer).save(str(directory / "tokenizer.json"))
    theirs = read_object(directory / "tokenizer_config.json")
    settings = _settings(tokenizer, source.model) | theirs
    # The class that reads tokenizer.json as it is. Without one, the model's, which does, too.
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    if not theirs or "tokenizer_class" in theirs:
        write_json(directory / "tokenizer_config.json", settings)
    if set(CHAT_MARKERS) <= set(tokenizer.pieces()) and "chat_template" not in settings:
        path = directory / "chat_template.jinja"
        if not path.is_file() and not (directory / "chat_template.json").is_file():
            path.write_text(CHAT_TEMPLATE, "utf-8")
    ids = {"eos": tokenizer.eos_id, "pad": tokenizer.pad_id}
    ids |= {"bos": tokenizer.bos_id} if tokenizer.has_bos else {}
    return {TOKEN_IDS[name]: ids[name] for name in TOKEN_IDS if ids.get(name, -1) >= 0}


def _settings(tokenizer: SentencePieceTokenizer, model: ModelConfig) -> dict[str, Any]:
    specials = {f"{name}_token": text for name, text in tokenizer.special_texts.items()}
    return {
        **specials,
        "clean_up_tokenization_spaces": False,
        "model_max_length": model.max_seq_len,
        "padding_side": "left",
    }


def check_convertible(tokenizer: SentencePieceTokenizer) -> Any:
    """Return the protobuf message of a model that other programs can have an equal of.

    Raises `InputError` for one that is not a BPE model, or changes its text.
    """
    proto = parse_proto(tokenizer.path.read_bytes())
    spec = proto.normalizer_spec
    reasons = {
        "it is not a BPE model": proto.trainer_spec.model_type != BPE,
        f"it normalises text ({spec.name})": bool(spec.precompiled_charsmap),
        "it removes spaces": spec.remove_extra_whitespaces,
        "it does not write spaces as a character": not spec.escape_whitespaces,
        "its spaces follow the words": proto.trainer_spec.treat_whitespace_as_suffix,
    }
    if found := [reason for reason, is_so in reasons.items() if is_so]:
        raise InputError(f"{tokenizer.path}: {found[0]}, of which the format has no equal")
    return proto


def fast_tokenizer(tokenizer: SentencePieceTokenizer) -> tokenizers.Tokenizer:
    """Convert a SentencePiece BPE model to a tokenizer of the `tokenizers` library, with equal ids.

    The vocabulary of a model of ours has spaces instead of SentencePiece's mark for them. The mark
    itself, where a text contains it, is thus encoded as bytes and decodes to itself. Special tokens
    are recognised in text, as chat templates require. Raises `InputError` for a model that is not
    BPE, or normalises its text.
    """
    proto = check_convertible(tokenizer)
    kinds, is_hf = proto.SentencePiece, isinstance(tokenizer, HFSentencePieceTokenizer)
    plain = [p for p in proto.pieces if p.type == kinds.NORMAL]
    text = {p.piece: p.piece if is_hf else p.piece.replace(SPACE_MARK, " ") for p in plain}
    ids = {text.get(p.piece, p.piece): i for i, p in enumerate(proto.pieces)}
    model = models.BPE(
        ids,
        _merges(plain, text),
        unk_token=proto.pieces[proto.trainer_spec.unk_id].piece,
        fuse_unk=True,
        byte_fallback=True,
    )
    result = tokenizers.Tokenizer(model)
    prefix = proto.normalizer_spec.add_dummy_prefix
    form: list[Any] = [normalizers.NFC()] if tokenizer.nfc else []
    steps = [decoders.ByteFallback(), decoders.Fuse()]
    if isinstance(tokenizer, HFSentencePieceTokenizer):
        prefix = tokenizer.prefix
        scheme = ("always" if tokenizer.metadata.legacy else "first") if prefix else "never"
        result.pre_tokenizer = pre_tokenizers.Metaspace(SPACE_MARK, scheme, split=False)
        steps.insert(0, decoders.Replace(SPACE_MARK, " "))
    elif prefix:
        form.append(normalizers.Prepend(" "))
    if form:
        result.normalizer = normalizers.Sequence(form) if len(form) > 1 else form[0]
    if prefix:
        steps.append(decoders.Strip(" ", left=1))
    result.decoder = decoders.Sequence(steps)
    _add_tokens(result, proto, tokenizer)
    # The special tokens of an empty prompt are those of every prompt.
    around, pieces = tokenizer.encode("", bos=True), tokenizer.pieces()
    if around:
        first = [pieces[id] for id in around[: tokenizer.has_bos]]
        last = [pieces[id] for id in around[len(first) :]]
        single = " ".join([*first, "$A", *last])
        pair = " ".join([*first, "$A", *last, "$B", *last])
        named = [(pieces[id], id) for id in dict.fromkeys(around)]
        result.post_processor = processors.TemplateProcessing(single, pair, named)
    return result


def _merges(plain: list[Any], text: Mapping[str, str]) -> list[tuple[str, str]]:
    """Return the merges in order of the scores of their results."""
    return [
        (text[p.piece[:cut]], text[p.piece[cut:]])
        for p in sorted(plain, key=lambda p: -p.score)
        for cut in range(1, len(p.piece))
        if p.piece[:cut] in text and p.piece[cut:] in text
    ]


def _add_tokens(
    result: tokenizers.Tokenizer, proto: Any, tokenizer: SentencePieceTokenizer
) -> None:
    """Add the tokens that are recognised in a text, by id."""
    kinds = proto.SentencePiece
    tokens = {
        id: AddedToken(p.piece, normalized=False, special=p.type != kinds.USER_DEFINED)
        for id, p in enumerate(proto.pieces)
        if p.type in (kinds.CONTROL, kinds.UNKNOWN, kinds.USER_DEFINED)
    }
    if isinstance(tokenizer, HFSentencePieceTokenizer):
        tokens |= {id: AddedToken(**asdict(one)) for id, one in tokenizer.added.items()}
    for id, token in sorted(tokens.items()):
        (result.add_special_tokens if token.special else result.add_tokens)([token])
        if (found := result.token_to_id(token.content)) != id:
            raise InputError(
                f"{tokenizer.path}: the token {token.content!r} has id {id}, which the format "
                f"writes as {found}"
            )


def write_json(file: Path, values: dict[str, Any]) -> None:
    """Write an object as a JSON file."""
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", "utf-8")
