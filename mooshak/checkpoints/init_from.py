"""Initial weights from another checkpoint (`init.from`), with new rows for added tokens."""

from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import sentencepiece

from mooshak.checkpoints.adapters import with_adapters
from mooshak.checkpoints.base import FULL_SLICE, Checkpoint, row_chunks
from mooshak.checkpoints.formats import model_of
from mooshak.checkpoints.manager import newest_checkpoint
from mooshak.checkpoints.resume import check_model
from mooshak.config.lora import TABLES, LoraConfig
from mooshak.config.model import ModelConfig, model_description
from mooshak.config.parse import Draft, load_config
from mooshak.config.sections import Config, TokenizerConfig
from mooshak.errors import InputError
from mooshak.tokenizer.base import Tokenizer
from mooshak.tokenizer.files import VOCABULARY_FILES, find_tokenizer
from mooshak.tokenizer.hf_tokenizer import HFTokenizer
from mooshak.tokenizer.load import open_tokenizer
from mooshak.tokenizer.sentencepiece import parse_proto


def resolve(draft: Draft) -> Config:
    """Return the validated configuration, with model and tokenizer of the checkpoint `init.from`.

    Keys of `model` that were given override those of the checkpoint, and so does `tokenizer.path`.
    The checkpoint is read only if keys are missing; a run that has saved a checkpoint does not need
    it any more, since RUN/config.yaml has these sections. Raises `InputError` if neither exists, or
    the sections do not fit together.
    """
    source = draft.sections["init"].from_
    if not source:
        return draft.config()
    given = {
        key: value
        for key, value in draft.sections["model"].items()
        if f"model.{key}" in draft.given
    }
    tokenizer: TokenizerConfig = draft.sections["tokenizer"]
    has_tokenizer = "tokenizer.path" in draft.given
    keys = {field.name for field in fields(ModelConfig) if field.compare} - {"lora"}
    run = Path(draft.sections["run"].dir)
    if recorded := _record(run, source):
        model: ModelConfig = replace(recorded.model, **given)
        path = tokenizer.path if has_tokenizer else recorded.tokenizer.path
        newest = newest_checkpoint(run)
        if not Path(path).exists() and newest is not None:
            path = str(find_tokenizer(newest, None))
        return draft.config(model=model, tokenizer=replace(tokenizer, path=path))
    if not (keys <= given.keys() and has_tokenizer):
        here = model_description(model_of(Path(source)))
        given = here | given
        if not has_tokenizer:
            tokenizer = replace(tokenizer, path=str(find_tokenizer(Path(source), None)))
    return draft.config(model=draft.sections["model"] | given, tokenizer=tokenizer)


def _record(run: Path, source: str) -> Config | None:
    """Return the configuration of a run that started from `source` and has saved a checkpoint."""
    if not (run / "config.yaml").is_file() or newest_checkpoint(run) is None:
        return None
    recorded = load_config(run / "config.yaml")
    from_ = recorded.init.from_
    same = bool(from_) and Path(from_).absolute() == Path(source).absolute()
    return recorded if same else None


WITHOUT_PARAMETERS = ("max_seq_len", "rope_theta", "rope_scaling", "sliding_window", "norm_eps")
"""Keys of the model that do not change the shapes of its weights."""


def init_checkpoint(config: Config, source: Checkpoint, tokenizer: Tokenizer) -> Checkpoint:
    """Return the weights of `init.from`, with new rows for the added tokens of the run.

    Raises `InputError` if they belong to another model, or their tokens are not the run's first.
    """
    lora = config.model.lora
    if source.model.lora is None and lora is not None:
        # After the new rows, of which some may be trained.
        without = replace(config, lora=LoraConfig(), model=replace(config.model, lora=None))
        dtype = np.dtype(np.float64 if config.train.dtype == "float64" else np.float32)
        source = init_checkpoint(without, source, tokenizer)
        return with_adapters(source, lora, config.run.seed, dtype)
    rows, wanted = source.model.vocab_size, config.model.vocab_size
    more_rows = ("vocab_size",) if rows < wanted else ()
    check_model(source.path, source.model, config, (*WITHOUT_PARAMETERS, *more_rows))
    files = [source.tokenizer_files.get(name) for name in VOCABULARY_FILES]
    # A directory may have both: then the one of the run's kind.
    known = sorted(filter(None, files), key=lambda file: file.suffix != tokenizer.path.suffix)
    if rows == wanted and not known:
        return source
    file = known[0] if known else find_tokenizer(Path(config.init.from_), None)
    old = open_tokenizer(file)
    is_json = isinstance(old, HFTokenizer)
    if (
        is_json != isinstance(tokenizer, HFTokenizer)
        or tokenizer.pieces()[: old.vocab_size] != old.pieces()
    ):
        raise InputError(
            f"{tokenizer.path} does not start with the tokens of {file}; extend that tokenizer"
        )
    if rows == wanted and old.vocab_size == tokenizer.vocab_size:
        return source
    return with_new_rows(source, old, tokenizer, wanted)


def with_new_rows(
    source: Checkpoint, old: Tokenizer, new: Tokenizer, vocab_size: int
) -> Checkpoint:
    """Return the checkpoint with `vocab_size` rows in its embedding and its output head.

    The row of a new token is the mean of the rows of the tokens that `old` encodes its text with;
    rows without text are the mean of all rows. Computed without a framework: both get the same
    bits. The tokens of `new` start with those of `old`.
    """
    before = old.vocab_size
    if isinstance(old, HFTokenizer):
        ids = [old.parts(piece) for piece in new.pieces()[before:]]
    else:
        proto = parse_proto(old.path.read_bytes())
        # A token is a part of a text: without the dummy prefix.
        proto.normalizer_spec.add_dummy_prefix = False
        inside = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
        ids = inside.encode(new.texts()[before:])
    n_rows = source.model.vocab_size
    tensors = {
        key: (dtype, (vocab_size, *shape[1:]) if key in TABLES else shape)
        for key, (dtype, shape) in source.tensors.items()
        if key in source.model.parameter_shapes()
    }

    def read(key: str, rows: slice = FULL_SLICE) -> np.ndarray:
        if key not in TABLES:
            return source.read(key, rows)
        dtype, shape = tensors[key]
        result = np.empty(shape, dtype)
        result[:n_rows] = source.read(key)
        total = sum(
            result[part].astype(np.float64).sum(0)
            for part in row_chunks((dtype, (n_rows, *shape[1:])))
        )
        result[n_rows:] = (total / n_rows).astype(dtype)
        for row, parts in ((row, parts) for row, parts in enumerate(ids, before) if parts):
            result[row] = result[parts].astype(np.float64).mean(0).astype(dtype)
        return result[rows]

    model = replace(source.model, vocab_size=vocab_size)
    return replace(
        source, model=model, tensors=tensors, read=read, trainer_state=None, checksums={}
    )
